"""Optax's optimizers with compressed fields, and compiled runs of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import gradients, own_jit

import momentum_optax as mo
from momentum_optax.wrappers.fields import CompressedField, decompress_field

BYTES = mo.storage.int8(min_size=32)  # of the leaves below, w is compressed and b is not
STORAGES = {"float32": mo.storage.float32(), "bfloat16": mo.storage.bfloat16(), "int8": BYTES}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
PARAMS = {"w": jnp.full((16, 64), 0.5, jnp.float32), "b": jnp.linspace(-1.0, 1.0, 8), "s": jnp.float32(2.0), "n": None}

OPTIMIZERS = {
    "adam": (lambda: optax.adam(1e-2), {"mu"}),
    "adamw": (lambda: optax.adamw(1e-2), {"mu"}),
    "nadam": (lambda: optax.nadam(1e-2), {"mu"}),
    "lion": (lambda: optax.lion(1e-2), {"mu"}),
    "adan": (lambda: optax.adan(1e-2), {"m", "v", "g"}),
    "muon": (lambda: optax.contrib.muon(1e-2), {"mu"}),
    "ademamix": (lambda: optax.contrib.ademamix(1e-2), {"m1", "m2"}),
    "trace": (lambda: optax.sgd(1e-2, 0.9, nesterov=True), {"trace"}),
    "ema": (lambda: optax.chain(optax.ema(0.9), optax.scale(-1e-2)), {"ema"}),
    "signum": (lambda: optax.chain(optax.ema(0.9), optax.scale_by_sign(), optax.scale(-1e-2)), {"ema"}),
    "rmsprop": (lambda: optax.rmsprop(1e-2, momentum=0.9), {"trace"}),
    "amsgrad": (lambda: optax.amsgrad(1e-2), {"mu"}),
    "schedule_free": (lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2, b1=0.9), {"z"}),
    "masked": (lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False, "s": True, "n": None}), {"mu"}),
    "partition": (
        lambda: optax.partition(
            {"a": optax.adam(1e-2), "t": optax.sgd(1e-2, 0.9)}, lambda p: {**dict.fromkeys(p, "t"), "w": "a", "n": None}
        ),
        {"mu", "trace"},
    ),
    "inject": (lambda: optax.inject_hyperparams(optax.adam)(1e-2), {"mu"}),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(1e-2), 2), {"mu", "acc_grads"}),
    "if finite": (lambda: optax.apply_if_finite(optax.adam(1e-2), 2), {"mu"}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def signal(steps, params=PARAMS):
    return [gradients(params, seed) for seed in range(steps)]


def run(tx, steps, params=PARAMS):
    """Updates of compiled steps, and the last state; the parameters stay where they are."""
    state, step, out = tx.init(params), own_jit(tx.update), []
    for g in signal(steps, params):
        u, state = step(g, state, params)
        out.append(u)
    assert step._cache_size() == 1
    return out, state


def opened(state):
    """The state of the optimizer inside, every field decoded."""
    return jax.tree.map(
        lambda x: decompress_field(x) if isinstance(x, CompressedField) else x,
        state.inner,
        is_leaf=lambda x: isinstance(x, CompressedField),
    )


def distance(a, b):
    """Norm of the difference, relative to that of `b`."""
    flat = [np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])
