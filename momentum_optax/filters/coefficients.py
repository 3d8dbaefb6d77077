r"""Coefficients of a rule: numbers, scalar arrays, schedules of the step, and functions of a leaf's age.

They are combined with Python's operators only, so that an integer step gives Python floats in float64 and a traced step
gives JAX values.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast, overload

import numpy as np

from .. import _checks

if TYPE_CHECKING:
    from .._typing import Condition, Count, Number


@dataclasses.dataclass(frozen=True, eq=False)
class PerLeafSchedule:
    """A coefficient that depends on the age of a leaf: the number of gradients that this leaf has received.

    For rules whose first step differs: the first step of a leaf is the one of its first gradient, however late.

    Attributes:
      function: Maps (step, age), both counted from 0, to a scalar.
      reads_step: Whether `function` depends on the step too.
      period: The steps after which it repeats for a leaf of a given age, where it reads the step; None if unknown.
    """

    function: "Callable[[Count, Count], Number]"
    reads_step: bool = False
    period: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Periodic:
    """A schedule of the step that is known to repeat, so that rules with it can be analysed without choosing a step.

    Attributes:
      function: The schedule; its value at t + period must be that at t.
      period: At least 1.
    """

    function: "Callable[[Count], Number]"
    period: int

    def __call__(self, step: "Count") -> "Number":
        """The value at a step."""
        return self.function(step)


# What a rule's arguments take: a number, a scalar array (traced too) or a schedule of the step.
Scalar: TypeAlias = "Number | Callable[[Count], Number]"
# What a `Filter` holds.
Coefficient: TypeAlias = "Scalar | PerLeafSchedule"


def value_at(coefficient: Coefficient, step: "Count | None", age: "Count | None" = None) -> "Number":
    """The value of a coefficient at `step`, for a leaf of this age.

    The step may be None for a coefficient that does not read it; the age is None for a leaf that missed no gradient.
    """
    if not (isinstance(coefficient, PerLeafSchedule) or callable(coefficient)):
        return coefficient
    with _standard_promotion(step, age):
        if isinstance(coefficient, PerLeafSchedule):
            return coefficient.function(cast("Count", step), cast("Count", step if age is None else age))
        return coefficient(cast("Count", step))


def _standard_promotion(*values: object) -> contextlib.AbstractContextManager[None]:
    """JAX's standard promotion where a value is not a number, whatever the user configured.

    Steps, comparisons and numbers of several dtypes are combined under it. The results are converted once, to the dtype
    of the arithmetic that takes them.
    """
    if all(x is None or _checks.is_number(x) for x in values):
        return contextlib.nullcontext()
    import jax  # noqa: PLC0415  not needed for numbers

    return cast("contextlib.AbstractContextManager[None]", jax.numpy_dtype_promotion("standard"))


def common_period(coefficients: "Iterable[Coefficient]") -> int | None:
    """The steps after which all of them repeat, ages aside: 1 if none reads the step, None if that is unknown."""
    periods = []
    for c in coefficients:
        if isinstance(c, PerLeafSchedule):
            periods.append(c.period if c.reads_step else 1)
        elif callable(c):
            periods.append(c.period if isinstance(c, Periodic) else None)
    known = [period for period in periods if period is not None]
    return math.lcm(*known) if len(known) == len(periods) else None


# The functions do arithmetic that no type of NumPy and JAX in common describes, hence `Callable[..., Any]`.
@overload
def lift(function: Callable[..., Any], *coefficients: Scalar) -> Scalar: ...
@overload
def lift(function: Callable[..., Any], *coefficients: Coefficient) -> Coefficient: ...
def lift(function: Callable[..., Any], *coefficients: Coefficient) -> Coefficient:
    """`function` of the coefficients: a value if all are values, else a schedule or a `PerLeafSchedule`.

    `function` may use arithmetic and comparison operators, and `select`. The result is known to repeat if all are.
    """
    by_age = [c for c in coefficients if isinstance(c, PerLeafSchedule)]
    scheduled = any(callable(c) for c in coefficients)
    if by_age:
        reads_step = scheduled or any(c.reads_step for c in by_age)
        return PerLeafSchedule(
            lambda step, age: function(*(value_at(c, step, age) for c in coefficients)),
            reads_step,
            common_period(coefficients) if reads_step else None,
        )
    if scheduled:
        return repeating(lambda step: function(*(value_at(c, step) for c in coefficients)), common_period(coefficients))
    with _standard_promotion(*coefficients):
        return cast("Number", function(*coefficients))


def repeating(schedule: "Callable[[Count], Number]", period: int | None) -> "Callable[[Count], Number]":
    """The schedule, with its period where that is known."""
    return schedule if period is None else Periodic(schedule, period)


def on_first_step(first: Coefficient, then: Coefficient) -> Coefficient:
    """A coefficient that is `first` at the first gradient that a leaf receives, and `then` afterwards."""
    is_first = PerLeafSchedule(lambda step, age: age == 0)
    return lift(select, is_first, first, then)


def select(condition: "Condition | np.ndarray", yes: "Number", no: "Number") -> "Number":
    """`yes` where the condition holds, else `no`; both must be finite."""
    if isinstance(condition, bool | np.bool_ | np.ndarray):
        return condition * yes + (1 - condition) * no
    import jax.numpy as jnp  # noqa: PLC0415  needed for a traced condition only

    return jnp.where(condition, yes, no)


def shifted(coefficient: Scalar) -> Scalar:
    """The coefficient at the next step, for rules that store a point of the next step."""
    if not callable(coefficient):
        return coefficient
    return repeating(lambda step: coefficient(step + 1), common_period([coefficient]))


def table_lookup(table: Sequence[float], index: "Count") -> "Number":
    """Entry `index` of a table, the last one beyond its end: a float for an int, a JAX scalar for a tracer."""
    if _checks.is_number(index):
        return float(table[min(int(index), len(table) - 1)])
    import jax.numpy as jnp  # noqa: PLC0415  needed for a traced index only

    return jnp.asarray(np.asarray(table))[jnp.minimum(index, len(table) - 1)]


def is_zero(coefficient: object) -> bool:
    """Whether a coefficient is the number 0; arrays and schedules are not evaluated."""
    return _checks.is_number(coefficient) and coefficient == 0
