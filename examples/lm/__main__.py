"""The command line of the language model.

Needs the extra packages of `pip install 'momentum-optax[demo]'` and no download: the text is Python's own. The same
options give the same numbers on one machine, also where a run was interrupted and goes on from its checkpoints.
"""

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import jax

import momentum_optax as mo

from .. import command_line
from ..command_line import FOLDER, WRITABLE, choice, number, whole_number
from .config import CONFIGS
from .figure import plot
from .optimizers import BEHIND, OPTIMIZERS, RULES, STORAGES, default_rate
from .settings import MESHES, Settings

if TYPE_CHECKING:
    from .training import History

# Packages that must be installed.
PACKAGES = ("flax", "matplotlib", "orbax", "tqdm", "tyro")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the language model."""

    config: Annotated[str, choice(CONFIGS)] = "small"
    """size of the model: 0.1, 0.8 or 124 million parameters"""
    optimizer: Annotated[str, choice(OPTIMIZERS)] = "adamw"
    """what makes updates of gradients"""
    rule: Annotated[str, choice(("own", *RULES))] = "own"
    """memory of gradients in sgd, lion or muon; own is the optimizer's"""
    storage: Annotated[str, choice(STORAGES)] = "float32"
    """how memories are kept"""
    behind: Annotated[str, choice(("none", *BEHIND))] = "none"
    """memory of updates, behind the optimizer"""
    average: Annotated[int, whole_number(0, 10**9)] = 0
    """half-life in steps of an average of the weights; 0 for none"""
    learning_rate: Annotated[float | None, number(1e-9, 1e9)] = None
    """peak of the schedule; None is the optimizer's"""
    steps: Annotated[int, whole_number(1, 10**9)] = 400
    """steps of the whole run"""
    batch_size: Annotated[int, whole_number(1, 100_000)] = 16
    """windows of text in a step"""
    seed: Annotated[int, whole_number(0, 2**31 - 1)] = 0
    """seed of everything"""
    mesh: Annotated[str, choice(MESHES)] = "split"
    """what of the state each device has a share of"""
    checkpoints: Annotated[Path | None, FOLDER] = None
    """folder to save to, and to go on from"""
    save_every: Annotated[int, whole_number(1, 10**9)] = 50
    """steps between checkpoints"""
    output: Annotated[Path, WRITABLE] = Path("language_model.png")
    """PNG file to write"""

    @property
    def settings(self) -> Settings:
        """The part of the options that the numbers depend on."""
        chosen = {name: getattr(self, name) for name in Settings._fields}
        if self.learning_rate is None:
            chosen["learning_rate"] = default_rate(self.optimizer, self.rule)
        return Settings(**chosen)

    @property
    def title(self) -> str:
        """The run in words."""
        rule = "" if self.rule == "own" else f", rule {self.rule}"
        behind = "" if self.behind == "none" else f", behind it {self.behind}"
        return f"Language model, {self.config}: {self.optimizer}{rule}{behind}".replace("_", " ")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; the exit status is 0, 1 where the run went wrong or is another one, and 2 where an option is wrong."""
    start = time.perf_counter()
    description = "Train a small language model with any optimizer of the package, with checkpoints and telemetry."
    options = command_line.parse(Options, "examples.lm", description, arguments)
    if message := command_line.missing(PACKAGES):
        print(message, file=sys.stderr)
        return 1
    devices = jax.device_count()
    if options.batch_size % devices:
        message = f"must be a multiple of the number of devices, {devices}, got {options.batch_size}"
        command_line.refuse("--batch-size", message)
    history = _trained(options)
    if isinstance(history, int):
        return history
    print(report(history))
    plot(history, options.output, options.title)
    print(f"Wrote {options.output} after {time.perf_counter() - start:.0f} s.")
    return 0


def _trained(options: Options) -> "History | int":
    """What the run measured, or the exit status where it did not end."""
    from .placement import place  # noqa: PLC0415
    from .training import DivergedError, train  # noqa: PLC0415

    settings = options.settings
    try:
        placed = place(settings)
    except ValueError as error:
        # Messages begin with the name of the argument.
        name, _, rest = str(error).partition(" ")
        command_line.refuse(f"--{name}", rest)
    print(f"{options.title}, learning rate {settings.learning_rate:.4g}:", flush=True)
    try:
        return train(settings, placed, options.checkpoints, options.save_every)
    except DivergedError as error:
        print(f"Stopped: {error}. Take a lower --learning-rate.", file=sys.stderr)
        return 1
    except mo.checkpoint.CheckpointError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = "" if options.checkpoints is None else ": the same command goes on from the last checkpoint"
        print(f"Interrupted{again}.", file=sys.stderr)
        return 128 + signal.SIGINT


def report(history: "History") -> str:
    """The losses on test text, and the bytes of the optimizer's state."""
    losses = ", ".join(f"{name} {value:.4f}" for name, value in history.test.items())
    return f"  Test text, nats per character: {losses}; state: {history.telemetry[-1]['bytes'] / 1e6:.2f} MB."


if __name__ == "__main__":
    sys.exit(main())
