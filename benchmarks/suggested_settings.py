"""The settings of `tuning.suggest` against the best of a grid, in steps to a target.

    python -m benchmarks.suggested_settings

Nesterov's rule on whole batches, from the same start: with the learning rate and decay that `suggest` gives, and with
each of 100 pairs, ten rates between 1/20 and 20 over the largest curvature at the start times ten decays. What counts
are the steps until the loss is below a target for the first time.

- logistic regression, odd against even digits, 65 coefficients, with an L2 penalty: the Hessian is at most X'X/4n plus
  the penalty, and at least the penalty. Targets are the excess over the minimum as a share of that at the start; the
  minimum is found by Newton's method.
- the autoencoder of the demo on 1197 digits, five seeds of its weights. Targets are losses in nats per image: it
  begins between 50 and 100, predicting the mean image is worth 27.1, and the best of the grid ends near 20.

Prints a table and writes benchmarks/suggested_settings.json. Takes ten minutes on two cores.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.demo.autoencoder import cross_entropy, problem
from examples.demo.data import flat_digits

from . import _run
from ._run import Row

DECAYS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
RATES = np.geomspace(0.05, 20, 10)  # over the largest curvature at the start
PENALTIES = (1e-2, 1e-3, 1e-4)
SHARES = (1e-2, 1e-4, 1e-6)
LOSSES = (25.0, 23.0, 22.0)
SEEDS = (0, 1, 2, 3, 4)

# From parameters and batch.
Loss: TypeAlias = Callable[..., jax.Array]
# A loss, initial parameters and a batch.
Task: TypeAlias = tuple[Loss, optax.Params, optax.Params]
Carry: TypeAlias = tuple[optax.Params, optax.OptState]


def losses_of(
    loss: Loss, params: optax.Params, batch: optax.Params, steps: int
) -> Callable[[float, float], np.ndarray]:
    """A compiled function from learning rate and decay to the losses before each of `steps` steps."""

    @jax.jit
    def losses(rate: jax.Array, decay: jax.Array) -> jax.Array:
        tx = mo.scale_by_momentum(mo.nesterov(decay))

        def step(carry: Carry, _: None) -> tuple[Carry, jax.Array]:
            x, state = carry
            value, g = jax.value_and_grad(loss)(x, batch)
            u, state = tx.update(g, state)
            return (jax.tree.map(lambda p, d: p - rate * d, x, u), state), value

        _, values = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
        return values

    return lambda rate, decay: np.asarray(losses(rate, decay), np.float64)


def first(losses: np.ndarray, target: float) -> int | None:
    """Steps until the loss is at the target; None if it never is."""
    there = np.flatnonzero(losses <= target)
    return int(there[0]) if len(there) else None


def compare(task: Task, steps: int, targets: dict[str, float], bar: tqdm) -> list[Row]:
    """One row for each target."""
    loss, params, batch = task
    suggested = mo.tuning.suggest(loss, params, batch)
    L = mo.tuning.estimate_curvature(loss, params, batch).L
    losses = losses_of(loss, params, batch, steps)
    grid = {}
    for rate in RATES / L:
        for decay in DECAYS:
            grid[rate, decay] = losses(rate, decay)
            bar.update()
    ours = losses(suggested.learning_rate, suggested.decay)
    rows = []
    for name, target in targets.items():
        counts = {pair: count for pair, curve in grid.items() if (count := first(curve, target)) is not None}
        (rate, decay), best = min(counts.items(), key=lambda item: item[1])
        mine = first(ours, target)
        rows.append(
            {
                "target": name,
                "learning_rate": suggested.learning_rate,
                "decay": suggested.decay,
                "steps": mine,
                "best_learning_rate": float(rate),
                "best_decay": decay,
                "best_steps": best,
                "reached_by": len(counts),
                "ratio": None if mine is None else round(mine / best, 3),
            }
        )
    return rows


def logistic(penalty: float) -> Task:
    """The loss, zero coefficients, and inputs with labels."""
    images, digits = flat_digits()
    images, labels = images.astype(np.float64), digits % 2 * 2.0 - 1.0
    inputs = np.column_stack([images - images.mean(0), np.ones(len(images))])

    def loss(w: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + penalty / 2 * w @ w

    return loss, jnp.zeros(65), (jnp.asarray(inputs), jnp.asarray(labels))


def minimum(task: Task) -> float:
    """The least loss, by Newton's method."""
    loss, w, batch = task
    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    for _ in range(30):
        w = w - jnp.linalg.solve(hessian(w, batch), gradient(w, batch))
    return float(loss(w, batch))


def autoencoder(seed: int) -> Task:
    """The loss, weights and images."""
    weights, train, *_ = problem(flat_digits()[0], 1, (0, seed))
    return cross_entropy, jax.tree.map(jnp.asarray, weights), jnp.asarray(train)


def measure(penalties: tuple[float, ...], seeds: tuple[int, ...]) -> list[Row]:
    """All rows."""
    rows = []
    with tqdm(total=100 * (len(penalties) + len(seeds)), unit="run", leave=False) as bar:
        # float64 for the logistic losses, whose excess goes to a millionth; the network trains in float32.
        with jax.enable_x64(True):
            for penalty in penalties:
                task = logistic(penalty)
                least = minimum(task)
                excess = float(task[0](*task[1:])) - least
                targets = {f"excess {share:g}": least + share * excess for share in SHARES}
                name = f"logistic regression, penalty {penalty:g}"
                rows += [{"task": name} | row for row in compare(task, 2000, targets, bar)]
        for seed in seeds:
            targets = {f"loss {loss:g}": loss for loss in LOSSES}
            rows += [
                {"task": f"autoencoder, seed {seed}"} | row for row in compare(autoencoder(seed), 600, targets, bar)
            ]
    return rows


def table(rows: list[Row]) -> str:
    """The rows in print."""
    columns = {
        "task": "{task}",
        "target": "{target}",
        "suggested: rate, decay": "{learning_rate:.4g}, {decay:.3f}",
        "steps": "{steps!s}",
        "grid: rate, decay": "{best_learning_rate:.4g}, {best_decay:g}",
        "best steps": "{best_steps!s}",
        "ratio": "{ratio!s}",
    }
    return _run.table(columns, rows)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    quick: bool = False
    """logistic regression with the largest penalty only"""


def main() -> None:
    """Run everything, print the table, write the file."""
    run = _run.Run("suggested_settings", __doc__, Options)
    rows = measure(PENALTIES[:1], ()) if run.options.quick else measure(PENALTIES, SEEDS)
    print(table(rows))
    run.write({"rows": rows})


if __name__ == "__main__":
    main()
