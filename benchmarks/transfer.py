"""What published rules for another batch size keep on quadratics, and what they do not; exact, in seconds.

    python -m benchmarks.transfer --plot docs/figures/transfer.png

The heavy ball of decay 0.9 at the learning rate 0.02, and the average of decay 0.9 for sign and orthogonal methods,
with a batch 4 times as large and the same number of examples, on curvatures 0.01, 0.1 and 1. For each rule of
`mo.tuning.transfer` and base it has the settings and the relative changes of the stationary variance, of the
convergence per example and of the lag in examples. Prints a table and writes benchmarks/transfer.json; the figure has
the changes at one curvature against the size of the batch.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import numpy as np

import momentum_optax as mo
from examples.command_line import WRITABLE

from . import _run
from ._run import Row

DECAY, RATE, BATCH = 0.9, 0.02, 4
CURVATURES = (0.01, 0.1, 1.0)
CASES = [
    *(("sgd", keep) for keep in ("trajectory", "linear_rate", "square_root_rate", "half_life_tokens")),
    *(("adam", keep) for keep in ("trajectory", "square_root_rate", "half_life_tokens")),
    *(("norm", keep) for keep in ("bound", "bound_fixed_decay", "half_life_tokens")),
]
# The curvature of the figure, at which one rule of SGD follows the path to 1 %, and the batches.
DRAWN_AT, BATCHES = 0.1, np.geomspace(1 / 8, 32, 81)
# Okabe and Ito's colours, told apart under every common colour blindness; dashes for print in grey.
DRAWN = {
    "trajectory": ("decay$^k$, rate times k", "#0072B2", "-"),
    "linear_rate": ("rate times k", "#D55E00", "--"),
    "square_root_rate": ("rate times √k", "#009E73", "-."),
    "half_life_tokens": ("decay$^k$", "#000000", ":"),
}


def settings(base: str, keep: str, batch: float, curvatures: tuple[float, ...]) -> mo.tuning.Transfer:
    """The transferred settings: of the heavy ball for SGD, of the average for the others."""
    rule = mo.heavy_ball(DECAY) if base == "sgd" else mo.ema(DECAY)
    return mo.tuning.transfer(rule, RATE, base=base, keep=keep, batch=batch, curvatures=curvatures)


def row(base: str, keep: str) -> Row:
    """The settings and defects of one rule of transfer; null where the new settings diverge."""
    found = settings(base, keep, BATCH, CURVATURES)
    defects = found.defects
    return {
        "base": base,
        "keep": keep,
        "decay": round(float(mo.analysis.poles(found.rule)[0].real), 12),
        "learning_rate": round(found.learning_rate, 12),
        "invariant": found.invariant,
        "source": found.source,
        "variance": [round(float(x), 9) if math.isfinite(x) else None for x in defects.variance],
        "contraction": [round(float(x), 9) for x in defects.contraction],
        "lag": round(defects.lag, 9),
    }


def plot(path: Path) -> None:
    """Draw what the rules for SGD do to variance, convergence and lag against the size of the batch."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    for keep, (label, color, dashes) in DRAWN.items():
        found = [settings("sgd", keep, float(k), (DRAWN_AT,)).defects for k in BATCHES]
        lines = (
            [1 + d.variance[0] for d in found],
            [1 + d.contraction[0] for d in found],
            [1 + d.lag for d in found],
        )
        for axes, line in zip(panels, lines, strict=True):
            axes.plot(BATCHES, line, color=color, linestyle=dashes, label=label)
    titles = ("stationary variance", "convergence per example", "lag in examples")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="batch, new over old", title=title)
        axes.set_xticks([1 / 8, 1 / 2, 1, 4, 16], ["1/8", "1/2", "1", "4", "16"])
        axes.minorticks_off()
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("new over old")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(
        f"Heavy ball {DECAY}, learning rate {RATE}, curvature {DRAWN_AT}, gradient noise; 1 is kept", fontsize=10
    )
    figure.savefig(path, dpi=120)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    plot: Annotated[Path | None, WRITABLE] = None
    """draw the rules for SGD against the size of the batch to this file"""


def main() -> None:
    """Compute the rows, print them and write the file."""
    run = _run.Run("transfer", __doc__, Options)
    rows = [row(base, keep) for base, keep in CASES]
    for entry in rows:
        print(json.dumps({name: value for name, value in entry.items() if name not in ("invariant", "source")}))
    run.write({"decay": DECAY, "learning_rate": RATE, "batch": BATCH, "curvatures": CURVATURES, "rows": rows})
    if run.options.plot:
        plot(run.options.plot)


if __name__ == "__main__":
    main()
