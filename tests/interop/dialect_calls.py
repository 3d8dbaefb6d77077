"""Runs of a dialect by given gradients."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from dialects import CALLS

import momentum_optax as mo

STEPS = 40


START = np.array([1.0, -0.7, 1.9, 0.4])


every = pytest.mark.parametrize("name", CALLS)


def gradient(x, t):
    return np.array([0.9, 1.3, 0.7, 1.1]) * (x - 0.3) + 0.2 * x**3 + 0.3 * np.array([(-1) ** t, 0, 0.5, (t % 3) - 1])


def rate(t):
    return 0.05 * (1 + t % 3)


def descend(tx, steps=STEPS, first=0):
    """The parameters after each step, from `START`; gradients of None before step `first`."""
    x = {"x": jnp.asarray(START)}
    state, out = tx.init(x), []
    for t in range(steps):
        g = None if t < first else jnp.asarray(gradient(np.asarray(x["x"]), t))
        u, state = tx.update({"x": g}, state, x)
        x = mo.apply_updates(x, u)
        out.append(np.asarray(x["x"]))
    return np.array(out)


def follow(tx, steps=8):
    """The updates for given gradients of either sign, at parameters that stay."""
    x, rng, out = jnp.asarray(START), np.random.default_rng(0), []
    state = tx.init(x)
    for _ in range(steps):
        u, state = tx.update(jnp.asarray(rng.normal(size=x.shape), x.dtype), state, x)
        out.append(u)
    return np.array(out)


def parameters(f):
    return inspect.signature(f).parameters if inspect.isfunction(f) else {}
