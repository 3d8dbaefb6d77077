"""Gradients for wrappers and optimizers, and compiled runs on them."""

import jax
import jax.numpy as jnp
import optax
from conformance import avals, gradients

import momentum_optax as mo

LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
SIGNAL = [gradients(LIKE, seed) for seed in range(8)]


def steps(tx, signal, params=None, **extra):
    """The updates of a step compiled once, and the last state."""
    params = LIKE if params is None else params
    state, step, out = tx.init(params), jax.jit(tx.update), []
    begin = avals(state)
    for g in signal:
        u, state = step(g, state, params, **extra)
        assert avals(state) == begin
        out.append(u)
    return out, state


# Read in one compiled piece: operation by operation, compressed velocities take seconds.
velocity = jax.jit(mo.velocity)

# Gradients that turn round, in the two leaves at different steps.
TURNING = [
    {"a": SIGNAL[i]["a"] * 0.3 + 2 * a, "b": SIGNAL[i]["b"] * 0.3 + b}
    for i, (a, b) in enumerate([(1, 1), (1, 1), (-0.6, 1), (-1, -1.5), (-1, -1), (0.6, -1), (1, -1), (1, 1)])
]
MATRICES = {"tall": jnp.zeros((16, 5)), "wide": jnp.zeros((6, 12))}
HUNDRED = [gradients(MATRICES, seed) for seed in range(100)]


def final(tx, params=None):
    """The parameters after a hundred steps, from ones."""
    params = jax.tree.map(jnp.ones_like, MATRICES) if params is None else params

    def step(carry, g):
        params, state = carry
        u, state = tx.update(g, state, params)
        return (optax.apply_updates(params, u), state), None

    stacked = jax.tree.map(lambda p, *x: jnp.stack(x).astype(p.dtype), params, *HUNDRED)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), stacked)[0][0])()
