"""How much slower than the best of a grid are the settings of `tuning.suggest`?

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

import argparse
import json
import os
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import momentum_optax as mo
from examples import demo

DECAYS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995)
RATES = np.geomspace(0.05, 20, 10)  # over the largest curvature at the start
PENALTIES = (1e-2, 1e-3, 1e-4)
SHARES = (1e-2, 1e-4, 1e-6)
LOSSES = (25.0, 23.0, 22.0)
SEEDS = (0, 1, 2, 3, 4)


def run(loss: Any, params: Any, batch: Any, steps: int) -> Any:
    """A compiled function from learning rate and decay to the losses before each of so many steps."""

    @jax.jit
    def losses(rate: Any, decay: Any) -> Any:
        tx = mo.scale_by_momentum(mo.nesterov(decay))

        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            value, g = jax.value_and_grad(loss)(x, batch)
            u, state = tx.update(g, state)
            return (jax.tree.map(lambda p, d: p - rate * d, x, u), state), value

        return jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[1]

    return lambda rate, decay: np.asarray(losses(rate, decay), np.float64)


def first(losses: np.ndarray, target: float) -> int | None:
    """Steps until the loss is at the target; None if it never is."""
    there = np.flatnonzero(losses <= target)
    return int(there[0]) if len(there) else None


def compare(problem: Any, steps: int, targets: dict[str, float], bar: Any) -> list[dict[str, Any]]:
    """One row for each target."""
    loss, params, batch = problem
    suggested = mo.tuning.suggest(loss, params, batch)
    L = mo.tuning.estimate_curvature(loss, params, batch).L
    losses = run(loss, params, batch, steps)
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


def logistic(penalty: float) -> tuple[Any, Any, Any]:
    """The loss, zero coefficients, and inputs with labels."""
    digits = demo.load_digits()
    images = np.concatenate([digits.images, digits.test_images]).reshape(-1, 64).astype(np.float64)
    labels = np.concatenate([digits.labels, digits.test_labels]) % 2 * 2.0 - 1.0
    inputs = np.column_stack([images - images.mean(0), np.ones(len(images))])

    def loss(w: Any, batch: Any) -> Any:
        x, y = batch
        return jnp.mean(jax.nn.softplus(-y * (x @ w))) + penalty / 2 * w @ w

    return loss, jnp.zeros(65), (jnp.asarray(inputs), jnp.asarray(labels))


def minimum(problem: Any) -> float:
    """The least loss, by Newton's method."""
    loss, w, batch = problem
    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    for _ in range(30):
        w = w - jnp.linalg.solve(hessian(w, batch), gradient(w, batch))
    return float(loss(w, batch))


def autoencoder(seed: int) -> tuple[Any, Any, Any]:
    """The loss, weights and images."""
    digits = demo.load_digits()
    images = np.concatenate([digits.images, digits.test_images]).reshape(-1, 64)
    weights, train, *_ = demo._race_seed(images, 1, (0, seed))
    return lambda w, x: demo._errors(w, x)[0], jax.tree.map(jnp.asarray, weights), jnp.asarray(train)


def measure(penalties: tuple[float, ...], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """All rows."""
    rows = []
    with tqdm(total=100 * (len(penalties) + len(seeds)), unit="run", leave=False) as bar:
        # float64 for the logistic losses, whose excess goes to a millionth; the network trains in float32.
        with jax.enable_x64(True):
            for penalty in penalties:
                problem = logistic(penalty)
                least = minimum(problem)
                excess = float(problem[0](*problem[1:])) - least
                targets = {f"excess {share:g}": least + share * excess for share in SHARES}
                name = f"logistic regression, penalty {penalty:g}"
                rows += [{"task": name} | row for row in compare(problem, 2000, targets, bar)]
        for seed in seeds:
            targets = {f"loss {loss:g}": loss for loss in LOSSES}
            rows += [
                {"task": f"autoencoder, seed {seed}"} | row for row in compare(autoencoder(seed), 600, targets, bar)
            ]
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in print."""
    lines = [f"{'task':38}{'target':>14}{'suggested: rate, decay':>26}{'steps':>7}"]
    lines[0] += f"{'grid: rate, decay':>22}{'steps':>7}{'ratio':>8}"
    for row in rows:
        ours = f"{row['learning_rate']:.4g}, {row['decay']:.3f}"
        best = f"{row['best_learning_rate']:.4g}, {row['best_decay']:g}"
        lines.append(
            f"{row['task']:38}{row['target']:>14}{ours:>26}{row['steps']!s:>7}{best:>22}{row['best_steps']:>7}"
            f"{row['ratio']!s:>8}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = pathlib.Path(__file__).with_suffix(".json")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="logistic regression with the largest penalty only")
    arguments = parser.parse_args()
    rows = measure(PENALTIES[:1], ()) if arguments.quick else measure(PENALTIES, SEEDS)
    print(table(rows))
    versions = {"python": platform.python_version(), "jax": jax.__version__, "momentum_optax": mo.__version__}
    surroundings = {"command": f"python -m benchmarks.{pathlib.Path(__file__).stem}", "versions": versions}
    surroundings |= {"device": jax.devices()[0].device_kind, "cpu_cores": os.cpu_count()}
    arguments.output.write_text(json.dumps(surroundings | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
