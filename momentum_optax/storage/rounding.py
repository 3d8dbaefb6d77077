"""Stochastic rounding to floats of 16 bits or fewer, for velocities and for weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import DType
from .noise import random_bits
from .slopes import straight_through


def is_narrow(dtype: DType) -> bool:
    """Whether `stochastic_round` goes to this dtype: a real one of fewer bits than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


# Traced once for all leaves of a shape.
@partial(jax.jit, static_argnums=2)
def rounded_at(x: jax.Array, stamp: jax.Array, dtype: DType) -> jax.Array:
    """`stochastic_round` with the noise of `stamp`."""
    return stochastic_round(x, random_bits(x.shape, stamp), dtype)


def stochastic_round(x: jax.Array, bits: jax.Array, dtype: DType) -> jax.Array:
    r"""`x` rounded to one of its two neighbours in `dtype`, to the nearer one more often, so that the mean is exact.

    $$ P(\text{up}) = \frac{x - \mathrm{down}}{\mathrm{up} - \mathrm{down}} $$

    A finite `x` that rounds up to infinity is rounded down. NaN and infinity are kept. Differentiation passes
    straight through, which is right in the mean since the rounding is without bias.

    Args:
      x: Real array; it is read in float32.
      bits: Uniform random uint32 of the shape of `x`.
      dtype: bfloat16, float16 or another one that `is_narrow`.

    Returns:
      An array of that dtype.

    Reference:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015, arXiv:1502.02551.
    """
    x = x.astype(jnp.float32)
    form = jnp.finfo(dtype)
    cut = 23 - form.nmant
    kept = np.uint32(2**32 - 2**cut)
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Noise below the last bit that is kept, then a cut. Done in the bits of a float32, before the cast: XLA's TPU
    # backend keeps that in one fusion.
    noisy = jax.lax.bitcast_convert_type((pattern + (bits >> (32 - cut))) & kept, jnp.float32)
    down = jax.lax.bitcast_convert_type(pattern & kept, jnp.float32)
    least, unit = float(form.smallest_normal), float(form.smallest_subnormal)
    if least > jnp.finfo(jnp.float32).smallest_normal:
        # Below it values are subnormal and lie one unit apart.
        uniform = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)
        size = jnp.abs(x) * np.float32(1 / unit)
        whole = jnp.floor(size)
        units = (whole + (uniform < size - whole)) * np.float32(unit)
        noisy = jnp.where(jnp.abs(x) < np.float32(least), jnp.copysign(units, x), noisy)
    # Noise could turn the bits of NaN into anything, and the largest value into infinity.
    largest = np.float32(form.max)
    finite = jax.lax.select(jnp.abs(noisy) <= largest, noisy, down)
    kept_value = jax.lax.select(jnp.isfinite(x), finite, x)
    return straight_through(x, kept_value.astype(dtype))
