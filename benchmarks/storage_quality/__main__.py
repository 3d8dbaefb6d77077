"""The effect of keeping the velocity in fewer bytes on velocities and on final losses.

    python -m benchmarks.storage_quality --plot docs/figures/storage_quality.png

Three networks train with Nesterov's rule, one run for each storage, decay and seed; learning rates fall with 1 - decay,
so that the length of a step along a lasting gradient stays. Beside every run an exact float32 velocity is fed the same
gradients: the relative error of the stored one is averaged over steps, per leaf and for the whole tree. Losses are
those of held-out data after the last step: squared error per image, nats per character, nats per image.

Of the autoencoder every leaf is below the size from which int8 and int4 compress, so that these rows keep float32; "all
leaves" switches that rule off. "reference" takes two passes, with the exact maximum of each step as scale.

Seeds of the autoencoder and of the GRU train in one vectorised program and share the noise of the rounding. Prints a
table and writes benchmarks/storage_quality.json.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import WRITABLE, choice, whole_number
from momentum_optax.storage import Storage

from .. import _run
from .._run import Row
from .figure import LOSSES, draw
from .reference import Reference
from .tasks import TASKS
from .tracked import Tracked

STORAGES = ("float32", "bfloat16", "int8", "int4")
DECAYS = (0.9, 0.99, 0.999)
# Learning rate over 1 - decay, as tuned for decay 0.9.
RATES = {"autoencoder": 0.1, "gru": 4.0, "cnn": 0.2}


def storages(task: str) -> dict[str, str | Storage]:
    """The storages that a task compares."""
    table: dict[str, str | Storage] = {name: name for name in STORAGES}
    if task == "autoencoder":
        whole = [name for name in STORAGES if name.startswith("int")]
        table |= {f"{name}, all leaves": getattr(mo.storage, name)(min_size=1) for name in whole}
        table["reference"] = Reference()
    return table


def measure(tasks: tuple[str, ...], decays: tuple[float, ...], seeds: int, quick: bool) -> list[Row]:
    """One row for each task, decay and storage."""
    rows = []
    total = sum(len(decays) * len(storages(task)) for task in tasks)
    with tqdm(total=total, unit="run", leave=False) as bar:
        for task in tasks:
            params, train = TASKS[task](seeds, quick)
            for decay, (name, storage) in itertools.product(decays, storages(task).items()):
                bar.set_description(f"{task}, {decay}, {name}")
                rate = RATES[task] * (1 - decay)
                optimizer = Tracked(storage, decay, rate)
                losses, errors = train(optimizer)
                rows.append(
                    {
                        "task": task,
                        "decay": decay,
                        "learning_rate": round(rate, 12),
                        "storage": name,
                        "bytes_per_parameter": optimizer.bytes_per_parameter(params),
                        "losses": _finite(losses),
                        "leaf_errors": _finite(errors[:, 0]),
                        "tree_errors": _finite(errors[:, 1]),
                    }
                )
                bar.update()
    return rows


def _finite(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, which knows no NaN: a run that diverged has none."""
    return [float(value) if np.isfinite(value) else None for value in values]


def table(rows: list[Row]) -> str:
    """The rows in print; "paired" is the median over seeds of the loss less that of float32 from the same seed."""
    columns = {
        "task": "{task}",
        "decay": "{decay:g}",
        "storage": "{storage}",
        "bytes": "{bytes_per_parameter:.2f}",
        "loss: median (range)": "{median:.4f} ({least:.4f} to {most:.4f})",
        "paired": "{paired:.4f}",
        "error, leaf": "{leaf:.4f}",
        "tree": "{whole:.4f}",
    }
    shown, base = [], np.zeros(0)
    for row in rows:
        losses, leaf, tree = (np.array(row[key], float) for key in ("losses", "leaf_errors", "tree_errors"))
        base = losses if row["storage"] == "float32" else base
        found = {"median": np.median(losses), "least": losses.min(), "most": losses.max()}
        shown.append(row | found | {"paired": np.median(losses - base), "leaf": leaf.mean(), "whole": tree.mean()})
    return _run.table(columns, shown)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    plot: Annotated[Path | None, WRITABLE] = None
    """draw the final losses to this file"""
    redraw: bool = False
    """take the rows from the JSON instead of training"""
    seeds: Annotated[int | None, whole_number(1, 100)] = None
    """runs of each row; None is 5, or 2 with --quick"""
    tasks: tuple[Annotated[str, choice(TASKS)], ...] = tuple(TASKS)
    """what to train"""
    quick: bool = False
    """decay 0.9, a few steps, 2 seeds: to see that it runs"""


def main() -> None:
    """Train every row, print the table and write the file."""
    run = _run.Run("storage_quality", __doc__, Options)
    options = run.options
    decays, seeds = (DECAYS[:1], 2) if options.quick else (DECAYS, 5)
    if options.redraw:
        rows = json.loads(run.path.read_text())["rows"]
    else:
        rows = measure(options.tasks, decays, options.seeds or seeds, options.quick)
        run.write({"losses": LOSSES, "rows": rows})
    print(table(rows))
    if options.plot:
        draw(rows).savefig(options.plot, dpi=110)


if __name__ == "__main__":
    main()
