"""`single_step`: the learning rate and the momentum of YellowFin, the root of a cubic."""

from typing import TypeAlias

import jax
import jax.numpy as jnp


def single_step(
    log_h_min: jax.Array, log_h_max: jax.Array, variance: jax.Array, distance: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The learning rate and the momentum that solve SingleStep, see `scale_by_yellowfin`.

    Args:
      log_h_min: Logarithm of the least curvature.
      log_h_max: Logarithm of the largest.
      variance: C, not negative.
      distance: D, positive.

    Returns:
      Two scalars.
    """
    # Both terms are 1 - sqrt(mu): of the cubic, and of the range.
    gap = jnp.minimum(_root(variance, jnp.exp(-log_h_min) / distance), 2 / (1 + jnp.exp((log_h_max - log_h_min) / 2)))
    return gap**2 * jnp.exp(-log_h_min), (1 - gap) ** 2


_Pair: TypeAlias = tuple[jax.Array, jax.Array]


@jax.custom_jvp
def _root(variance: jax.Array, unit: jax.Array) -> jax.Array:
    """The y between 0 and 1 with $y + r^2 y^3 / 3 = 1$, where $r^2$ is 6 times `variance` times `unit` squared."""
    # The smallest r leaves a root of 1, without 0/0.
    r = jnp.maximum(jnp.sqrt(6 * variance) * unit, 1e-12)
    return 2 / r * jnp.sinh(jnp.arcsinh(1.5 * r) / 3)


@_root.defjvp
def _slope_of_the_root(primals: _Pair, tangents: _Pair) -> _Pair:
    """By the implicit function theorem: the closed form has a root of 0 and differences of large numbers."""
    (variance, unit), (variance_dot, unit_dot) = primals, tangents
    y = _root(variance, unit)
    square = 6 * variance * unit**2
    square_dot = 6 * unit**2 * variance_dot + 12 * variance * unit * unit_dot
    return y, -(y**3) / 3 / (1 + square * y**2) * square_dot
