"""Recipes of every dialect, the pairs that take the same steps, and runs on a quartic."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from dialects import CALLS

from momentum_optax.interop import Recipe, equivalent_hyperparameters
from momentum_optax.interop.dialect import DIALECTS

STEPS = 12


SOURCES = [
    Recipe("torch_sgd", lr=0.1),
    Recipe("torch_sgd", lr=0.1, momentum=0.9),
    Recipe("torch_sgd", lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    Recipe("torch_sgd", lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.05),
    Recipe("torch_sgd", lr=0.1, momentum=0.8, maximize=True),
    Recipe("timm_sgdw", lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True),
    Recipe("apex_sgd", lr=0.1, momentum=0.9, dampening=0.3),
    Recipe("apex_sgd", lr=0.1, momentum=0.9, weight_decay=0.05, wd_after_momentum=True),
    Recipe("flash_sgd", lr=0.1, momentum=0.9, dampening=0.5),
    Recipe("heavyball_sgd", lr=0.1, weight_decay=0.05),
    Recipe("keras_sgd", learning_rate=0.1, momentum=0.9),
    Recipe("keras_sgd", learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    Recipe("tf1_momentum", learning_rate=0.1, momentum=0.9, use_nesterov=True),
    Recipe("caffe_sgd", base_lr=0.1, momentum=0.9, weight_decay=0.05),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=0.7),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1 / 1.1, weight_decay=0.05, weight_decay_type="grad"),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1.0, weight_decay=0.05, weight_decay_type="direct"),
    Recipe("aggmo", lr=0.1, betas=(0.9,)),
    Recipe("aggmo", lr=0.1, betas=(0.0, 0.9)),
    Recipe("accsgd", lr=0.05),
    Recipe("mass", lr=0.1),
    Recipe("lion", lr=0.01, betas=(0.8, 0.8), weight_decay=0.05),
    Recipe("signum", lr=0.01, momentum=0.8, weight_decay=0.05),
    Recipe("signum", lr=0.01, momentum=0.8, weight_decay=0.05, weight_decouple=False),
    Recipe("muon_average", momentum=0.9),
    Recipe("muon_sum", momentum=0.9),
]
# A dialect without a recipe above, as it is called elsewhere.
SOURCES += [Recipe(name, **CALLS[name][0]) for name in DIALECTS if name not in {r.dialect for r in SOURCES}]


def pairs():
    for source, target in itertools.product(SOURCES, DIALECTS):
        if source.dialect == target:
            continue
        try:
            yield source, equivalent_hyperparameters(source, target)
        except ValueError:
            continue


PAIRS = [pytest.param(s, e, id=f"{s.dialect}{i}-{e.recipe.dialect}") for i, (s, e) in enumerate(pairs())]
every_pair = pytest.mark.parametrize(("source", "found"), PAIRS)


RATES = {name: record.learning_rate for name, record in DIALECTS.items()}


def rate(step):
    return 1.0 - 0.7 * (step % 4 == 2)


def run(recipe, first=1.0, late=0):
    """The steps on a quartic from step `late` on; `first` multiplies the first gradient, weight decay in it."""
    tx = recipe.transformation()
    down = recipe.description().learning_rate is not None
    x = jnp.asarray([1.0, -0.7, 1.9, 0.4])
    state, out = tx.init(x), []
    for _ in range(late):
        state = tx.update(None, state, x)[1]
    sign = -1 if recipe.description().maximize else 1
    decay = float(recipe.description().l2)
    for t in range(late, late + STEPS):
        p = np.asarray(x)
        g = sign * (np.array([0.9, 1.3, 0.7, 1.1]) * (p - 0.3) + 0.2 * p**3 + 0.3 * (-1) ** t)
        if t == late:
            g = g * first + (first - 1) * decay * p * sign
        u, state = tx.update(jnp.asarray(g), state, x)
        # A momentum that does not descend: its direction, which is all that an orthogonalisation sees.
        x = x + (u if down else -0.1 * u / jnp.linalg.norm(u))
        out.append(np.asarray(x))
    return np.array(out)


cached = functools.cache(run)


def is_same(a, b):
    return bool(np.allclose(a, b, rtol=1e-10, atol=1e-12))


@functools.cache
def changed(recipe, argument, function):
    """The recipe with an argument as a schedule."""
    value = recipe.hyperparameters.get(argument, DIALECTS[recipe.dialect].defaults.get(argument))
    return Recipe(recipe.dialect, **{**recipe.hyperparameters, argument: lambda step: value * function(step)})
