"""A state dictionary of PyTorch's, parameters that it belongs to, and runs that go on from a state."""

import jax
import jax.numpy as jnp
import numpy as np

import momentum_optax as mo

interop = mo.interop


PARAMS = {"dense": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}, "head": jnp.zeros(2)}
NAMES = {"dense/kernel": 0, "dense/bias": 1, "head": 2}
LAYOUTS = {"dense/kernel": "linear"}


def torch_state(dampening=0.0, **changes):
    """A state dictionary; `changes` replace entries, None leaves one out."""
    rng = np.random.default_rng(0)
    entries = {
        0: {"momentum_buffer": rng.normal(size=(3, 4)).astype(np.float32)},
        1: {"momentum_buffer": rng.normal(size=3).astype(np.float32)},
        2: {"momentum_buffer": rng.normal(size=2).astype(np.float32)},
    }
    for key, entry in changes.items():
        entries[int(key[1:])] = entry
    group = {"params": [0, 1, 2], "lr": 0.1, "momentum": 0.9, "dampening": dampening}
    return {"state": {k: v for k, v in entries.items() if v is not None}, "param_groups": [group]}


def take(state_dict=None, names=NAMES, layouts=LAYOUTS, tx=None, **options):
    tx = interop.torch_sgd(lr=0.1, momentum=0.9) if tx is None else tx
    return interop.from_torch(tx.init(PARAMS), state_dict or torch_state(), names, layouts=layouts, **options)


def grads(seed, like=PARAMS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


def go_on(tx, state, seeds, like=PARAMS):
    """The updates for seeded gradients, and the last state."""
    out = []
    for seed in seeds:
        u, state = tx.update(grads(seed, like), state, like)
        out.append(u)
    return out, state


def assert_close(a, b, rtol=1e-6, atol=1e-7):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
