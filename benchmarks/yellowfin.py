"""YellowFin without any tuning against settings from a search.

    python -m benchmarks.yellowfin

- quadratics of 20 curvatures, geometrically between L/kappa and L, without noise: steps until the distance to the
  optimum is a thousandth of that at the start, at most 20000.
- the autoencoder of the demo, 120 epochs of batches of 32 digits; and a classifier of digits with one hidden layer of
  64, 30 epochs: squared error per image and cross-entropy on images held out for the test, at the end, three seeds.

YellowFin with its defaults; with a factor on its rate out of five; the heavy ball with a fixed pair that is common,
rate 0.1 and momentum 0.9; and with the best of a grid. Factor and grid are chosen by the steps of the quadratic itself,
or by the mean over seeds on images held out for validation. Adam at its usual 1e-3 and Optax's MoMo, which takes its
step from the value of the loss and a lower bound of 0, are there for scale.

Prints a table and writes benchmarks/yellowfin.json. Takes two minutes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.demo.autoencoder import cross_entropy, problem, squared_error, stacked
from examples.demo.data import flat_digits

from . import _run
from ._run import Row

FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0)
# Of the heavy ball: rates are over L, or what they would be at a decay of 0.9 with the same effective rate.
QUADRATIC = (np.geomspace(0.01, 3, 12), (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95))
NETWORK = ((0.001, 0.003, 0.01, 0.03, 0.1, 0.3), (0.0, 0.9, 0.99))
SEEDS = 3
MOST = 20000


def heavy_ball(rate: jax.Array, decay: jax.Array) -> optax.GradientTransformation:
    """The heavy ball of two traced numbers."""
    return optax.chain(mo.scale_by_momentum(mo.heavy_ball(decay)), optax.scale_by_learning_rate(rate))


# A maker of optimizers, and the arguments to try.
Candidate: TypeAlias = tuple[Callable[..., optax.GradientTransformation], Sequence[tuple[float, ...]]]
Loss: TypeAlias = Callable[..., jax.Array]
# The trees of each seed; the loss that is trained and the one that is reported.
Task: TypeAlias = tuple[list[optax.Params], Loss, Loss]


# Of a run on a quadratic: the point, the state and the number of the step.
Carry: TypeAlias = tuple[jax.Array, optax.OptState, int | jax.Array]


def candidates(grid: list[tuple[float, float]]) -> dict[str, Candidate]:
    """The optimizers that are compared, with a grid of rates and decays."""
    return {
        "YellowFin, untuned": (mo.contrib.yellowfin, [(1.0,)]),
        "YellowFin, factor tuned": (mo.contrib.yellowfin, [(factor,) for factor in FACTORS]),
        "heavy ball, 0.1 and 0.9": (heavy_ball, [(0.1, 0.9)]),
        "heavy ball, tuned": (heavy_ball, grid),
        "Adam, 1e-3": (optax.adam, [(1e-3,)]),
        "MoMo, untuned": (optax.contrib.momo, [(1.0,)]),
    }


def quadratic(kappa: float, L: float) -> Callable[[Candidate], list[int]]:
    """The steps that each setting of a candidate needs."""
    curvature = jnp.asarray(np.geomspace(L / kappa, L, 20), jnp.float32)
    start = jnp.ones(20)
    near: jax.Array = 1e-3 * jnp.linalg.norm(start)

    def of(candidate: Candidate) -> list[int]:
        make, settings = candidate

        def run(setting: jax.Array) -> jax.Array:
            tx = optax.with_extra_args_support(make(*setting))

            def going(carry: Carry) -> jax.Array:
                x, _, t = carry
                far: jax.Array = jnp.linalg.norm(x)
                return (t < MOST) & (far > near) & (far < 1e6)

            def step(carry: Carry) -> Carry:
                x, state, t = carry
                u, state = tx.update(curvature * x, state, x, value=jnp.sum(curvature * x * x) / 2)
                return x + u, state, t + 1

            begin: Carry = (start, tx.init(start), 0)
            x, _, t = jax.lax.while_loop(going, step, begin)
            return jnp.where(jnp.linalg.norm(x) <= near, t, MOST + 1)

        return [int(t) for t in jax.jit(jax.vmap(run))(jnp.asarray(settings, jnp.float32))]

    return of


def autoencoder(quick: bool) -> Task:
    """Weights and data of each seed, the loss that is trained and the one that is reported."""
    images, _ = flat_digits()
    seeds = [problem(images, 2 if quick else 120, (0, seed)) for seed in range(SEEDS)]
    each = [(w, (train,), order.reshape(-1, order.shape[-1]), (v,), (t,)) for w, train, order, v, t in seeds]
    return each, cross_entropy, squared_error


def classifier(quick: bool) -> Task:
    """The same for a network with one hidden layer."""
    images, labels = flat_digits()
    each = []
    for seed in range(SEEDS):
        rng = np.random.default_rng((3, seed))
        rows = rng.permutation(len(images))
        parts = [(images[r], labels[r]) for r in np.split(rows, [-600, -300])]
        sizes = itertools.pairwise((64, 64, 10))
        weights = [(np.float32(rng.normal(size=s) * s[0] ** -0.5), np.zeros(s[1], np.float32)) for s in sizes]
        steps = len(parts[0][0]) // 32
        order = [rng.permutation(len(parts[0][0]))[: steps * 32].reshape(-1, 32) for _ in range(2 if quick else 30)]
        each.append((weights, parts[0], np.concatenate(order), *parts[1:]))

    def loss(weights: optax.Params, x: jax.Array, y: jax.Array) -> jax.Array:
        (a, b), (c, d) = weights
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(jax.nn.relu(x @ a + b) @ c + d, y))

    return each, loss, loss


def network(task: Task) -> Callable[[Candidate], tuple[np.ndarray, np.ndarray]]:
    """Validation and test losses of each setting of a candidate, of shape (settings, seeds)."""
    each, loss, report = task
    data = stacked(each)

    def of(candidate: Candidate) -> tuple[np.ndarray, np.ndarray]:
        make, settings = candidate

        def run(setting: jax.Array, data: optax.Params) -> tuple[jax.Array, jax.Array]:
            weights, train, order, validation, test = data
            tx = optax.with_extra_args_support(make(*setting))

            def step(
                carry: tuple[optax.Params, optax.OptState], rows: jax.Array
            ) -> tuple[tuple[optax.Params, optax.OptState], None]:
                weights, state = carry
                value, gradient = jax.value_and_grad(loss)(weights, *(x[rows] for x in train))
                updates, state = tx.update(gradient, state, weights, value=value)
                return (optax.apply_updates(weights, updates), state), None

            (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), order)
            return report(weights, *validation), report(weights, *test)

        every = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))
        validation, test = jax.device_get(every(jnp.asarray(settings, jnp.float32), data))
        return np.nan_to_num(validation, nan=np.inf), np.nan_to_num(test, nan=np.inf)

    return of


def measure(quick: bool) -> list[Row]:
    """One row for each task and candidate."""
    rows = []
    problems = [(10.0, 1.0)] if quick else list(itertools.product((10.0, 100.0, 1000.0), (0.01, 1.0, 100.0)))
    tasks = {"autoencoder": autoencoder, "classifier": classifier}
    with tqdm(total=6 * (len(problems) + len(tasks)), unit="row", leave=False) as bar:
        for kappa, L in problems:
            steps_of = quadratic(kappa, L)
            for name, candidate in candidates(
                [(rate / L, decay) for rate, decay in itertools.product(*QUADRATIC)]
            ).items():
                steps = steps_of(candidate)
                best = int(np.argmin(steps))
                row = {"task": f"quadratic, kappa {kappa:g}, L {L:g}", "way": name, "setting": candidate[1][best]}
                rows.append(row | {"steps": steps[best] if steps[best] <= MOST else None})
                bar.update()
        for task, load in tasks.items():
            losses_of = network(load(quick))
            pairs = [(rate * (1 - decay) / 0.1, decay) for rate, decay in itertools.product(*NETWORK)]
            for name, candidate in candidates(pairs).items():
                validation, test = losses_of(candidate)
                best = int(np.argmin(validation.mean(1)))
                losses = [round(float(x), 5) if np.isfinite(x) else None for x in test[best]]
                rows.append({"task": task, "way": name, "setting": candidate[1][best], "losses": losses})
                bar.update()
    return rows


def table(rows: list[Row]) -> str:
    """The rows in print."""
    lines = []
    for row in rows:
        setting = ", ".join(f"{x:.3g}" for x in row["setting"])
        if "steps" in row:
            result = f"{row['steps']} steps" if row["steps"] else f"not in {MOST} steps"
        else:
            losses = [np.inf if x is None else x for x in row["losses"]]
            result = f"{np.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"
        lines.append(f"{row['task']:32}{row['way']:26}{setting:>16}   {result}")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    quick: bool = False
    """one quadratic, two epochs: to see that it runs"""


def main() -> None:
    """Run everything, print the table, write the file."""
    run = _run.Run("yellowfin", __doc__, Options)
    rows = measure(run.options.quick)
    print(table(rows))
    run.write({"rows": rows})


if __name__ == "__main__":
    main()
