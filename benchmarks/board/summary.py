"""What the rows of the board say: losses, differences to the base from the same seeds, steps to a stated loss."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .._language import WORST
from .._page import table
from .._paired import Difference, difference, holm
from .._run import Row
from .cells import BASES, Cell

# The stated loss, in nats per token.
TARGET = 2.3


class Line(NamedTuple):
    """A cell with its results.

    Attributes:
      cell: Which.
      rate: The chosen learning rate.
      at_edge: Whether that is the first or the last of those tried.
      losses: Final test losses, one per seed.
      gap: Their difference to those of the reference; None for the reference itself.
      adjusted: Its p-value after Holm's correction for all differences of the board.
      steps: Until the test loss is `TARGET`, mean over seeds; None where a seed never gets there.
    """

    cell: Cell
    rate: float
    at_edge: bool
    losses: np.ndarray
    gap: Difference | None
    adjusted: float | None
    steps: float | None


def cell_of(row: Row) -> Cell:
    """The cell that a row is of."""
    return Cell(row["base"], row["memory"], row["storage"])


def steps_to(target: float, curve: Sequence[float], steps: int) -> float | None:
    """The step at which a curve, of values at equal distances to `steps`, first is at the target; None if nowhere.

    Values between two marks are on the line through them, those before the first mark on the line from `WORST`.
    """
    below = np.flatnonzero(np.asarray(curve) <= target)
    if not len(below):
        return None
    i, each = int(below[0]), steps / len(curve)
    before = curve[i - 1] if i else WORST
    return each * (i + (before - target) / (before - curve[i]))


def lines(rows: Sequence[Row], steps: int) -> list[Line]:
    """The results of all rows whose reference is among them, in their order, for runs of so many steps."""
    losses = {cell_of(row): np.array([curve[-1] for curve in row["curves"]]) for row in rows}
    kept = [row for row in rows if cell_of(row).reference in losses]
    gaps = {
        cell: difference(losses[cell], losses[cell.reference]) for cell in map(cell_of, kept) if cell != cell.reference
    }
    adjusted = dict(zip(gaps, holm([gap.p for gap in gaps.values()]), strict=True))
    found = []
    for row in kept:
        cell, rates = cell_of(row), list(cell_of(row).rates)
        needed = [steps_to(TARGET, curve, steps) for curve in row["curves"]]
        reached = [step for step in needed if step is not None]
        found.append(
            Line(
                cell,
                row["learning_rate"],
                row["learning_rate"] in (rates[0], rates[-1]),
                losses[cell],
                gaps.get(cell),
                adjusted.get(cell),
                float(np.mean(reached)) if len(reached) == len(needed) else None,
            )
        )
    return found


def is_clear(line: Line) -> bool:
    """Whether the difference to the reference is significant at 5 % after the correction."""
    return line.adjusted is not None and line.adjusted < 0.05


def name(cell: Cell) -> str:
    """What differs from the reference."""
    return cell.memory if cell.memory != "none" else cell.storage if cell.storage != "float32" else "the base itself"


def cells_of(line: Line) -> list[str]:
    """The line in a table; a clear difference in bold."""
    gap, p = "", ""
    if line.gap is not None and line.adjusted is not None:
        gap = f"{line.gap.mean:+.4f} ({line.gap.low:+.4f} to {line.gap.high:+.4f})"
        gap = f"**{gap}**" if is_clear(line) else gap
        p = f"{line.adjusted:.2g}" if line.adjusted >= 0.001 else "< 0.001"
    return [
        name(line.cell),
        f"{line.rate:.3g}{' (edge)' if line.at_edge else ''}",
        f"{line.losses.mean():.4f} ± {line.losses.std(ddof=1):.4f}",
        gap,
        p,
        "" if line.steps is None else f"{line.steps:.0f}",
    ]


def markdown(rows: Sequence[Row], steps: int) -> str:
    """A table for each base that is compared with anything, with headings."""
    head = ["", "rate", "test loss", "difference (95 %)", "p, Holm", f"steps to {TARGET:g}"]
    found, parts = lines(rows, steps), []
    for base in BASES:
        here = [line for line in found if line.cell.base == base]
        if len(here) > 1:
            parts.append(f"### {base}\n\n" + table(head, [cells_of(line) for line in here]))
    return "\n".join(parts)
