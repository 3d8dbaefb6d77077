"""Two gradients for every step, and compiled runs of the optimizers that take both: STORM and MARS."""

import jax
import jax.numpy as jnp
import numpy as np
from conformance import gradients

LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
SIGNAL = [gradients(LIKE, seed) for seed in range(8)]
BEFORE = [gradients(LIKE, 100 + seed) for seed in range(8)]


def flat(tree):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


def run(tx, signal=SIGNAL, before=BEFORE, params=LIKE):
    """The updates of a step compiled once, as vectors, and the last state."""
    state, out = tx.init(params), []
    step = jax.jit(lambda g, p, state: tx.update(g, state, params, previous_gradient=p))
    for g, p in zip(signal, before, strict=True):
        u, state = step(g, p, state)
        out.append(flat(u))
    assert step._cache_size() == 1
    return np.array(out), state


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
