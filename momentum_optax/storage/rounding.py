"""Stochastic rounding to bfloat16 and float16, for velocities and for weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import DType
from .noise import random_bits
from .slopes import straight_through

_MANTISSA_BITS = {"bfloat16": 7, "float16": 10}
# Below this magnitude float16 is subnormal: its values lie 2^-24 apart.
_FLOAT16_NORMAL, _FLOAT16_UNIT = 2.0**-14, 2.0**-24


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
      dtype: bfloat16 or float16.

    Returns:
      An array of that dtype.

    Raises:
      KeyError: If `dtype` is another one.

    Reference:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015, arXiv:1502.02551.
    """
    x = x.astype(jnp.float32)
    cut = 23 - _MANTISSA_BITS[jnp.dtype(dtype).name]
    kept = np.uint32(2**32 - 2**cut)
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    # Noise below the last bit that is kept, then a cut. Done in the bits of a float32, before the cast: XLA's TPU
    # backend keeps that in one fusion.
    noisy = jax.lax.bitcast_convert_type((pattern + (bits >> (32 - cut))) & kept, jnp.float32)
    down = jax.lax.bitcast_convert_type(pattern & kept, jnp.float32)
    if jnp.dtype(dtype) == jnp.float16:
        uniform = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)
        size = jnp.abs(x) * np.float32(1 / _FLOAT16_UNIT)
        whole = jnp.floor(size)
        units = (whole + (uniform < size - whole)) * np.float32(_FLOAT16_UNIT)
        noisy = jnp.where(jnp.abs(x) < np.float32(_FLOAT16_NORMAL), jnp.copysign(units, x), noisy)
    # Noise could turn the bits of NaN into anything, and the largest value into infinity.
    largest = np.float32(jnp.finfo(dtype).max)
    finite = jax.lax.select(jnp.abs(noisy) <= largest, noisy, down)
    kept_value = jax.lax.select(jnp.isfinite(x), finite, x)
    return straight_through(x, kept_value.astype(dtype))
