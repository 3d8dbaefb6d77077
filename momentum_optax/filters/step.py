"""One step of a rule on the arrays of one leaf: the new velocities, the update, and the update without bias."""

import functools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._typing import Number, jitted
from .coefficients import Coefficient, is_zero
from .filter import Filter

Arrays: TypeAlias = tuple[jax.Array, ...]
Scales: TypeAlias = tuple[Number, ...]


class ResolvedRule(NamedTuple):
    """A rule at one step.

    Attributes:
      rule: Its coefficients.
      post_write: How the update is read from new velocities, where that is cheaper.
      scales: About how large each velocity becomes.
      largest_input: See the function of this name; None where nothing reads it.
    """

    rule: Filter
    post_write: tuple[float, tuple[float, ...], float] | None
    scales: Scales
    largest_input: Number | None = None


def advance(now: ResolvedRule, g: jax.Array, v: Arrays) -> tuple[jax.Array, Arrays]:
    """One step of the filter for one leaf."""
    rule = now.rule
    new = tuple(weighted_sum((b, *row), (g, *v)) for b, row in zip(rule.B, rule.A, strict=True))
    if now.post_write is None:
        return weighted_sum((rule.D, *rule.C), (g, *v)), new
    # Once the update needs no old velocity, XLA's CPU backend can write the new one in its place without a copy.
    scale, weights, direct = now.post_write
    u = weighted_sum((direct, *weights), (g, *new))
    return u if scale == 1 else weighted_sum((scale,), (u,)), new


def debiased(now: ResolvedRule, u: jax.Array, gain: Arrays) -> tuple[jax.Array, Arrays]:
    """The update over what a constant gradient of 1 would have given, and the velocities of such gradients."""
    dtype = jnp.finfo(u.dtype).dtype
    unit, new = advance(now, jnp.ones((1,) * u.ndim, dtype), gain)
    return _over_response(u, unit), tuple(x.astype(old.dtype) for x, old in zip(new, gain, strict=True))


@jitted
def _over_response(u: jax.Array, unit: jax.Array) -> jax.Array:
    # While the unit response is zero no gradient has counted yet, and the update is zero without division.
    # The response is real, and may be wider, whatever promotion the user allows.
    with jax.numpy_dtype_promotion("standard"):
        return u / jnp.where(unit == 0, 1, unit)


def weighted_sum(coefficients: Sequence[Coefficient], arrays: Arrays) -> jax.Array:
    """The sum of coefficient times array. Numbers 0 and 1 cost nothing; traced ones are data."""
    terms = []
    for c, x in zip(coefficients, arrays, strict=True):
        if not _checks.is_number(c):
            terms.append(_value(c, x) * x)
        elif c != 0:
            # Not `float(c) * x`, the same program: an operator of jax.numpy takes three times as long to trace.
            terms.append(x if c == 1 else jax.lax.mul(np.asarray(c, x.dtype), x))
    if not terms:
        return jnp.zeros_like(arrays[0])
    total = terms[0]
    for term in terms[1:]:
        # The gains of `debias` may have two dtypes.
        total = jax.lax.add(total, term) if total.dtype == term.dtype else total + term
    # Outside jit an array passed through must not be shared with what it came from: donation would fail.
    return jnp.array(total, copy=True) if any(total is x for x in arrays) else total


def _value(coefficient: Coefficient, x: jax.Array) -> jax.Array:
    """A coefficient at a step in the dtype of `x`.

    Raises:
      ValueError: If a schedule gave more than a number, which would change the shape of `x`.
    """
    value = jnp.asarray(coefficient, x.dtype)
    # An age has as many axes as its leaf.
    if value.size != 1 or value.ndim > x.ndim:
        raise ValueError(f"a coefficient must be a scalar at every step, got shape {value.shape} from its schedule")
    return value


def relative_scales(rule: Filter) -> Scales:
    r"""About how large each velocity becomes, up to a common factor: what goes in over $(1 - a_{kk}^2)^{3/4}$.

    For white noise the exponent would be 1/2, for a constant gradient 1.
    """
    if rule.order == 1:
        return (1.0,)
    scales = []
    for k, row in enumerate(rule.A):
        inputs = [rule.B[k], *(a for j, a in enumerate(row) if j != k)]
        size = sum((jnp.abs(jnp.asarray(c, jnp.float32)) for c in inputs if not is_zero(c)), jnp.float32(0))
        decay = jnp.minimum(jnp.abs(jnp.asarray(row[k], jnp.float32)), 0.9999)
        scales.append(jnp.where(size > 0, size, 1.0) * (1 - decay * decay) ** -0.75)
    return tuple(scales)


def largest_input(rule: Filter, scales: Scales) -> Number:
    """The largest share of the gradient that enters a velocity, over its relative scale."""
    # A rule at a step has numbers and arrays for coefficients.
    shares = [cast(Number, b) / scale for b, scale in zip(rule.B, scales, strict=True)]
    if all(map(_checks.is_number, shares)):
        return max((abs(float(share)) for share in shares), default=0.0)
    return functools.reduce(jnp.maximum, [jnp.abs(jnp.asarray(share, jnp.float32)) for share in shares])
