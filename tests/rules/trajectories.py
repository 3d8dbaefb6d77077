"""Trajectories of rules: through the transformation, and from their coefficients by NumPy alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from tests.rules.oracles import START, TABLE, gradient

STEPS = 200
# Numbers, and random schedules for everything that can be scheduled.
CASES = [(row, False) for row in TABLE] + [(row, True) for row in TABLE if row.ranges]
every_case = pytest.mark.parametrize(
    ("row", "scheduled"), CASES, ids=[f"{row}-{'scheduled' if scheduled else 'constant'}" for row, scheduled in CASES]
)
every_row = pytest.mark.parametrize("row", TABLE, ids=str)


def hyperparameters(row, scheduled, float32=False):
    """Schedules for `row.make` and the function h of the references; nothing and None for numbers."""
    if not scheduled:
        return {}, None
    rng = np.random.default_rng(sum(map(ord, str(row))))
    tables = {name: rng.uniform(*ends, STEPS + 2) for name, ends in row.ranges.items()}
    if float32:
        tables = {name: np.float64(np.float32(table)) for name, table in tables.items()}

    def schedule(table):
        return lambda step: float(table[step]) if isinstance(step, int) else jnp.asarray(table)[step]

    def h(t):
        return row.constants | {name: float(table[t]) for name, table in tables.items()}

    return {name: schedule(table) for name, table in tables.items()}, h


def closed_loop(rule, rate, steps, *, evaluate=False):
    """Stored and (where asked for) evaluated points after each jitted step of our transformation on `gradient`."""
    tx = mo.scale_by_momentum(rule)

    @jax.jit
    def step(x, state, g):
        u, state = tx.update(g, state)
        x = x - rate * u
        return x, state, mo.eval_params(state, x, rate) if evaluate else None

    x, state = START, tx.init(jnp.asarray(START))
    stored, evaluated = [], []
    for _ in range(steps):
        x, state, best = step(x, state, gradient(np.asarray(x)))
        assert x.dtype == jnp.float64
        stored.append(np.asarray(x))
        evaluated.append(np.asarray(best) if evaluate else None)
    return np.array(stored), np.array(evaluated)


def points(rule, rate, steps, grad, x):
    """The stored points after each step of a rule's own coefficients, by NumPy alone."""
    rule = rule.pruned()
    v = np.zeros((rule.order, *x.shape))
    out = []
    for t in range(steps):
        g = grad(x)
        A, B, C, D = rule.at(t).matrices()
        x, v = x - rate * (np.tensordot(C, v, 1) + D * g), np.tensordot(A, v, 1) + np.multiply.outer(B, g)
        out.append(x)
    return np.array(out)
