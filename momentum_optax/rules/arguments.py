"""What the arguments of rules have in common: checks, and coefficients that depend on the step or the age alone."""

from typing import Any

from .. import _checks
from ..filters.coefficients import Coefficient, PerLeafSchedule, Scalar

AGE = PerLeafSchedule(lambda step, age: age)


def step_number(step: Any) -> Any:
    """The schedule that is the step itself, counted from 0."""
    return step


def checked_decay(name: str, decay: Scalar) -> Scalar:
    """The range of an average's decay: at 1 the gradient would have no weight, and below 0 the memory alternates."""
    _checks.within(name, decay, "[0, 1)")
    return decay


def diagonal(*entries: Coefficient) -> tuple[tuple[Coefficient, ...], ...]:
    """The matrix A of velocities that do not feed each other."""
    return tuple(tuple(x if i == j else 0.0 for j in range(len(entries))) for i, x in enumerate(entries))
