"""Checks and conversions of the arguments of the analysis: rules with known coefficients, arrays in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Coefficient, PerLeafSchedule, value_at

# The result of a function that broadcasts: np.float64 for numbers, an array for arrays. `Any`, as in NumPy's stubs.
Floats: TypeAlias = Any

# An age at which every start-up correction has died out: decay^age underflows for any decay below 1 in float64.
_LATE = 2**60
_RELATIVE = 1e-12


def constant(rule: Filter, step: int | None = None) -> Filter:
    """The rule with plain numbers for coefficients, without the velocities that are never read or always zero.

    With `step`, the coefficients at that step for a leaf that has received a gradient at every step. Without it, the
    limit of coefficients that depend on a leaf's age (an undampened first step, a debiasing weight).

    Raises:
      TypeError: If `rule` is not a `Filter`, `step` not a whole number, or a coefficient is traced.
      ValueError: If `step` is negative, or None while a coefficient depends on the step or does not settle.
    """
    _check_rule(rule)
    if step is not None:
        _checks.integer("step", step, 0)
        return at_step(rule, int(step)).pruned()
    return _numbers(rule, partial(_settled, phase=None)).pruned()


def at_step(rule: Filter, step: int) -> Filter:
    """The rule at a step, with plain numbers for coefficients, for a leaf that has received a gradient at every step.

    Raises:
      TypeError: If a coefficient is traced.
    """
    return _numbers(rule, lambda name, entry: _as_float(name, value_at(entry, step)))


def phases(rule: Filter, step: int | None = None) -> tuple[Filter, ...]:
    """The rule at each step of one period, with plain numbers for coefficients: one entry if they are constant.

    With `step`, the coefficients at that step alone, as in `constant`; without it, the limit of those that depend on a
    leaf's age. All entries have the same velocities.

    Raises:
      TypeError: If `rule` is not a `Filter`, `step` not a whole number, or a coefficient is traced.
      ValueError: If `step` is negative, or None while a coefficient depends on the step and is not known to repeat, or
        does not settle.
    """
    _check_rule(rule)
    if step is not None or rule.period is None or not rule.reads_step:
        return (constant(rule, step),)
    kept = rule.pruned()
    return tuple(_numbers(kept, partial(_settled, phase=phase)) for phase in range(rule.period))


def known(rule: Filter) -> Filter:
    """The rule itself, if its coefficients can be evaluated at any step.

    Raises:
      TypeError: If `rule` is not a `Filter`, or a coefficient is traced.
    """
    _check_rule(rule)
    for entry in rule.coefficients():
        if not callable(entry) and not isinstance(entry, PerLeafSchedule):
            _as_float("a coefficient", entry)
    return rule


def reals(name: str, value: ArrayLike, interval: str) -> np.ndarray:
    """`value` as a float64 array, each entry in `interval`, e.g. ``"[0, inf)"``.

    Raises:
      TypeError: If it is not a real number or an array of them.
      ValueError: If an entry is outside, or not finite where the interval is open at infinity.
    """
    array = _array(name, value, "iuf", "a real number or an array of them")
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = (array >= low if interval[0] == "[" else array > low) & (
        array <= high if interval[-1] == "]" else array < high
    )
    if not np.all(inside):
        raise ValueError(f"{name} must be in {interval}, got {float(array[~inside].flat[0])!r}")
    return array


def curvatures(value: ArrayLike) -> np.ndarray:
    """Curvatures as a float64 array, or complex128, since the vector field of a game has a complex spectrum.

    Raises:
      TypeError: If it is not a number or an array of them.
      ValueError: If an entry is not finite.
    """
    array = _array("curvature", value, "iufc", "a number or an array of them")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"curvature must be finite, got {array[~np.isfinite(array)].flat[0]}")
    return array


def _array(name: str, value: ArrayLike, kinds: str, wanted: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # a tracer, or lists of different lengths
        raise TypeError(f"{name} must be {wanted}, got {_checks.shown(value)}") from error
    if str(array.dtype) == "bfloat16":
        array = array.astype(np.float64)
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name} must be {wanted}, got {_checks.shown(value)}")
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _check_rule(rule: object) -> None:
    if not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")


def _numbers(rule: Filter, value: Callable[[str, Coefficient], float]) -> Filter:
    """The rule with the `value` of each coefficient, which is also told its name."""
    A = tuple(tuple(value(f"A[{i}][{j}]", x) for j, x in enumerate(row)) for i, row in enumerate(rule.A))
    B, C, lookahead = (
        tuple(value(f"{name}[{i}]", x) for i, x in enumerate(getattr(rule, name))) for name in ("B", "C", "lookahead")
    )
    return Filter(A, B, C, value("D", rule.D), lookahead)


def _settled(name: str, entry: Coefficient, phase: int | None) -> float:
    """The value of a coefficient for an old leaf, at a step of this phase; None where no coefficient may read it."""
    by_age = isinstance(entry, PerLeafSchedule)
    if phase is None and (entry.reads_step if isinstance(entry, PerLeafSchedule) else callable(entry)):
        raise ValueError(
            f"{name} depends on the step: step must choose one, got None; where there is no such argument, give "
            "rule.at(step). Of a schedule that is known to repeat, such as schedules.restarted, most functions take "
            "the whole period"
        )
    if not by_age:
        return _as_float(name, value_at(entry, phase))
    late, later = (_as_float(name, value_at(entry, phase, age)) for age in (_LATE, 2 * _LATE))
    if abs(late - later) > _RELATIVE * abs(later):
        raise ValueError(f"{name} never settles: step must choose one, got None")
    return later


def _as_float(name: str, value: Coefficient) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(f"{name} must have a value that is known now, got {_checks.shown(value)}") from error
