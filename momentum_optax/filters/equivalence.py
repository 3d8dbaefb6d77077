"""Equivalence of two rules."""

import numpy as np

from .. import _checks
from .coefficients import Scalar
from .filter import Filter


def equivalent(
    f: Filter, g: Filter, learning_rates: tuple[Scalar, Scalar] = (1.0, 1.0), *, steps: int = 64, rtol: float = 1e-9
) -> bool:
    """Whether two rules, each times its learning rate, give the same updates for any gradients.

    For constant coefficients the answer is exact up to `rtol`: two linear systems agree if and only if their first
    K_f + K_g + 1 impulse coefficients do. Otherwise the responses to an impulse at each of the first `steps` steps
    are compared over those steps; later ones are not compared. For rules with periods, `steps` of
    K_f + K_g + 1 common periods decide.

    Args:
      f: A rule.
      g: Another rule, of any order.
      learning_rates: The learning rate of each, a number or a schedule, multiplied after the filter.
      steps: Number of steps to compare where a coefficient is scheduled, a whole number of at least 1.
      rtol: Allowed difference relative to the largest impulse coefficient, a number in [0, inf).

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a number is out of range.
    """
    for name, rule in (("f", f), ("g", g)):
        if not isinstance(rule, Filter):
            raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    if not (isinstance(learning_rates, tuple | list) and len(learning_rates) == 2):
        raise TypeError(f"learning_rates must be two, one for each rule, got {_checks.shown(learning_rates)}")
    for i, rate in enumerate(learning_rates):
        _checks.finite(f"learning_rates[{i}]", rate)
    _checks.integer("steps", steps, 1)
    _checks.number("rtol", rtol, "[0, inf)")
    f, g = (rule.scale(rate) for rule, rate in zip((f, g), learning_rates, strict=True))
    if f.is_constant and g.is_constant:
        n = f.order + g.order + 1
        pairs = [(f.impulse_response(n), g.impulse_response(n))]
    else:
        impulses = np.eye(steps)
        pairs = [(f.response(impulses), g.response(impulses))]
    return all(bool(np.all(np.abs(a - b) <= rtol * max(np.abs(a).max(), np.abs(b).max()))) for a, b in pairs)
