"""Checkpoints of a run, by Orbax: arrays, their description, and the numbers that were printed so far."""

from pathlib import Path
from types import TracebackType
from typing import Any

import optax
import orbax.checkpoint as ocp

import momentum_optax as mo

from .settings import Settings

State = dict[str, optax.Params]


class Checkpoints:
    """The checkpoints in a folder, of which the last two are kept; a context manager.

    A checkpoint appears when all of it is written, so that a run that is killed goes on from the one before.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._settings = settings
        # Not in the background: the next step overwrites the arrays.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def save(self, step: int, state: State, history: dict[str, Any]) -> None:
        """Write the state after this many steps, and what was measured on the way."""
        run = {"settings": self._settings._asdict(), "history": history}
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            layout=ocp.args.JsonSave(mo.checkpoint.describe(state)),
            run=ocp.args.JsonSave(run),
        )
        self._manager.save(step, args=parts)

    def latest(self, target: State) -> tuple[int, State, dict[str, Any]] | None:
        """The last step, its state and the history; None where no checkpoint was finished.

        Args:
          target: Shapes, dtypes and shardings of the state.

        Raises:
          mo.checkpoint.CheckpointError: If it is of other settings, or damaged.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        wanted = ocp.args.Composite(layout=ocp.args.JsonRestore(), run=ocp.args.JsonRestore())
        found = self._restore(step, wanted)
        for name, value in self._settings._asdict().items():
            if found.run["settings"].get(name) != value:
                option, before = name.replace("_", "-"), found.run["settings"].get(name)
                message = f"--{option} must be that of the run in the folder, {before}, got {value}"
                raise mo.checkpoint.CheckpointError(f"{message}; or give --checkpoints another folder")
        mo.checkpoint.check(found.layout, target)
        state = self._restore(step, ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
        mo.checkpoint.check(found.layout, state)
        return step, state, found.run["history"]

    def _restore(self, step: int, parts: ocp.args.Composite) -> ocp.args.Composite:
        try:
            return self._manager.restore(step, args=parts)
        except (LookupError, ValueError, OSError) as error:
            place = self._manager.directory / str(step)
            raise mo.checkpoint.CheckpointError(
                f"{place} must be a whole checkpoint, got {type(error).__name__}: {error}; remove it, or give "
                "--checkpoints another folder"
            ) from error
