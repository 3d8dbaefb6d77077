"""Five rules on an ill-conditioned network: the race of the demo, its curves kept, and a figure of three of them.

    python -m benchmarks.race --plot docs/figures/momentum.png

Trains the deep autoencoder of 8x8 digits of `make demo` with plain SGD and four momentum rules. Each tries six learning
rates, the best on validation images is taken, and the errors are those of images that neither has seen. Prints the
table of the demo and writes benchmarks/race.json.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import numpy as np

from examples.command_line import WRITABLE
from examples.demo.race import RaceResult, race, table

from . import _run
from ._run import Row

# Okabe and Ito's, told apart under every common colour blindness; dashes for print in grey.
DRAWN = {
    "sgd": ("plain SGD", "#000000", "-"),
    "heavy_ball": ("heavy ball, 0.9", "#D55E00", "--"),
    "nesterov": ("Nesterov, 0.9", "#0072B2", "-"),
}


def rows(results: list[RaceResult]) -> list[Row]:
    """One for each rule: its learning rate, and the test errors after each epoch, one list per seed."""
    return [
        {
            "rule": result.rule,
            "learning_rate": float(result.rates[result.choice]),
            "effective_rate": float(result.rates[result.choice] * result.gain),
            "errors": [[round(float(error), 6) for error in seed] for seed in result.curves],
        }
        for result in results
    ]


def plot(rows: list[Row], path: Path) -> None:
    """Draw median and range over seeds of plain SGD, the heavy ball and Nesterov."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for row in (row for row in rows if row["rule"] in DRAWN):
        label, color, dashes = DRAWN[row["rule"]]
        errors = np.array(row["errors"])
        epochs, median = np.arange(1, errors.shape[1] + 1), np.median(errors, 0)
        axes.fill_between(epochs, errors.min(0), errors.max(0), color=color, alpha=0.15, linewidth=0)
        axes.plot(epochs, median, color=color, linestyle=dashes, label=f"{label}: {median[-1]:.2f}")
    axes.set(yscale="log", xlabel="epoch", ylabel="held-out error per image", ylim=(0.85, 5), xlim=(1, len(median)))
    axes.set_yticks([1, 1.5, 2, 3, 5], ["1", "1.5", "2", "3", "5"])
    axes.minorticks_off()
    axes.set_title(f"Deep autoencoder, learning rates tuned; median and range of {len(errors)} seeds", fontsize=10)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="after the last epoch", frameon=False)
    figure.savefig(path, dpi=120)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    plot: Annotated[Path | None, WRITABLE] = None
    """draw three of the rules to this file"""
    quick: bool = False
    """two epochs, two seeds: to see that it runs"""


def main() -> None:
    """Run the race, print its table and write the file."""
    run = _run.Run("race", __doc__, Options)
    results = race(seeds=2, epochs=2) if run.options.quick else race()
    print(table(results))
    run.write({"rows": rows(results)}, indent=None)
    if run.options.plot:
        plot(rows(results), run.options.plot)


if __name__ == "__main__":
    main()
