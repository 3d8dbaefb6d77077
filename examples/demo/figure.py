"""The figure of the demo."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .cnn import History
from .race import RaceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart under every common colour blindness; dashes for print in grey.
STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#0072B2", "-"), ("#CC79A7", "-."), ("#009E73", ":"))


def plot(history: History, results: Sequence[RaceResult], path: Path, title: str = "CNN") -> None:
    """Write the curves to a PNG: the race, if it was run, and smaller beside it the network with its telemetry."""
    # Not pyplot: a bare figure is drawn by Agg and changes no backend and no setting for the rest of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(11.6 if results else 4.4, 6.0), layout="constrained")
    widths = (2, 1) if results else (1,)
    grid = figure.add_gridspec(4, len(widths), width_ratios=widths, wspace=0.06, height_ratios=(3, 3, 2, 2))
    if results:
        _plot_race(results, figure.add_subplot(grid[:, 0]))
    loss = figure.add_subplot(grid[0, -1])
    loss.set_title(title, fontsize="medium")
    _plot_cnn(history, loss, *(figure.add_subplot(grid[row, -1], sharex=loss) for row in (1, 2, 3)))
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=110)


def _plot_cnn(history: History, loss: "Axes", accuracy: "Axes", cosine: "Axes", rate: "Axes") -> None:
    epochs, percent = np.arange(1, len(history.loss) + 1), 100 * np.asarray(history.accuracy)
    loss.semilogy(epochs, history.loss, "o-", color="#0072B2")
    loss.set_ylabel("training\nloss (nats)")
    accuracy.plot(epochs, percent, "s-", color="#D55E00")
    accuracy.text(epochs[-1], percent[-1], f"\n{percent[-1]:.1f} %", ha="right", va="top")
    accuracy.set_ylabel("held-out\naccuracy (%)")
    measured = [figures["epoch"] for figures in history.telemetry]
    names = [name for name in (history.telemetry[0] if measured else ()) if name.startswith("cosine")]
    for name, (color, dashes) in zip(names, STYLES, strict=False):
        cosine.plot(measured, [figures[name] for figures in history.telemetry], color=color, linestyle=dashes)
    cosine.set_ylabel("cos(g, v)")
    rate.plot(measured, [figures["effective_learning_rate"] for figures in history.telemetry], color="#009E73")
    rate.set(xlabel="epoch", ylabel="|update|\n/ |gradient|")
    rate.locator_params(axis="x", integer=True)
    for axes in (loss, accuracy, cosine):
        axes.tick_params(labelbottom=False)


def _plot_race(results: Sequence[RaceResult], axes: "Axes") -> None:
    epochs = np.arange(1, results[0].test.shape[-1] + 1)
    for result, (color, dashes) in zip(results, itertools.cycle(STYLES), strict=False):
        low, middle, high = (of_seeds(result.curves, axis=0) for of_seeds in (np.min, np.median, np.max))
        label = f"{result.rule.replace('_', ' ')}, rate {result.rates[result.choice]:.3g}: {middle[-1]:.2f}"
        axes.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(epochs, middle, color=color, linestyle=dashes, linewidth=2, label=label)
    axes.set(yscale="log", xlabel="epoch", ylabel="held-out squared error per image")
    axes.set_title(f"Deep autoencoder, every rate tuned: median and range, seeds: {results[0].validation.shape[1]}")
    _mark_lead(results, axes)
    axes.set_ylim(bottom=0.6 * axes.get_ylim()[0])  # room for the legend where no curve begins
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0) if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower left", frameon=False)


def _mark_lead(results: Sequence[RaceResult], axes: "Axes") -> None:
    """Mark when the median of the best rule is where that of the first one, without momentum, ends."""
    first, best = results[0], min(results, key=lambda result: float(np.median(result.curves[:, -1])))
    end, median = (np.median(curves, axis=0) for curves in (first.curves[:, -1], best.curves))
    if best is first or not (median < end).any():
        return
    epoch = int(np.argmax(median < end)) + 1
    axes.plot((epoch, len(median)), (end, end), "o:", color="0.35", markersize=5, linewidth=1.2)
    text = f"{best.rule.replace('_', ' ')} at epoch {epoch} of {len(median)}\nis where {first.rule} ends"
    axes.annotate(text, (epoch, end), (-6, -8), textcoords="offset points", ha="right", va="top", color="0.25")
