r"""The effect of velocities in few bits: the value at which a rule stalls, and the noise that rounding adds.

A storage is described by two numbers: `step_size`, the distance of neighbouring values over their size (over the row's
largest value for storages with scales), and `bytes_per_parameter`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .. import _checks
from ..filters import Filter
from .arguments import phases
from .periods import covariances
from .response import dc_gain
from .settling import is_contraction

# Steps after which the search for a fixed point or a cycle stops; decay 0.9999 in float32 needs some 150,000.
_LONGEST = 2**22


class Spacing(Protocol):
    """The numbers that a storage declares, such as `mo.storage.bfloat16()`."""

    @property
    def step_size(self) -> float:
        """Distance of neighbouring values over their size."""

    @property
    def bytes_per_parameter(self) -> float:
        """Bytes of one velocity per parameter."""


@dataclasses.dataclass(frozen=True)
class Precision:
    """The effect of a storage on a rule.

    Attributes:
      bytes_per_parameter: Of all velocities together.
      stall: The limit of the update for a constant gradient with velocities rounded to nearest, over the exact limit;
        1 where nothing is lost, the mean over a cycle where rounding leads to one. NaN for a rule that never forgets or
        whose gain is 0. Stochastic rounding does not stall, which is why it is the default.
      noise: Root mean square of the error of the update over that of the update, for independent gradients and
        unbiased rounding. An upper estimate: every velocity is assumed to have the widest spacing for its size.
    """

    bytes_per_parameter: float
    stall: float
    noise: float


def precision(rule: Filter, storage: Spacing, *, step: int | None = None) -> Precision:
    r"""Stall, noise and size of the velocities of a rule in `storage`.

    An unbiased rounding to values a distance d apart has a variance of $d^2/6$ for values spread evenly between them.
    Each such error then passes through the filter as part of a velocity.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      storage: An object with numbers `step_size` and `bytes_per_parameter`, such as `mo.storage.bfloat16()`.
      step: The step whose coefficients are used, see `frequency_response`.

    Returns:
      A `Precision`; `noise` is relative to the row's largest values for a storage with scales, and infinite for a rule
      that never forgets.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a declared number is out of range, or a coefficient depends on the step and `step` is None.

    Reference:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015, arXiv:1502.02551.
    """
    repeated = phases(rule, step)
    spacing, size = (_declared(storage, name) for name in ("step_size", "bytes_per_parameter"))
    stall = _stall(repeated, spacing, dc_gain(rule, step=step))
    return Precision(repeated[0].order * size, stall, _noise(repeated, spacing))


def _declared(storage: object, name: str) -> float:
    value = getattr(storage, name, None)
    if not _checks.is_number(value):
        raise TypeError(f"storage must be an object with a number {name}, got {_checks.shown(storage)}")
    _checks.number(f"storage.{name}", value, "(0, inf)")
    return float(value)


def _noise(repeated: Sequence[Filter], spacing: float) -> float:
    A, B, C, D = (list(x) for x in zip(*(rule.matrices() for rule in repeated), strict=True))
    if not len(B[0]):
        return 0.0
    P = covariances(A, B)
    if not np.all(np.isfinite(P)):
        return math.inf
    # Errors of different velocities are independent: one covariance for each, and they add. An error made at a step is
    # relative to the velocity after it.
    errors = np.sqrt(np.roll(np.diagonal(P, axis1=-2, axis2=-1), -1, 0) / 6) * spacing
    added = sum(covariances(A, list(column)) for column in np.moveaxis(errors[..., None] * np.eye(len(B[0])), 1, 0))
    error, update = (np.einsum("ti,tij,tj->t", C, covariance, C) for covariance in (added, P))
    return math.sqrt(error.mean() / np.mean(np.square(D) + update))


def _stall(repeated: Sequence[Filter], spacing: float, exact: float) -> float:
    matrices = [rule.matrices() for rule in repeated]
    if exact == 0 or not is_contraction(functools.reduce(lambda before, A: A @ before, [A for A, _, _, _ in matrices])):
        return math.nan
    k = len(matrices)
    v = np.zeros(len(matrices[0][1]))
    # After Brent: a cycle comes back to its state at a power of two, once that is beyond the cycle's start and length.
    mark, length, updates = v, 1, list[float]()
    for _ in range(max(_LONGEST // k, 1)):
        start = v
        for A, B, C, D in matrices:
            updates.append(float(C @ v + D))
            v = _nearest(A @ v + B, spacing)
        if np.array_equal(v, start):
            return float(np.mean(updates[-k:]) / exact)
        if np.array_equal(v, mark):
            break
        if len(updates) == length * k:
            mark, length, updates = v, 2 * length, []
    return float(np.mean(updates) / exact)


def _nearest(v: np.ndarray, spacing: float) -> np.ndarray:
    """`v` rounded to floating-point numbers, half to even, whose distance is `spacing` times a power of two."""
    _, exponent = np.frexp(v)
    unit = np.ldexp(spacing, exponent - 1)
    return np.asarray(np.round(v / unit) * unit)
