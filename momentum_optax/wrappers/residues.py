r"""Averages of weights in few bits: whole numbers of a unit, modulo a power of two; the weights say the rest.

An average a stays close to the weights $\theta$ that it follows, and whoever reads it has these. So only the last bits
of $k = a/\Delta$ are kept, $k \bmod 2^b$, and a is read as the number with these last bits that is nearest to
$\theta$. That is exact while $|a - \theta| < 2^{b-1} \Delta$, whichever weights near those of the writer the reader
has: rounded, stochastically too, or projected after the step. A displacement $a - \theta$ would be wrong by every such
change.

The points $k \Delta$ stay where they are from step to step, so that what is not written is not rounded again.
Independent noise, of the variance $\Delta$ times what the average moves by, would add up to
$\sqrt{|a - \theta| \Delta / 2}$ whatever the decay. Here the noise of an element moves by the golden ratio from write
to write, from a random start: at each write it is uniform, so that rounding has no bias, and over many it is even,
which leaves about a third of that error. The unit of a row is a power of two; halving it rounds nothing.

Reference:
  Side information at the decoder alone: Wyner and Ziv, IEEE Trans. Information Theory 1976.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import jitted
from ..storage.noise import random_bits
from ..storage.rows import row_axes, split_as
from ..storage.slopes import marked, unmarked

# For each dtype of codes the largest distance from the weights in units, and the room beyond the known distance.
_LIMITS = {"int16": (2.0**15 - 2, 4.0), "int8": (2.0**7 - 2, 1.25)}
# A unit falls to its half once it is this many times larger than it needs to be.
_TOO_LARGE = 2.5
# Units count what a float32 holds exactly, and have an inverse.
_FINEST, _SMALLEST, _GREATEST = 2.0**-22, 2.0**-110, 2.0**110
_GOLDEN = np.uint32(0x9E3779B9)
_EXPONENT = np.uint32(0x7F800000)


def is_coded(codes: jax.Array) -> bool:
    """Whether these are residues, and not an average in full."""
    return codes.dtype.name in _LIMITS


@jitted
def read(codes: jax.Array, unit: jax.Array, weights: jax.Array) -> jax.Array:
    """The average of a leaf in float32, next to its weights; NaN and infinity where these are."""
    theta, unit = weights.astype(jnp.float32), unmarked(unit)
    # Before the first write there is no unit, and the average is the weights.
    known = (unit > 0) & jnp.isfinite(theta)
    # Of a reader's weights far from the writer's the last bits cannot be counted; they are as good as any.
    near = jnp.clip(jnp.floor(theta * (1 / jnp.where(unit > 0, unit, 1))), -(2.0**30), 2.0**30)
    whole = jnp.where(known, near, 0).astype(jnp.int32)
    distance = (codes.astype(jnp.int32) - whole).astype(codes.dtype)  # modulo 2^b
    return jnp.where(known, (whole + distance.astype(jnp.int32)).astype(jnp.float32) * unit, theta)


@jitted
def write(
    average: jax.Array,
    codes: jax.Array,
    unit: jax.Array,
    path: tuple[jax.Array, jax.Array],
    noise: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Codes and units of a leaf's average.

    Args:
      average: In float32.
      codes: The codes that are replaced, for their dtype.
      unit: The units that they were written in.
      path: The weights now, and after the update that they are about to receive: readers have either, or those between.
      noise: The stamp of the leaf, and the number of the write.
    """
    unit = _next_unit(average, unit, path, codes.dtype)
    # Units are powers of two: a product with the inverse is the quotient.
    quotient = average * (1 / unit)
    low = jnp.floor(quotient)
    stamp, number = noise
    # From write to write by the golden ratio, modulo 1: a steady movement is rounded up at regular intervals.
    bits = random_bits(average.shape, stamp) + number.astype(jnp.uint32) * _GOLDEN
    uniform = (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)
    whole = low + (split_as(uniform, average) < quotient - low).astype(jnp.float32)
    whole = jnp.where(jnp.isfinite(whole), whole, 0)
    return whole.astype(jnp.int32).astype(codes.dtype), marked(unit, average)


def _next_unit(average: jax.Array, unit: jax.Array, path: tuple[jax.Array, jax.Array], codes: jnp.dtype) -> jax.Array:
    """The unit of each row: as it was, unless its codes would not reach, or would reach much too far."""
    limit, room = _LIMITS[codes.name]
    now, moved = (x.astype(jnp.float32) for x in path)
    size = jnp.maximum(jnp.abs(now), jnp.abs(moved))
    # The weights will be rounded to their dtype: up or down.
    rounding = size * np.float32(jnp.finfo(path[0].dtype).eps)
    distance = jnp.maximum(jnp.abs(average - now), jnp.abs(average - moved)) + rounding
    coarsest = jnp.maximum(
        distance * np.float32(room / limit), jnp.maximum(size, jnp.abs(average)) * np.float32(_FINEST)
    )
    axes = row_axes(average.shape)
    need = jnp.max(jnp.where(jnp.isfinite(coarsest), coarsest, 0), axes, keepdims=True)
    need = jnp.clip(need, _SMALLEST, _GREATEST)
    exponent = jax.lax.bitcast_convert_type(need, jnp.uint32) & _EXPONENT
    above = 2 * jax.lax.bitcast_convert_type(exponent, jnp.float32)
    lower = jnp.where(need * np.float32(_TOO_LARGE) < unit, unit / 2, unit)
    return jnp.where(need > unit, above, lower)
