"""Every rule once more, as a NumPy float64 loop in its paper's form, in a module per family; all of them in one table.

A reference is a generator `(grad, y, steps, lr, h)`. It yields the stored parameters after each step: the point where
the next gradient is taken. Those that also have a point to evaluate yield the pair (stored, evaluated). `h(t)` is the
dict of hyperparameters of step t, so that one loop serves numbers and schedules. None of our coefficients occur here;
comments name the form. The gradient is evaluated once per step.
"""

import numpy as np

from tests.rules.oracles import (
    after_optimizer,
    contrib,
    games,
    look_ahead,
    mixes,
    several_velocities,
    sums_and_averages,
    tuned,
)

FAMILIES = (sums_and_averages, look_ahead, after_optimizer, mixes, several_velocities, tuned, games, contrib)
TABLE = [row for family in FAMILIES for row in family.ROWS]
INTERVALS = {rule: intervals for family in FAMILIES for rule, intervals in family.INTERVALS.items()}
SYMBOLS = {rule: symbols for family in FAMILIES for rule, symbols in family.SYMBOLS.items()}
# The first row of each rule.
BY_RULE = {row.rule: row for row in reversed(TABLE)}

DIMENSION = 8
_RNG = np.random.default_rng(20240611)
_BASIS = np.linalg.qr(_RNG.normal(size=(DIMENSION, DIMENSION)))[0]
_SLOPES = np.geomspace(1e-3, 1.0, DIMENSION)
_TILT = _BASIS.T @ (_SLOPES * _RNG.uniform(-0.7, 0.7, DIMENSION))
START = _RNG.normal(size=DIMENSION)


def gradient(x):
    """Of sum a_i log cosh((Q x)_i) + c . x + 0.02 sum (x_i x_{i+1})^2.

    Smooth and convex enough that errors do not grow, far from quadratic, and too slow along some directions to have
    converged after a few hundred steps.
    """
    coupled = 0.04 * x * (np.roll(x, 1) ** 2 + np.roll(x, -1) ** 2)
    return _BASIS.T @ (_SLOPES * np.tanh(_BASIS @ x)) + _TILT + coupled
