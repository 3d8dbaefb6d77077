"""Arithmetic of schedules: Python floats at a Python step, JAX values at a traced one.

Divisors are floats throughout: JAX divides two integers in float32 even where 64 bits are enabled.
"""

import math
from typing import TYPE_CHECKING

from .. import _checks
from ..filters.coefficients import select

if TYPE_CHECKING:
    from .._typing import Number


def least(a: "Number", b: "Number") -> "Number":
    """The lesser of two numbers."""
    return select(a < b, a, b)


def log(x: "Number") -> "Number":
    """The natural logarithm."""
    if _checks.is_number(x):
        return math.log(x)
    import jax.numpy as jnp  # noqa: PLC0415  needed for traced steps only

    return jnp.log(x)
