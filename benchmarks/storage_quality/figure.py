"""The figure of final losses."""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from .._run import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSSES = {"autoencoder": "squared error per image", "gru": "nats per character", "cnn": "nats per image"}
# Okabe and Ito's, told apart under every common colour blindness.
COLORS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#D55E00")


def draw(rows: list[Row]) -> "Figure":
    """The final losses: a panel for each task and decay on a scale of its losses, a point for each seed."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    tasks, decays = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "decay"))
    figure = Figure(figsize=(4.2 * len(tasks), 2.5 * len(decays) + 0.5), layout="constrained")
    panels = figure.subplots(len(decays), len(tasks), squeeze=False)
    for (i, decay), (j, task) in itertools.product(enumerate(decays), enumerate(tasks)):
        here = [row for row in rows if (row["task"], row["decay"]) == (task, decay)]
        _plot_panel([row for row in here if _changes_velocities(row)], panels[i, j])
        panels[i, j].set_ylabel(f"decay {decay:g}" if j == 0 else None)
        left_out = [row["storage"] for row in here if not _changes_velocities(row)]
        note = (
            f"\n{' and '.join(left_out)} by default: no leaf is large enough,\nnothing was compressed"
            if left_out
            else ""
        )
        panels[i, j].set_title(f"{task}: held-out {LOSSES[task]}{note}" if i == 0 else None, fontsize=10)
    return figure


def _changes_velocities(row: Row) -> bool:
    """Whether a row is float32 or keeps velocities in something else: small leaves stay in float32."""
    return row["storage"] == "float32" or any(error != 0 for error in row["tree_errors"])


def _plot_panel(rows: list[Row], axes: "Axes") -> None:
    """Seeds and medians of each storage; what ends far above float32 is an arrow with its range."""
    losses = [np.array(row["losses"], float) for row in rows]
    far = [not np.median(x) <= 1.5 * losses[0].max() for x in losses]
    shown = np.concatenate([x for x, beyond in zip(losses, far, strict=True) if not beyond])
    margin = 0.15 * (shown.max() - shown.min())
    bottom, top = shown.min() - margin, shown.max() + margin
    for x, (values, beyond, color) in enumerate(zip(losses, far, COLORS, strict=False)):
        if beyond:
            axes.annotate("", (x, top), (x, top - margin), arrowprops={"arrowstyle": "->", "color": color})
            text = f"{values.min():.3g} to {values.max():.3g}"
            axes.text(x, top - 1.1 * margin, text, color=color, ha="center", va="top", fontsize=8)
        else:
            axes.plot(np.linspace(x - 0.15, x + 0.15, len(values)), values, "o", color=color, markersize=4)
            axes.hlines(np.median(values), x - 0.3, x + 0.3, color=color)
    names = [row["storage"].replace("reference", "two passes").replace(", ", ",\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set(ylim=(bottom, top), xlim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
