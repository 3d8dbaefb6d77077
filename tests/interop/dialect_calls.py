"""A call of every dialect for the tests that hold of all, and runs by given gradients."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo

STEPS = 40


START = np.array([1.0, -0.7, 1.9, 0.4])


# A dialect that is called, and for each argument another value under which the steps must differ.
CALLS = {
    "torch_sgd": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ),
    "timm_sgdw": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True, "maximize": True},
    ),
    "apex_sgd": (
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {
            "lr": 0.2,
            "momentum": 0.8,
            "dampening": 0.5,
            "weight_decay": 0.2,
            "nesterov": True,
            "wd_after_momentum": True,
        },
    ),
    "flash_sgd": (
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.2, "momentum": 0.8, "dampening": 0.5, "weight_decay": 0.1, "nesterov": True},
    ),
    "heavyball_sgd": ({}, {"lr": 0.2, "beta": 0.8, "weight_decay": 0.1}),
    "keras_sgd": (
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.2, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ),
    "tf1_momentum": (
        {"learning_rate": 0.1, "momentum": 0.9},
        {"learning_rate": 0.2, "momentum": 0.8, "use_nesterov": True},
    ),
    "caffe_sgd": ({"base_lr": 0.1, "momentum": 0.9}, {"base_lr": 0.2, "momentum": 0.8, "weight_decay": 0.1}),
    "qhoptim_qhm": (
        {"lr": 0.1, "momentum": 0.9, "nu": 0.7, "weight_decay": 0.1},
        {"lr": 0.2, "momentum": 0.8, "nu": 0.6, "weight_decay": 0.2, "weight_decay_type": "direct"},
    ),
    "aggmo": ({"lr": 0.1}, {"lr": 0.2, "betas": (0.0, 0.9), "weight_decay": 0.1}),
    "accsgd": ({"lr": 0.1}, {"lr": 0.2, "kappa": 100.0, "xi": 5.0, "smallConst": 0.5, "weight_decay": 0.1}),
    "mass": ({}, {"lr": 0.2, "alpha": 0.1, "kappa_t": 5.0}),
    "lion": ({}, {"lr": 0.2, "betas": (0.5, 0.6), "weight_decay": 0.1, "maximize": True}),
    "signum": (
        {"weight_decay": 0.5},
        {"lr": 0.2, "momentum": 0.3, "weight_decay": 0.1, "weight_decouple": False, "maximize": True},
    ),
    "muon_average": ({}, {"momentum": 0.8, "nesterov": False}),
    "muon_sum": ({}, {"momentum": 0.8, "nesterov": True}),
}


# One allowed value only: everything else is refused.
FIXED = {("caffe_sgd", "regularization_type")}


# How PyTorch computes: arguments that change no number, there or here.
IGNORED = {"foreach", "differentiable", "fused", "capturable"}


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
