"""What the numbers of a run depend on."""

from typing import NamedTuple

# Each device has a share of every batch; of what else has it one?
MESHES = {
    "copies": "nothing: weights and states are on every device",
    "zero1": "the states (ZeRO's first stage)",
    "split": "weights and states (fully sharded)",
}


class Settings(NamedTuple):
    """The options of a run, but for where it writes. A checkpoint is that of one value of it.

    Attributes:
      config: A key of `config.CONFIGS`.
      optimizer: A key of `optimizers.OPTIMIZERS`.
      rule: A key of `optimizers.RULES`: the memory of gradients; "own" for that of the optimizer.
      storage: The storage of what the optimizer remembers.
      behind: A key of `optimizers.BEHIND`, a rule on the optimizer's updates; "none" for none.
      average: Half-life of an average of the weights, in steps; 0 for none.
      learning_rate: The peak of the schedule.
      steps: Of the whole run.
      batch_size: Windows of text in a step.
      seed: Of the initial weights and of the batches.
      mesh: A key of `MESHES`.
    """

    config: str = "small"
    optimizer: str = "adamw"
    rule: str = "own"
    storage: str = "float32"
    behind: str = "none"
    average: int = 0
    learning_rate: float = 1e-3
    steps: int = 100
    batch_size: int = 16
    seed: int = 0
    mesh: str = "split"
