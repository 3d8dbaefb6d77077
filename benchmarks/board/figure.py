"""The figure of the board: every difference to its base with its interval."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._run import Row
from .cells import BASES
from .summary import Line, is_clear, lines, name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart under every common colour blindness: of memories, and of storages.
MEMORY, STORAGE = "#0072B2", "#D55E00"


def draw(rows: Sequence[Row], steps: int) -> "Figure":
    """A panel for each base on one scale; a filled point is significant after the correction."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    found = [line for line in lines(rows, steps) if line.gap is not None]
    bases = [base for base in BASES if any(line.cell.base == base for line in found)]
    names = list(dict.fromkeys(name(line.cell) for line in found))
    figure = Figure(figsize=(2.4 * len(bases) + 2, 0.32 * len(names) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(bases), sharey=True, squeeze=False)[0]
    for axes, base in zip(panels, bases, strict=True):
        draw_panel(axes, [line for line in found if line.cell.base == base], names)
        axes.set_title(base, fontsize=10)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("test loss less that of the base\nfrom the same seeds, nats per byte; left is better", fontsize=9)
    return figure


def draw_panel(axes: "Axes", found: Sequence[Line], names: Sequence[str]) -> None:
    """Differences of one base; those far outside the others are arrows at the edge with their number."""
    gaps = [line.gap for line in found if line.gap is not None]
    # Three times the median reach, so that one failure does not flatten the others.
    reach = 3 * float(np.median([max(abs(gap.low), abs(gap.high)) for gap in gaps]))
    for line, gap in zip(found, gaps, strict=True):
        y, color = names.index(name(line.cell)), MEMORY if line.cell.storage == "float32" else STORAGE
        if abs(gap.mean) > reach:
            side = np.sign(gap.mean)
            axes.annotate(
                "", (side * reach, y), (0.8 * side * reach, y), arrowprops={"arrowstyle": "->", "color": color}
            )
            side_of_text = "right" if side > 0 else "left"
            place = (0.75 * side * reach, y, f"{gap.mean:+.3f}")
            axes.text(*place, ha=side_of_text, va="center", fontsize=8, color=color)
        else:
            axes.plot([gap.low, gap.high], [y, y], color=color, linewidth=1.5)
            axes.plot(gap.mean, y, "o", color=color, markersize=5, markerfacecolor=color if is_clear(line) else "white")
    axes.axvline(0, color="0.5", linewidth=0.8)
    axes.set_xlim(-1.05 * reach, 1.05 * reach)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
