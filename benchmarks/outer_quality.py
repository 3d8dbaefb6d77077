"""The loss in quality where workers meet rarely.

    python -m benchmarks.outer_quality

Four workers train the deep autoencoder of the demo on 8x8 digits, each on separate batches of 32 images, with
Nesterov's rule at decay 0.9. Fully synchronous training averages their gradients at every step. The others train alone
and meet every 20 steps, a twentieth of the messages. Held-out squared error per image after equally many local steps,
medians of five seeds. Outer rates and momenta are the published ones, not tuned. Bytes are those that one worker sends
or takes from others for each parameter and step: 8 for an all-reduce in float32 by rings of many, a byte from each of
the others where the exchange is in int8. MuLoCo (arXiv:2505.23725) is DiLoCo around Muon, at that paper's outer rate
and momentum; Muon's own rate of 0.02 is that of its reference code. Prints a table and writes
benchmarks/outer_quality.json.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import whole_number
from examples.demo import autoencoder
from examples.demo.data import flat_digits

from . import _run
from ._run import Row

WORKERS, EVERY, RATE = 4, 20, 0.01
MUON_RATE = 0.02
STRATEGIES = {
    "averaging": (mo.outer.local_sgd(), 8 / EVERY),
    "averaging, int8 exchange": (mo.outer.local_sgd(exchange="int8"), (WORKERS - 1) / EVERY),
    "DiLoCo": (mo.outer.diloco(), 8 / EVERY),
    "DiLoCo, int8 exchange": (mo.outer.diloco(exchange="int8"), (WORKERS - 1) / EVERY),
    "DiLoCo, int8 velocity": (mo.outer.diloco(storage=mo.storage.int8(min_size=1)), 8 / EVERY),
    "BMUF": (mo.outer.bmuf(WORKERS), 8 / EVERY),
    "SlowMo": (mo.outer.slowmo(0.5), 8 / EVERY),
}

# The paper's outer learning rate and momentum.
MUON_STRATEGIES = {
    "MuLoCo": (mo.outer.diloco(0.7, 0.5), 8 / EVERY),
    "MuLoCo, int8 exchange": (mo.outer.diloco(0.7, 0.5, exchange="int8"), (WORKERS - 1) / EVERY),
}


# Weights, images, batches and held-out images.
Setting: TypeAlias = tuple[optax.Params, jax.Array, jax.Array, jax.Array]
Carry: TypeAlias = tuple[optax.Params, optax.OptState]
# Their weights, states and outer states.
Workers: TypeAlias = tuple[optax.Params, optax.OptState, mo.outer.OuterState]


def settings(seeds: int, epochs: int) -> Setting:
    """Weights, images, batches of shape (rounds, EVERY, WORKERS, 32), held-out images; stacked over seeds."""
    images, _ = flat_digits()
    found = []
    for seed in range(seeds):
        weights, train, order, _, test = autoencoder.problem(images, epochs, (0, seed))
        batches = order.reshape(-1, order.shape[-1])
        batches = batches[: len(batches) // (EVERY * WORKERS) * EVERY * WORKERS]
        found.append((weights, train, batches.reshape(-1, EVERY, WORKERS, batches.shape[-1]), test))
    return cast(Setting, autoencoder.stacked(found))


def inner() -> optax.GradientTransformation:
    """Each worker's optimizer."""
    return mo.sgd(RATE, 0.9, nesterov=True)


def inner_muon() -> optax.GradientTransformation:
    """Each worker's optimizer where it is Muon, for matrices, and Adam, for biases."""
    return mo.muon(MUON_RATE, others=optax.adam(1e-3))


def gradient(weights: optax.Params, images: jax.Array) -> optax.Updates:
    """Of the mean cross-entropy."""
    return jax.grad(autoencoder.cross_entropy)(weights, images)


def synchronous(make: Callable[[], optax.GradientTransformation], setting: Setting) -> jax.Array:
    """The loss where gradients are averaged at every step."""
    weights, images, batches, test = setting
    tx = make()

    def step(carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
        weights, state = carry
        updates, state = tx.update(gradient(weights, images[rows.reshape(-1)]), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    steps = batches.reshape(-1, *batches.shape[2:])
    (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), steps)
    return autoencoder.squared_error(weights, test)


def rarely(
    outer: mo.outer.OuterMomentum,
    needs_rate: bool,
    make: Callable[[], optax.GradientTransformation],
    setting: Setting,
) -> jax.Array:
    """The loss where workers meet after every `EVERY` steps."""
    weights, images, batches, test = setting
    tx = make()
    extra = {"inner_learning_rate": RATE} if needs_rate else {}

    def step(carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
        weights, state = carry
        updates, state = tx.update(gradient(weights, images[rows]), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    @functools.partial(jax.vmap, in_axes=(0, 1), axis_name="workers")
    def go(carry: Workers, rows: jax.Array) -> Workers:
        weights, state, common = carry
        (weights, state), _ = jax.lax.scan(step, (weights, state), rows)
        weights, common = outer.sync(weights, common, axis_name="workers", **extra)
        return weights, state, common

    every = jax.tree.map(lambda w: jnp.stack([w] * WORKERS), weights)
    carry = every, jax.vmap(tx.init)(every), jax.vmap(outer.init)(every)
    (_, _, common), _ = jax.lax.scan(lambda c, rows: (go(c, rows), None), carry, batches)
    return autoencoder.squared_error(jax.tree.map(lambda x: x[0], common.anchor), test)


def ways() -> dict[str, tuple[Callable[[Setting], jax.Array], float]]:
    """For each row its training, and the bytes that a worker exchanges for each parameter and step."""
    return {
        "every step": (functools.partial(synchronous, inner), 8.0),
        **{
            name: (functools.partial(rarely, outer, name == "SlowMo", inner), sent)
            for name, (outer, sent) in STRATEGIES.items()
        },
        "every step, Muon": (functools.partial(synchronous, inner_muon), 8.0),
        **{
            name: (functools.partial(rarely, outer, False, inner_muon), sent)
            for name, (outer, sent) in MUON_STRATEGIES.items()
        },
    }


def table(rows: list[Row]) -> str:
    """The rows in print; the last column is the median over that of the first row."""
    columns = {
        "workers meet by": "{way}",
        "bytes": "{bytes:.2f}",
        "median": "{median:.3f}",
        "range": "{least:.3f} to {most:.3f}",
        "to every step": "{ratio:.3f}",
    }
    base, shown = np.median(rows[0]["losses"]), []
    for row in rows:
        losses = np.asarray(row["losses"])
        median = np.median(losses)
        shown.append(row | {"median": median, "least": losses.min(), "most": losses.max(), "ratio": median / base})
    return _run.table(columns, shown)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    seeds: Annotated[int, whole_number(1, 100)] = 5
    """runs of each row"""
    epochs: Annotated[int, whole_number(1, 100_000)] = 480
    """over all workers together"""


def main() -> None:
    """Train every way, print the table and write the file."""
    run = _run.Run("outer_quality", __doc__, Options)
    setting = settings(run.options.seeds, run.options.epochs)
    rows: list[Row] = []
    for name, (train, sent) in tqdm(ways().items(), leave=False):
        losses = np.asarray(jax.jit(jax.vmap(train))(setting))
        rows.append({"way": name, "bytes": sent, "losses": [float(x) for x in losses]})
    print(table(rows))
    run.write({"local_steps": int(np.prod(setting[2].shape[1:3])), "rows": rows})


if __name__ == "__main__":
    main()
