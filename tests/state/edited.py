"""Optimizers and steps for tests of `reset` and `rescale`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conformance import STORAGES
from conformance import gradients as drawn

import momentum_optax as mo

PARAMS = {"head": {"w": jnp.ones((8, 600))}, "body": jnp.ones((4, 3))}
UINT8 = mo.storage.uint8(min_size=1)
ADAM = {"mu": mo.storage.int8(min_size=1), "nu": UINT8}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """Parameters in a class, as with Equinox, one of which has the name of a field of Adam's state."""

    mu: jax.Array
    layers: list


MODULE = Module(jnp.ones((4, 3)), [jnp.ones(2)])


def in_head(path):
    return path.startswith("head/")


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


def steps(tx, count=3, factor=1.0, state=None, start=0):
    """Updates and the state after some steps, compiled."""
    state = tx.init(PARAMS) if state is None else state
    update, out = compiled(tx), []
    for t in range(start, start + count):
        g = jax.tree.map(lambda x: x * jnp.float32(factor), drawn(PARAMS, t))
        u, state = update(g, state, PARAMS)
        out.append(u)
    return out, state


def full(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def debiased(storage):
    """Two velocities of different size, ages, gains, and a schedule after them."""
    rule = mo.quasi_hyperbolic(lambda t: 0.9 - 0.1 / (t + 2), 0.7)
    return optax.chain(
        mo.scale_by_momentum(rule, storage=STORAGES[storage](), debias=True), optax.scale_by_schedule(lambda t: -0.1)
    )
