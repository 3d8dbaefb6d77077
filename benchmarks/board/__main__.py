"""Bases, memories and storages on a small language model, every learning rate tuned, eight seeds.

    python -m benchmarks.board --plot docs/figures/board.png --write

A transformer of 0.1 million parameters predicts the next byte of English text (`examples.lm`). Four optimizers, AdamW,
Muon, SGD and Lion, and AdamW once more without decay of its rate; behind each of them in float32 every memory of
`cells.memories`, and without one its own momentum in every storage. Half-lives and periods are 2 % of the run,
and 5 % for comparison.

Each cell tries six learning rates, the same multiples of its base's centre, with a seed of which no result is
reported, and takes that with the least final loss on validation text. With it come eight runs: a seed is the initial
weights and the batches, the same in all cells. Reported are the losses on test text at the point that the method
evaluates. A run that diverges counts as ln 128, the loss of a model that knows nothing. The rounding noise of
compressed storages is the same for all seeds.

Rows are written as they are done, and a run that is stopped goes on after its last row: the same command again. With
other settings give another `--output`. `--config accelerator` is a model of 3 million parameters, meant for a GPU.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
from tqdm import tqdm

from examples.command_line import WRITABLE, choice, whole_number
from examples.lm import data

from .. import _page, _run
from .._language import Problem, Reader, Setting, Trainer, held_out, problems
from .._run import Row
from .cells import Cell, Transformation, cells
from .figure import draw
from .summary import cell_of, markdown

# Chooses the learning rates; the seeds of the results are counted from 0.
SELECTION_SEED = 1000
CONFIGS = {
    "small": Setting(),
    "accelerator": Setting(256, 4, 4, length=256, batch=32, steps=500, marks=25, held_out=64, together=8),
    "toy": Setting(8, 1, 1, length=8, batch=2, steps=10, marks=2, held_out=8, together=1),
}
PAGE, COMMAND = _page.DOCS / "board.md", "python -m benchmarks.board --write"


def chosen(trainer: Trainer, rates: Sequence[float], problem: Problem, windows: np.ndarray) -> tuple[int, list[float]]:
    """The index of the rate with the least final loss on these windows, and the losses of all."""
    numbers = np.asarray(rates, np.float32)
    same = jax.tree.map(lambda x: np.repeat(np.asarray(x), len(rates), 0), problem)
    losses = trainer.curves(numbers, same, windows)[:, -1]
    return int(np.argmin(losses)), [round(float(x), 6) for x in losses]


def measure(cell: Cell, setting: Setting, selection: Problem, problem: Problem) -> Row:
    """The row of a cell: its rate chosen with the one problem on validation text, its results of the other on test."""

    def make(rate: jax.Array) -> tuple[Transformation, Reader]:
        return cell.optimizer(rate, setting)

    texts, trainer = data.splits(), Trainer(make, setting)
    best, losses = chosen(trainer, cell.rates, selection, held_out(setting, texts.validation))
    rate = cell.rates[best]
    runs = np.full(len(problem.batches), rate, np.float32)
    curves = trainer.curves(runs, problem, held_out(setting, texts.test))
    return {
        **cell._asdict(),
        "learning_rate": rate,
        "validation": losses,
        "curves": [[round(float(x), 6) for x in curve] for curve in curves],
    }


def missing(rows: Sequence[Row], limit: int) -> Iterator[Cell]:
    """The cells without a row, no more than `limit` of them."""
    there = {cell_of(row) for row in rows}
    return iter([cell for cell in cells() if cell not in there][:limit])


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    config: Annotated[str, choice(CONFIGS)] = "small"
    """the model and the length of its runs"""
    seeds: Annotated[int, whole_number(2, 1000)] = 8
    """runs of each cell with its chosen rate"""
    limit: Annotated[int, whole_number(0, 1000)] = 1000
    """run no more than this number of cells, and leave the others to the next call"""
    plot: Annotated[Path | None, WRITABLE] = None
    """draw the differences to this file"""
    write: bool = False
    """replace the tables of docs/board.md"""


def main() -> None:
    """Run the cells that are missing, print the tables, write the file, and the page if that was asked for."""
    run = _run.Run("board", __doc__, Options)
    options = run.options
    setting = CONFIGS[options.config]
    settings = {"config": options.config, "seeds": options.seeds, **dataclasses.asdict(setting)}
    rows = _run.rows_before(run.path, settings)
    made = functools.cache(functools.partial(problems, setting))
    # Those of a run that was stopped and goes on come in the same order.
    places = {cell: place for place, cell in enumerate(cells())}
    for cell in tqdm(list(missing(rows, options.limit)), unit="cell", leave=False):
        rows.append(measure(cell, setting, made((SELECTION_SEED,)), made(tuple(range(options.seeds)))))
        rows.sort(key=lambda row: places.get(cell_of(row), len(places)))
        run.write({"settings": settings, "rows": rows}, indent=None)
    text = markdown(rows, setting.steps)
    print(text, end="")
    if options.write:
        _page.write(PAGE, COMMAND, text)
    if options.plot:
        draw(rows, setting.steps).savefig(options.plot, dpi=120)


if __name__ == "__main__":
    main()
