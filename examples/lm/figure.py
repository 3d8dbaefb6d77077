"""The figure of a run: losses above, telemetry below."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .training import History

# Okabe and Ito's colours, told apart under every common colour blindness; dashes for print in grey.
POINTS = {
    "weights": ("weights", "#0072B2", "-"),
    "behind": ("point of the rule behind", "#D55E00", "--"),
    "average": ("average of the weights", "#009E73", ":"),
}
VELOCITIES = (("#000000", "-"), ("#E69F00", "--"), ("#CC79A7", "-."))


def plot(history: "History", path: Path, title: str) -> None:
    """Write the curves of a run to a PNG."""
    # Not pyplot: a bare figure is drawn by Agg and changes no backend and no setting for the rest of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    grid = figure.add_gridspec(3, 1, height_ratios=(4, 1.3, 1.3))
    loss = figure.add_subplot(grid[0], title=title)
    cosine, rate = (figure.add_subplot(grid[row], sharex=loss) for row in (1, 2))
    _plot_losses(history, loss)
    _plot_telemetry(history, cosine, rate)
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.label_outer()
    figure.savefig(path, format="png", dpi=110)


def _plot_losses(history: "History", axes: "Axes") -> None:
    axes.plot(np.arange(1, len(history.loss) + 1), history.loss, color="0.75", linewidth=0.8, label="training batch")
    steps = [evaluation["step"] for evaluation in history.held_out]
    for name, (label, color, dashes) in POINTS.items():
        if name in history.test:
            values = [evaluation[name] for evaluation in history.held_out]
            axes.plot(steps, values, dashes, color=color, marker=".", label=f"held out, {label}: {values[-1]:.3f}")
    axes.set_ylabel("nats per character")
    axes.legend(frameon=False)


def _plot_telemetry(history: "History", cosine: "Axes", rate: "Axes") -> None:
    from matplotlib.ticker import LogLocator  # noqa: PLC0415

    steps = [figures["step"] for figures in history.telemetry]
    names = [name for name in history.telemetry[0] if name.startswith("cosine")]
    for name, (color, dashes) in zip(names, VELOCITIES, strict=False):
        cosine.plot(steps, [figures[name] for figures in history.telemetry], color=color, linestyle=dashes)
    cosine.set(ylabel="cos(g, v)")
    rate.plot(steps, [figures["effective_learning_rate"] for figures in history.telemetry], color="#009E73")
    rate.set(xlabel="step", ylabel="|update|\n/ |gradient|", yscale="log")
    # Of a decade or less there are else either no labels or too many.
    rate.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    rate.yaxis.set_major_formatter("{x:g}")
    rate.minorticks_off()
