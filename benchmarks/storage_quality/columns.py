"""Columns of unlike scale: rows whose elements have gradients of very different sizes, as heads in unlike units have.

A velocity that is added to the weights does not notice: small columns move little anyway. What is divided by its own
size, or of which the sign is taken, moves all columns alike, so that each needs a velocity that is right relative to
itself. Two measurements:

* the direction in one column after the other, for gradients of white noise with a mean of a tenth of it;
* a regression with five groups of targets in unlike units, from which weights of one size are to be found.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_optax as mo

from .._run import Row
from .bases import Kept
from .reference import Dynamic

# Of the gradients in every second column, relative to those in the others.
SHARES = (1e-2, 1e-4, 1e-5, 1e-6)
# Of the gradients in each group of targets of the regression.
RATIOS = (1.0, 1e-2, 1e-4, 1e-6, 1e-8)
INPUTS, TARGETS, BATCH = 64, 1024, 64

STORAGES: dict[str, Kept] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "8-bit dynamic": Dynamic(),
}

# Adam's own 1e-8 would hide the smallest gradients.
EPS = 1e-30

# Optimizers of a rate or a schedule and a storage.
OPTIMIZERS: dict[str, Callable[[optax.ScalarOrSchedule, Kept], optax.GradientTransformation]] = {
    "adam": lambda rate, kept: mo.compress(optax.adam(rate, eps=EPS), kept if isinstance(kept, dict) else {"mu": kept}),
    "lion": lambda rate, kept: mo.lion(rate, weight_decay=None, storage=kept),
    "signum": lambda rate, kept: mo.signum(rate, storage=kept),
}


def storages(optimizer: str) -> dict[str, Kept]:
    """What an optimizer is measured in."""
    return STORAGES | ({"int8, uint8": {"mu": "int8", "nu": "uint8"}} if optimizer == "adam" else {})


def measure(seeds: int, quick: bool) -> Row:
    """Both measurements."""
    errors = regression(seeds, 3 if quick else 500)
    return {"shares": SHARES, "directions": directions(), "ratios": RATIOS, "regression": errors}


def directions(steps: int = 60, rows: int = 16, columns: int = 512) -> list[Row]:
    """For each optimizer, storage and share the cosine to float32's updates in small columns, and the longest step.

    The latter is over the longest step that float32 takes in any column.
    """
    rng = np.random.default_rng(0)
    noisy = rng.normal(size=(steps, rows, columns)) + 0.1 * rng.normal(size=(rows, columns))
    # The same gradients at all shares, in one program.
    sizes = np.where(np.arange(columns) % 2 == 0, 1.0, np.array(SHARES)[:, None])[:, None, None]
    signal = jnp.asarray(noisy * sizes, jnp.float32)

    def updates(tx: optax.GradientTransformation) -> np.ndarray:
        def run(signal: jax.Array) -> jax.Array:
            moved: jax.Array = jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(signal[0]), signal)[1]
            return moved

        return np.asarray(jax.jit(jax.vmap(run))(signal), np.float64)

    found = []
    for optimizer, build in OPTIMIZERS.items():
        exact = updates(build(1.0, "float32"))
        for name, kept in itertools.islice(storages(optimizer).items(), 1, None):
            for share, u, v in zip(SHARES, updates(build(1.0, kept)), exact, strict=True):
                # Once the first steps are over, whose averages are short.
                few, of_few = (x[steps // 3 :, :, 1::2] for x in (u, v))
                cosine = np.sum(few * of_few) / np.sqrt(np.sum(few * few) * np.sum(of_few * of_few))
                longest = abs(u).max() / abs(v).max()
                found.append({"optimizer": optimizer, "storage": name, "share": share,
                              "cosine": round(float(cosine), 3), "longest": round(float(longest), 2)})  # fmt: skip
    return found


def regression(seeds: int, steps: int) -> list[Row]:
    """For each optimizer and storage the relative error of the weights, group by group; 1 is nothing learnt."""
    found = []
    for optimizer in ("adam", "lion"):
        for name, kept in storages(optimizer).items():
            tx = OPTIMIZERS[optimizer](optax.linear_schedule(0.01, 0.0, steps), kept)
            errors = jax.jit(jax.vmap(lambda seed, tx=tx: _regress(tx, seed, steps)))(jnp.arange(seeds))
            found.append({"optimizer": optimizer, "storage": name, "errors": np.float64(errors).T.tolist()})
    return found


def _regress(tx: optax.GradientTransformation, seed: jax.Array, steps: int) -> jax.Array:
    """The relative error of the weights of each group."""
    start, data = jax.random.split(jax.random.key(seed))
    true = jax.random.normal(start, (INPUTS, TARGETS)) / np.sqrt(INPUTS)
    sizes = jnp.asarray(np.resize(RATIOS, TARGETS), jnp.float32)

    def step(carry: tuple[jax.Array, optax.OptState], key: jax.Array) -> tuple[tuple[jax.Array, optax.OptState], None]:
        weights, state = carry
        x = jax.random.normal(key, (BATCH, INPUTS))
        # Of half the squared residuals, each over the square of its unit.
        gradient = x.T @ (x @ (weights - true)) / BATCH * sizes
        updates, state = tx.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    weights = jnp.zeros_like(true)
    (weights, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), jax.random.split(data, steps))
    off, all_of_it = (jnp.square(x).reshape(INPUTS, -1, 1) for x in (weights - true, true))
    groups = jnp.asarray(np.resize(np.eye(len(RATIOS)), (TARGETS, len(RATIOS))), jnp.float32)
    off, all_of_it = (jnp.einsum("itg,tk->k", x, groups) for x in (off, all_of_it))
    return jnp.sqrt(off / all_of_it)
