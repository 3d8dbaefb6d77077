"""The figure of final losses."""

from typing import TYPE_CHECKING

import numpy as np

from .._run import Row
from .report import LOSSES, OPTIMIZERS, TITLES, added, by_setting, diverges, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart under every common colour blindness.
COLORS = {"bfloat16": "#0072B2", "int8": "#D55E00", "int8, uint8": "#E69F00", "int4": "#CC79A7"}


def draw(rows: list[Row]) -> "Figure":
    """What each storage adds to the final loss, over the spread of float32: a panel a task, a point for each seed."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(11, 2.6 * -(-len(tasks) // 2) + 0.4), layout="constrained")
    panels = figure.subplots(-(-len(tasks) // 2), 2, squeeze=False).ravel()
    for task, axes in zip(tasks, panels, strict=False):
        _plot_panel([row for row in rows if row["task"] == task], axes)
        axes.set_title(f"{TITLES[task]}: {LOSSES[task]}", fontsize=10)
    for axes in panels[len(tasks) :]:
        axes.remove()
    handles = {line.get_label(): line for axes in panels[: len(tasks)] for line in axes.get_lines()}
    names = [name for name in COLORS if name in handles]
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=9)
    figure.supylabel("loss less float32's of the same seed,\nin standard deviations of float32's", fontsize=9)
    return figure


def _plot_panel(rows: list[Row], axes: "Axes") -> None:
    """Seeds and means of each setting and storage; what diverges is an arrow."""
    settings = by_setting(rows)
    axes.axhspan(-1, 1, color="0.93", zorder=0)
    for x, of in enumerate(settings.values()):
        unit = values(of["float32"], "losses").std(ddof=1)
        for name, at in zip(COLORS, np.linspace(-0.3, 0.3, len(COLORS)), strict=True):
            if name not in of:
                continue
            color = COLORS[name]
            if diverges(of[name], of["float32"]):
                axes.annotate("", (x + at, 3), (x + at, 2), arrowprops={"arrowstyle": "->", "color": color})
                continue
            differences = added(of[name], of["float32"]) / unit
            axes.plot(np.full(len(differences), x + at), differences, "o", color=color, markersize=3, label=name)
            axes.hlines(differences.mean(), x + at - 0.06, x + at + 0.06, color=color)
    most = max(3.0, *(float(np.abs(np.asarray(line.get_ydata(), float)).max()) for line in axes.get_lines()))
    axes.set(ylim=(-1.05 * most, 1.05 * most), xlim=(-0.5, len(settings) - 0.5))
    names = [f"{OPTIMIZERS[base]}\n{decay:g}" for _, base, decay in settings]
    axes.set_xticks(range(len(settings)), names, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
