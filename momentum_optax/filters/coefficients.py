r"""Coefficients of a rule: numbers, scalar arrays, schedules of the step, and functions of a leaf's own age.

They meet each other through Python's operators only, so an integer step gives Python floats in float64, and a traced
one gives JAX values.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import _checks

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True, eq=False)
class PerLeafSchedule:
    """A coefficient that depends on the age of a leaf: the number of gradients that this leaf has received.

    It serves rules whose first step differs: a leaf that is unfrozen late has its first step late.

    Attributes:
      function: Maps (step, age), both counted from 0, to a scalar.
      reads_step: Whether `function` looks at the step too.
    """

    function: Callable[[Any, Any], Any]
    reads_step: bool = False


Scalar: TypeAlias = "float | np.ndarray | jax.Array | Callable[[Any], Any]"


Coefficient: TypeAlias = "float | np.ndarray | jax.Array | Callable[[Any], Any] | PerLeafSchedule"


def value_at(coefficient: Coefficient, step: Any, age: Any = None) -> Any:
    """The value of a coefficient at `step`, for a leaf of the given age (`age=None`: never a step missed)."""
    if not (isinstance(coefficient, PerLeafSchedule) or callable(coefficient)):
        return coefficient
    with _standard_promotion(step, age):
        if isinstance(coefficient, PerLeafSchedule):
            return coefficient.function(step, step if age is None else age)
        return coefficient(step)


def _standard_promotion(*values: Any) -> contextlib.AbstractContextManager[Any]:
    """JAX's usual promotion for arithmetic of these, whatever the user's: steps, comparisons and numbers meet here.

    The results are converted once, to the dtype of the arithmetic that takes them.
    """
    if all(x is None or _checks.is_number(x) for x in values):
        return contextlib.nullcontext()
    import jax  # noqa: PLC0415  numbers do without

    standard: contextlib.AbstractContextManager[Any] = jax.numpy_dtype_promotion("standard")
    return standard


def lift(function: Callable[..., Any], *coefficients: Coefficient) -> Any:
    """Apply `function` to coefficients, now if all are known, else as a schedule (or `PerLeafSchedule`) of its own.

    `function` may use arithmetic and comparison operators only.
    """
    by_age = [c for c in coefficients if isinstance(c, PerLeafSchedule)]
    scheduled = any(callable(c) for c in coefficients)
    if by_age:
        reads_step = scheduled or any(c.reads_step for c in by_age)
        return PerLeafSchedule(lambda step, age: function(*(value_at(c, step, age) for c in coefficients)), reads_step)
    if scheduled:
        return lambda step: function(*(value_at(c, step) for c in coefficients))
    with _standard_promotion(*coefficients):
        return function(*coefficients)


def on_first_step(first: Coefficient, then: Coefficient) -> Any:
    """A coefficient that is `first` at the first gradient that a leaf receives, and `then` afterwards."""
    is_first = PerLeafSchedule(lambda step, age: age == 0)
    return lift(lambda now, a, b: now * a + (1 - now) * b, is_first, first, then)


def shifted(coefficient: Scalar) -> Any:
    """The coefficient of the step after this one, for rules that store a point of the step to come."""
    return (lambda step: coefficient(step + 1)) if callable(coefficient) else coefficient


def table_lookup(table: Any, index: Any) -> Any:
    """Entry `index` of a list of numbers, or the last one beyond its end: a float for an int, JAX's for a tracer."""
    if _checks.is_number(index):
        return float(table[min(int(index), len(table) - 1)])
    import jax.numpy as jnp  # noqa: PLC0415  only a traced index needs it

    return jnp.asarray(np.asarray(table))[jnp.minimum(index, len(table) - 1)]


def is_zero(coefficient: Any) -> bool:
    """Whether a coefficient is zero for ever, known without running anything."""
    return _checks.is_number(coefficient) and coefficient == 0
