"""The orders that the launcher gives to a worker."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# The file with the initial parameters.
START = "start.npz"


class Job(NamedTuple):
    """The orders of a worker.

    Attributes:
      settings: The fields of a `Settings`.
      folder: Path of the folder with the data and the checkpoints.
      worker: Its number.
      port: Of the coordinator, which is in the process of worker 0.
      strategy: A key of `strategies.STRATEGIES`.
      run: The name of the folder of checkpoints.
      resume: The round to go on from; None to start.
    """

    settings: Sequence[Any]
    folder: str
    worker: int
    port: int
    strategy: str
    run: str
    resume: int | None
