"""Other ways to compute the update of a rule: read after the velocities are written, or from them alone."""

from typing import TYPE_CHECKING

import numpy as np

from .. import _checks
from .coefficients import Coefficient

if TYPE_CHECKING:
    from .filter import Filter


def post_write_form(rule: "Filter") -> tuple[float, tuple[float, ...], float] | None:
    r"""The same update read after the write, $u = s (m v' + d g)$: s, m and d, where that takes no more products.

    Heavy balls, averages, Nesterov and AggMo take fewer this way, the form in which they were published, and
    quasi-hyperbolic momentum as many. Where nothing needs the old velocity once the new one is there, XLA writes the
    one over the other without a copy, and joins the step with that of an optimizer before it, also for TPU. None if it
    takes more, or d is the difference of larger numbers, or A is ill conditioned; where a coefficient is not a number,
    also unless the update is known to be a new velocity.
    """
    if not _has_numbers(rule):
        row = _row_of_update(rule)
        return None if row is None else (1.0, row, 0.0)
    if rule.order == 0:
        return None
    A, B, C, D = rule.matrices()
    if not np.linalg.cond(A) < 1e3:
        return None
    m = np.linalg.solve(A.T, C)
    weights = [_snap(float(x)) for x in (*m, D - m @ B)]
    scale = max(weights, key=abs)
    shared = [_snap(w / scale) for w in weights] if scale else weights
    if set(shared) <= {0.0, 1.0}:
        weights = shared
    else:
        scale = 1.0
    more = _multiplications([*weights, scale]) - _multiplications([*C, D])
    is_exact = abs(D - m @ B) + abs(m * B).sum() <= 2 * abs(D)
    return (scale, tuple(weights[:-1]), weights[-1]) if more < 0 or (more == 0 and is_exact) else None


def velocity_only_readout(rule: "Filter") -> tuple[float, ...] | None:
    r"""Numbers p with $C = p A$ and $D = p B$ at every step: the update is $u = p v'$, of new velocities alone.

    None if there are no such numbers. They are found where the coefficients are numbers, and where C and D equal a row
    of A and its entry of B, as in `heavy_ball` and `ema`, schedules included.
    """
    row = _row_of_update(rule)
    if row is not None:
        return row
    if not _has_numbers(rule) or rule.order == 0:
        return None
    A, B, C, D = rule.matrices()
    system, target = np.column_stack([A, B]).T, np.array([*C, D])
    p = np.linalg.lstsq(system, target, rcond=None)[0]
    fits = np.all(abs(system @ p - target) <= 1e-12 * max(1.0, abs(target).max()))
    return tuple(_snap(float(x)) for x in p) if fits else None


def _has_numbers(rule: "Filter") -> bool:
    """Whether the coefficients of the update are numbers, whatever the look-ahead is."""
    return all(map(_checks.is_number, rule.coefficients()))


def _row_of_update(rule: "Filter") -> tuple[float, ...] | None:
    """The unit vector p with $C = p A$ and $D = p B$ at every step; None unless some row is known to be that of C."""
    for i, row in enumerate(rule.A):
        if _same(rule.D, rule.B[i]) and all(map(_same, rule.C, row)):
            return tuple(float(j == i) for j in range(rule.order))
    return None


def _snap(x: float) -> float:
    """`x`, or the whole number that it differs from by rounding only."""
    return float(round(x)) if abs(x - round(x)) < 1e-12 else x


def _same(a: Coefficient, b: Coefficient) -> bool:
    """Whether two coefficients are known to be equal at every step."""
    return a is b or (_checks.is_number(a) and _checks.is_number(b) and a == b)


def _multiplications(weights: list[float]) -> int:
    return sum(w not in (0.0, 1.0) for w in weights)
