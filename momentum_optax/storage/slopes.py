"""Slopes through what is stored: straight through a rounding to a float, refused through integers."""

from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Arrays: TypeAlias = tuple[jax.Array, ...]
Tangents: TypeAlias = tuple[jax.Array | SymbolicZero, ...]


def straight_through(value: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the slope of `value`: a rounding without bias changes nothing on average."""
    return _straight_through(value, rounded)


@jax.custom_jvp
def _straight_through(value: jax.Array, rounded: jax.Array) -> jax.Array:
    del value
    return rounded


@_straight_through.defjvp
def _slope_of_the_value(primals: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0].astype(primals[1].dtype)


def marked(part: jax.Array, *values: jax.Array) -> jax.Array:
    """`part`, a float that is kept beside codes of `values`; remembers whether these have a slope.

    Integers carry no slope from one step to the next, and JAX takes that for a slope of zero. So the slope of a float
    kept beside them, which is zero, is made one that JAX tracks, and `unmarked` refuses to read what has one. What is
    written and never read again, as in the last step, is not refused.
    """
    return _marked(part, *values)


@jax.custom_jvp
def _marked(part: jax.Array, *values: jax.Array) -> jax.Array:
    del values
    return part


def _mark(primals: Arrays, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
    part, kept = primals[0], tangents[0]
    if all(isinstance(t, SymbolicZero) for t in tangents[1:]):
        return part, cast(jax.Array, kept)
    # JAX would find out that a constant does not depend on the values.
    moving = [jnp.sum(t).astype(part.dtype) for t in tangents[1:] if not isinstance(t, SymbolicZero)]
    zero = jnp.zeros_like(part) if isinstance(kept, SymbolicZero) else kept
    return part, zero + 0 * sum(moving[1:], moving[0])


_marked.defjvp(_mark, symbolic_zeros=True)


def unmarked(part: jax.Array) -> jax.Array:
    """`part` for reading.

    Raises:
      TypeError: If it is differentiated and was written beside codes of values with a slope.
    """
    return _unmarked(part)


@jax.custom_jvp
def _unmarked(part: jax.Array) -> jax.Array:
    return part


def _refuse(primals: Arrays, tangents: Tangents) -> tuple[jax.Array, jax.Array]:
    if not isinstance(tangents[0], SymbolicZero):
        raise TypeError(
            "there is no slope through a state in int8, int4 or uint8, whose codes are integers: differentiate with "
            "storage 'float32' or 'bfloat16', or cut the past off by jax.lax.stop_gradient(state)"
        )
    return primals[0], cast(jax.Array, tangents[0])


_unmarked.defjvp(_refuse, symbolic_zeros=True)
