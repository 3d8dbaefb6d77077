"""The effect of keeping the velocity in fewer bytes: on velocities, on directions and on final losses.

    python -m benchmarks.storage_quality --plot docs/figures/storage_quality.png

Networks train with Nesterov's rule, AdamW, Lion and Muon, one run for each storage and seed. Learning rates of
Nesterov's rule fall with 1 - decay, so that the length of a step along a lasting gradient stays. Beside every run the
same optimizer in float32 is fed the same gradients and weights: the relative error of the stored velocity and the
cosine between both updates are averaged over steps. Losses are those of held-out data after the last step: squared
error per image, nats per character, nats per image.

Of the deep autoencoder every leaf is below the size from which int8 and int4 compress; here they compress all of them.
"two passes" has the exact maximum of each step as scale, "8-bit dynamic" is the code of Dettmers et al. (2022).
`columns.py` measures rows whose columns have unlike scales.

Seeds of the autoencoders and of the GRU train in one vectorised program and share the noise of the rounding. Prints
tables and writes benchmarks/storage_quality.json after every row; with --resume, rows stay that are in it already and
were measured by the same code, or are of tasks that are not asked for.
"""

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import WRITABLE, choice, whole_number

from .. import _run
from .._run import Row
from . import columns, report
from .bases import BASES, built, learning_rate
from .cases import SEEDS, Case, cases, storages
from .figure import draw
from .tasks import TASKS, Train
from .tracked import Figures, Tracked

# Steps 5 to 21, counted from 1.
EARLY = slice(4, 21)


def measure(case: Case, params: optax.Params, train: Train) -> Row:
    """One row."""
    kept = storages(*case[:3])[case.storage]
    tx, exact = (built(case.base, case.task, case.decay, storage) for storage in (kept, "float32"))
    optimizer = Tracked(tx, exact, BASES[case.base].velocity)
    losses, figures = train(optimizer)
    return {
        "task": case.task,
        "optimizer": case.base,
        "decay": case.decay,
        "learning_rate": learning_rate(case.base, case.task, case.decay),
        "storage": case.storage,
        "bytes_per_parameter": round(optimizer.bytes_per_parameter(params), 3),
        "losses": _numbers(losses),
        **summary(figures),
    }


def summary(figures: Figures) -> Row:
    """Of the figures of all steps, an entry for each seed; `longest` is over the longest step of float32."""
    leaf, tree, cosine, longest, longest_exact = (np.asarray(of_steps) for of_steps in figures)
    return {
        "leaf_errors": _numbers(leaf.mean(1)),
        "tree_errors": _numbers(tree.mean(1)),
        "first_errors": _numbers(tree[:, 0]),
        "early_errors": _numbers(tree[:, EARLY].mean(1)),
        "cosines": _numbers(cosine.mean(1)),
        "longest": _numbers(longest.max(1) / longest_exact.max(1)),
    }


def _numbers(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, which knows no NaN: a run that diverged has none."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values]


def fingerprint() -> str:
    """A hash of the code that rows depend on: the storages, and what trains here."""
    ours = (Path(__file__).with_name(f"{name}.py") for name in ("bases", "cases", "columns", "reference", "tasks"))
    sources = [*sorted(Path(mo.storage.__file__).parent.glob("*.py")), *ours]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    plot: Annotated[Path | None, WRITABLE] = None
    """draw the final losses to this file"""
    redraw: bool = False
    """take all rows from the JSON instead of training"""
    resume: bool = False
    """keep the rows of the JSON, but for those that are asked for and that other code has measured"""
    seeds: Annotated[int | None, whole_number(1, 100)] = None
    """runs of each row; None is 5, 3 of the language model, or 2 with --quick"""
    tasks: tuple[Annotated[str, choice((*TASKS, "columns"))], ...] = (*TASKS, "columns")
    """what to measure"""
    quick: bool = False
    """one decay, a few steps, 2 seeds: to see that it runs"""


def main() -> None:
    """Measure what is asked for, print the tables and write the file."""
    run = _run.Run("storage_quality", __doc__, Options)
    document = committed(run.path) if run.options.resume or run.options.redraw else {"rows": [], "columns": None}
    if not run.options.redraw:
        document = _measured(run, document)
    print("\n".join(report.tables(document)))
    if run.options.plot:
        draw(document["rows"]).savefig(run.options.plot, dpi=110)


def committed(path: Path) -> Row:
    """Rows and columns in the file, if there is one."""
    return _run.entries_before(path, ("rows", "columns")) or {"rows": [], "columns": None}


def _measured(run: _run.Run[Options], document: Row) -> Row:
    """The document with what is asked for and was not measured by this code, written after each row."""
    options = run.options
    for task in options.tasks:
        if task == "columns":
            if (document["columns"] or {}).get("code") != fingerprint():
                seeds = options.seeds or (2 if options.quick else 5)
                document["columns"] = {"code": fingerprint(), **columns.measure(seeds, options.quick)}
            run.write({"losses": report.LOSSES, **document})
            continue
        for row in _rows_of(task, options, document["rows"]):
            others = (old for old in document["rows"] if _case_of(old) != _case_of(row))
            document["rows"] = in_order([*others, row])
            run.write({"losses": report.LOSSES, **document})
    return document


def _rows_of(task: str, options: Options, before: list[Row]) -> Iterator[Row]:
    """The rows of a task that were not measured by this code before."""
    seeds = options.seeds or (2 if options.quick else SEEDS.get(task, 5))
    done = {_case_of(row) for row in before if row["code"] == fingerprint()}
    missing = [case for case in cases((task,), quick=options.quick) if case not in done]
    if missing:
        params, train = TASKS[task](seeds, options.quick)
    for case in tqdm(missing, desc=task, unit="row", leave=False):
        yield {**measure(case, params, train), "code": fingerprint()}


def in_order(rows: list[Row]) -> list[Row]:
    """The rows in the order of `cases`."""
    order = cases(tuple(TASKS))
    return sorted(rows, key=lambda row: order.index(_case_of(row)))


def _case_of(row: Row) -> Case:
    return Case(row["task"], row["optimizer"], row["decay"], row["storage"])


if __name__ == "__main__":
    main()
