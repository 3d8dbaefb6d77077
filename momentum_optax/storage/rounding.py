"""Stochastic rounding to floats of 16 bits or fewer, for velocities and for weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import DType
from .noise import column_numbers, element_bits
from .slopes import straight_through


def is_narrow(dtype: DType) -> bool:
    """Whether `stochastic_round` goes to this dtype: a real one of fewer bits than float32."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits < 32


def rounded_at(x: jax.Array, stamp: jax.Array, numbers: tuple[int, ...], dtype: DType) -> jax.Array:
    """`stochastic_round` with the noise of `stamp_of_step` for the leaf of these numbers."""
    columns = column_numbers(x.shape[-1] if x.shape else 1, *numbers)
    rounded: jax.Array = _rounded(x, stamp, columns, dtype)
    return rounded


# Traced once for all leaves of a shape.
@partial(jax.jit, static_argnums=3)
def _rounded(x: jax.Array, stamp: jax.Array, columns: jax.Array | np.ndarray, dtype: DType) -> jax.Array:
    return stochastic_round(x, element_bits(x.shape, stamp, columns), dtype)


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
    noise = jax.lax.shift_right_logical(bits, np.uint32(32 - cut))
    noisy = jax.lax.bitcast_convert_type(jax.lax.bitwise_and(jax.lax.add(pattern, noise), kept), jnp.float32)
    least, unit = float(form.smallest_normal), float(form.smallest_subnormal)
    if least > jnp.finfo(jnp.float32).smallest_normal:
        # Below it values are subnormal and lie one unit apart.
        uniform = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)
        size = jnp.abs(x) * np.float32(1 / unit)
        whole = jnp.floor(size)
        units = (whole + (uniform < size - whole).astype(jnp.float32)) * np.float32(unit)
        noisy = jnp.where(jnp.abs(x) < np.float32(least), jnp.copysign(units, x), noisy)
    # Noise could turn the bits of NaN into anything, and the largest value into infinity. A quarter of a unit in the
    # last place below what lies between them, the cast rounds down.
    below = jax.lax.mul(x, np.float32(1 - 2.0 ** -(form.nmant + 2)))
    kept_value = jax.lax.select(jax.lax.lt(jax.lax.abs(x), np.float32(form.max)), noisy, below)
    return straight_through(x, kept_value.astype(dtype))
