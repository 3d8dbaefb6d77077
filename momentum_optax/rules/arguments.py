"""Checks and coefficients that several rules share."""

from typing import TYPE_CHECKING

from .. import _checks
from ..filters.coefficients import Coefficient, PerLeafSchedule, Scalar

if TYPE_CHECKING:
    from .._typing import Count

# The number of gradients that the leaf has received, as a coefficient.
AGE = PerLeafSchedule(lambda step, age: age)


def step_number(step: "Count") -> "Count":
    """The schedule whose value is the step, counted from 0."""
    return step


def checked_decay(name: str, decay: Scalar) -> Scalar:
    """`decay`, checked to be in [0, 1) if it is a number: at 1 an average would give the gradient no weight.

    Below 0 its weights would alternate in sign.
    """
    _checks.within(name, decay, "[0, 1)")
    return decay


def diagonal(*entries: Coefficient) -> tuple[tuple[Coefficient, ...], ...]:
    """The matrix A of velocities that do not depend on each other."""
    return tuple(tuple(x if i == j else 0.0 for j in range(len(entries))) for i, x in enumerate(entries))
