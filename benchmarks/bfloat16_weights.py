"""Final losses with weights in bfloat16: rounded to nearest, rounded stochastically, and in float32.

    python -m benchmarks.bfloat16_weights

The GRU and the CNN of `storage_quality` train with Nesterov's rule, its velocity in float32, from the same weights, on
the same batches. Their weights are kept in bfloat16 between two steps, rounded by `mo.apply_updates`; losses and
gradients are computed in float32. Learning rates fall with 1 - decay, so that at decay 0.99 most updates are below half
a unit in the last place of their weight. Losses are those of held-out data after the last step.

Seeds of the GRU train in one vectorised program and share the noise of the rounding. Prints a table and writes
benchmarks/bfloat16_weights.json.
"""

import dataclasses
import itertools
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import choice

from . import _run
from ._run import Row
from .storage_quality.bases import learning_rate
from .storage_quality.tasks import TASKS

CHOSEN = ("gru", "cnn")
NAMES = {"gru": "character GRU", "cnn": "MNIST CNN"}
DECAYS = (0.9, 0.99)
WEIGHTS = ("float32", "nearest", "stochastic")


class _State(NamedTuple):
    step: jax.Array
    inner: optax.OptState


class Rounded:
    """Nesterov's rule on weights that are kept in `weights`, as the tasks of `storage_quality` want an optimizer."""

    def __init__(self, weights: str, decay: float, learning_rate: float) -> None:
        self._weights = weights
        self._tx = mo.sgd(learning_rate, decay, nesterov=True)

    def init(self, weights: optax.Params) -> _State:
        """The state before the first step."""
        return _State(jnp.zeros([], jnp.int32), self._tx.init(weights))

    def step(
        self, weights: optax.Params, state: _State, gradients: optax.Updates
    ) -> tuple[optax.Params, _State, jax.Array]:
        """New weights, of values that bfloat16 holds, and two zeros in place of errors of velocities."""
        updates, inner = self._tx.update(gradients, state.inner, weights)
        new = self._applied(weights, updates, state.step)
        return new, _State(state.step + 1, inner), jnp.zeros(2)

    def _applied(self, weights: optax.Params, updates: optax.Updates, step: jax.Array) -> optax.Params:
        if self._weights == "float32":
            return optax.apply_updates(weights, updates)
        narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
        if self._weights == "stochastic":
            new = mo.apply_updates(narrow, updates, rounding="stochastic", step=step)
        else:
            new = mo.apply_updates(narrow, updates)
        # Rounding values of these few bits again changes nothing, and keeps XLA from leaving out the rounding before.
        return jax.tree.map(lambda w: jax.lax.reduce_precision(w.astype(jnp.float32), 8, 7), new)


def measure(tasks: tuple[str, ...], decays: tuple[float, ...], seeds: int, quick: bool) -> list[Row]:
    """One row for each task, decay and kind of weights."""
    rows = []
    cases = list(itertools.product(tasks, decays, WEIGHTS))
    trains = {task: TASKS[task](seeds, quick)[1] for task in tasks}
    for task, decay, weights in tqdm(cases, unit="run", leave=False):
        rate = learning_rate("nesterov", task, decay)
        losses, _ = trains[task](Rounded(weights, decay, rate))  # type: ignore[arg-type] # it has what they call
        rows.append(
            {
                "task": task,
                "decay": decay,
                "learning_rate": rate,
                "weights": weights,
                "losses": [float(x) if np.isfinite(x) else None for x in losses],
            }
        )
    return rows


def against_float32(rows: list[Row], row: Row) -> tuple[float, float]:
    """Mean over seeds of the loss less that with float32 weights, and the standard error of this mean."""
    same = (x for x in rows if (x["task"], x["decay"], x["weights"]) == (row["task"], row["decay"], "float32"))
    difference = np.array(row["losses"], float) - np.array(next(same)["losses"], float)
    return float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference)))


def table(rows: list[Row]) -> str:
    """The rows in print."""
    columns = {
        "task": "{task}",
        "decay": "{decay:g}",
        "weights": "{weights}",
        "loss: mean": "{loss:.4f}",
        "less float32": "{added:.4f}",
        "standard error": "{error:.4f}",
    }
    shown = []
    for row in rows:
        mean, error = against_float32(rows, row)
        shown.append(row | {"loss": np.array(row["losses"], float).mean(), "added": mean, "error": error})
    return _run.table(columns, shown)


def markdown(rows: list[Row]) -> list[str]:
    """The rows of the table in docs/storage.md: losses in float32, and of the others what they add to them."""
    found = {(row["task"], row["decay"], row["weights"]): row for row in rows}
    lines = []
    for task, decay in dict.fromkeys((row["task"], row["decay"]) for row in rows):
        full, *narrow = (found[task, decay, weights] for weights in WEIGHTS)
        added = ("{:+.4f} ± {:.4f}".format(*against_float32(rows, row)) for row in narrow)
        lines.append(f"| {NAMES[task]} | {decay} | {np.mean(full['losses']):.4f} | {' | '.join(added)} |")
    return lines


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    tasks: tuple[Annotated[str, choice(CHOSEN)], ...] = CHOSEN
    """what to train"""
    quick: bool = False
    """decay 0.9, a few steps, 2 seeds: to see that it runs"""


def main() -> None:
    """Train every row, print the table and write the file."""
    run = _run.Run("bfloat16_weights", __doc__, Options)
    decays, seeds = (DECAYS[:1], 2) if run.options.quick else (DECAYS, 5)
    rows = measure(run.options.tasks, decays, seeds, run.options.quick)
    print(table(rows))
    print("\n".join(["", "For docs/storage.md:", *markdown(rows)]))
    run.write({"rows": rows})


if __name__ == "__main__":
    main()
