"""The arrays of a function that are always zeros, known from its trace: nothing needs to be computed for them."""

from collections.abc import Callable

import jax
import numpy as np
from jax.extend.core import Jaxpr, Literal, Var

from .._typing import PyTree

# What gives zeros for zeros, element by element or in another shape.
_KEEPS_ZEROS = {"broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "reshard", "squeeze"}


def made_of_zeros(function: Callable[..., PyTree], *arguments: PyTree) -> list[bool]:
    """Whether each leaf of `function(*arguments)` is zeros whatever the arguments, as far as a trace of it tells.

    Returns:
      One bool for each leaf; none at all for a function that cannot be traced.
    """
    try:
        traced = jax.make_jaxpr(function)(*arguments)
    except (TypeError, IndexError):  # it looks at values, or returns something else than arrays
        return []
    return _zeros_among(traced.jaxpr, [False] * len(traced.jaxpr.invars))


def _zeros_among(jaxpr: Jaxpr, inputs: list[bool]) -> list[bool]:
    """Which results of a program are zeros, from which of its inputs are."""
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def is_zeros(atom: Var | Literal) -> bool:
        return not np.any(atom.val) if isinstance(atom, Literal) else known.get(atom, False)

    for equation in jaxpr.eqns:
        operands = [is_zeros(x) for x in equation.invars]
        if equation.primitive.name in _KEEPS_ZEROS:
            known[equation.outvars[0]] = operands[0]
        elif equation.primitive.name in ("jit", "pjit"):
            known.update(zip(equation.outvars, _zeros_among(equation.params["jaxpr"].jaxpr, operands), strict=True))
    return [is_zeros(x) for x in jaxpr.outvars]
