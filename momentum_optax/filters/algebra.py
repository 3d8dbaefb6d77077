"""The algebra of filters: equivalence, transfer functions and the quasi-hyperbolic normal form; NumPy float64."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .. import _checks
from .coefficients import Scalar

if TYPE_CHECKING:
    from .filter import Filter


class NormalForm(NamedTuple):
    """`scale` times the quasi-hyperbolic rule with `decay` and `nu` (see `quasi_hyperbolic`)."""

    scale: float
    decay: float
    nu: float


def equivalent(
    f: "Filter", g: "Filter", learning_rates: tuple[Scalar, Scalar] = (1.0, 1.0), *, steps: int = 64, rtol: float = 1e-9
) -> bool:
    """Whether two rules, each times its learning rate, give the same updates for any gradients.

    For constant coefficients the answer is exact up to `rtol`: two linear systems agree if and only if their first
    K_f + K_g + 1 impulse coefficients do. Otherwise the responses to an impulse at each of the first `steps` steps
    are compared over those steps; what the rules do later is not looked at.

    Args:
      f: A rule.
      g: Another rule, of any order.
      learning_rates: The rate of each, a number or a schedule, multiplied after the filter.
      steps: How many steps to compare when something is scheduled.
      rtol: Allowed difference relative to the largest impulse coefficient.

    Raises:
      TypeError: If `f` or `g` is no `Filter`.
      ValueError: If `steps` is below 1.
    """
    for name, rule in (("f", f), ("g", g)):
        if not isinstance(rule, Filter):
            raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    _checks.integer("steps", steps, 1)
    f, g = (rule.scale(rate) for rule, rate in zip((f, g), learning_rates, strict=True))
    if f.is_constant and g.is_constant:
        n = f.order + g.order + 1
        pairs = [(f.impulse_response(n), g.impulse_response(n))]
    else:
        impulses = np.eye(steps)
        pairs = [(f.response(impulses), g.response(impulses))]
    return all(bool(np.all(np.abs(a - b) <= rtol * max(np.abs(a).max(), np.abs(b).max()))) for a, b in pairs)


def transfer_function(A: np.ndarray, impulse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of H(z) in powers of 1/z, from A and the first K + 1 impulse coefficients."""
    denominator = characteristic_polynomial(A)
    return np.convolve(denominator, impulse)[: len(A) + 1], denominator


def is_minimal(impulse: np.ndarray, order: int) -> bool:
    """Whether the Hankel matrix of 2K + 1 impulse coefficients has rank K: then no shorter rule has this response."""
    hankel = np.array([impulse[i + 1 : i + 1 + order] for i in range(order)]).reshape(order, order)
    return bool(np.linalg.matrix_rank(hankel, rtol=1e-10) == order) if order else True


def characteristic_polynomial(A: np.ndarray) -> np.ndarray:
    """Coefficients of det(zI - A), highest power first, by Faddeev and LeVerrier.

    `numpy.poly` goes through eigenvalues, which are inaccurate for the shift matrices of moving averages.
    """
    size = len(A)
    coefficients, M = [1.0], np.eye(size)
    for k in range(1, size + 1):
        AM = A @ M
        coefficients.append(-np.trace(AM) / k)
        M = AM + coefficients[-1] * np.eye(size)
    return np.array(coefficients)
