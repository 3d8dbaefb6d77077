"""Monitored runs, and their figures in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import gradients, own_jit

import momentum_optax as mo

LIKE = {"a": jnp.zeros((3, 40)), "b": jnp.zeros((4,), jnp.bfloat16)}
SIGNAL = [gradients(LIKE, seed) for seed in range(6)]

# Elements that no gradient ever reaches, which do not stall.
SIGNAL = [{**g, "a": g["a"].at[0, :9].set(0)} for g in SIGNAL]
BALL = mo.heavy_ball(0.9)
PLAIN = mo.monitor(mo.scale_by_momentum(BALL), BALL)

# Bytes for one leaf of the two, which is enough to compile.
STORAGES = {
    "float32": mo.storage.float32(),
    "bfloat16": mo.storage.bfloat16(),
    "int8": mo.storage.int8(min_size=8),
    "int4": mo.storage.int4(min_size=8),
}

# What int4 adds to int8 takes seconds to compile.
every_storage = pytest.mark.parametrize("storage", [*list(STORAGES)[:3], pytest.param("int4", marks=pytest.mark.slow)])

# Read in one compiled piece: operation by operation, compressed velocities take seconds.
velocity = jax.jit(mo.velocity)


def flat(tree):
    """All elements in float64 (complex128)."""
    return np.concatenate([np.ravel(np.asarray(x).astype(np.complex128)) for x in jax.tree.leaves(tree)])


def norm(x):
    return math.sqrt(np.sum(abs(x) ** 2))


def run(tx, signal=None, params=None):
    """For each step the state before, the gradients, the updates and the state after; compiled once."""
    state, step, out = tx.init(LIKE if params is None else params), own_jit(tx.update), []
    for g in SIGNAL if signal is None else signal:
        u, after = step(g, state, params)
        out.append((state, g, u, after))
        state = after
    assert step._cache_size() == 1
    return out


@functools.cache
def compiled(storage):
    """A monitored heavy ball: `init` and the compiled step."""
    tx = mo.monitor(mo.scale_by_momentum(BALL, storage=STORAGES[storage]), BALL)
    return tx.init, jax.jit(tx.update)


def check_figures(row, exact, k=0, suffix=""):
    """The measured figures of velocity `k`, where `exact(v, g)` is what the rule makes of it in float64."""
    before, g, u, after = row
    old, new = (velocity(state)[k] for state in (before, after))
    codes = [jax.tree.leaves(state.inner.velocity[0][k]) for state in (before, after)]
    v, d, g, u = flat(old), flat(new), flat(g), flat(u)
    x = exact(v, g)
    same = np.concatenate([np.ravel(np.asarray(a == b)) for a, b in zip(*codes, strict=True)])
    expected = {
        "gradient_norm": norm(g),
        "effective_learning_rate": norm(u) / norm(g),
        "velocity_norm": norm(d),
        "cosine": np.real(np.vdot(g, v)) / (norm(g) * norm(v)) if norm(v) else 0.0,
        "quantization_error": norm(d - x) / norm(x),
        "stalled": np.mean(same & (x != v)),
    }
    got = mo.telemetry(after)
    for figure, value in expected.items():
        key = figure if figure in ("gradient_norm", "effective_learning_rate") else figure + suffix
        # Sums of float32 products; a cosine near 0 is a small difference of large sums.
        np.testing.assert_allclose(got[key], value, rtol=2e-5, atol=1e-6, err_msg=figure)
    return got
