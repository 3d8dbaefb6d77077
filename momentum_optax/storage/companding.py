r"""Signed numbers in a byte: square roots of what is near a row's scale, floats of few bits above and below.

With the scale as 1, the codes from `_FIRST` to `_LAST` are steps of a root,

$$ \sqrt{x} = \tfrac{1}{16} + \tfrac{15}{16}\,\frac{c - c_{first}}{c_{last} - c_{first}} $$

from 1/256 to 1. Below lies a foot: two levels an octave, 1 and 1.5 times a power of two, from 2^-22, then zero. Above
lies a tail: 2, then 16 times as much for each code, up to 3.4e7.

In the root a noise n in [-1/2, 1/2) that decoding repeats is subtracted before rounding, $c = \lfloor y - n + 1/2
\rfloor$, and comes back when reading: with y the root in steps, $y_c (y_c + 2n)$. Since $y_c + n$ is y plus an error
that is uniform whatever y is, and $y_c (y_c + 2n) = (y_c + n)^2 - n^2$, the mean over n is exactly y^2, and the error
has half the variance of ordinary stochastic rounding. Elsewhere a value goes to one of its two neighbours, up if
$2 |n|$ is below the share of the way from one to the other. That does not depend on the sign of n, so that the codes at
which root, foot and tail meet are their levels on average, as everything else is. Zero stays zero.

Absolute errors are those of a root, which sums of velocities need; relative ones stay below those of a float with one
bit, which divisions by an element's own size need.

Everything is done in the bits of float32: a few operations an element, which XLA fuses.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Codes by size: 0 is zero, then come `_FOOT` half octaves, the root from `_FIRST` to `_LAST`, and `_TAIL` strides of four
# octaves.
_FOOT, _TAIL, _MOST = 28, 7, 127
_FIRST, _LAST = _FOOT + 1, _MOST - _TAIL


# In the bits of a float32 whose 1 is the level of `_FIRST`: an octave and half of one, the last level of the root, and
# the next one.
_OCTAVE, _HALF, _STRIDE = 1 << 23, 1 << 22, 1 << 25
_ONE = 0x3F800000
_ROOT_END = _ONE + 8 * _OCTAVE
_BEYOND = _ROOT_END + _OCTAVE


# Of the root, from 1 to 16: steps for each 1, and what a step is.
_PER_ONE = np.float32((_LAST - _FIRST) / 15)
_STEP = np.float32(15 / (_LAST - _FIRST))


# The level of code 1, and the scale, over that of `_FIRST`.
_LOWEST = np.float32(2.0 ** -(_FOOT // 2))
SCALE = np.float32(256)


# The relative distance of neighbouring levels about the scale.
STEP_SIZE = float(2 * _STEP / 16)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def decode(codes: jax.Array, unit: jax.Array, noise: jax.Array) -> jax.Array:
    """The values of codes.

    Args:
      codes: int8.
      unit: float32, the scale over `SCALE`.
      noise: int32, uniform; that of `encode`.
    """
    code = codes.astype(jnp.float32)
    # Not `jnp.sign`, which XLA's GPU backend takes to be dear.
    sign = jnp.maximum(jnp.minimum(code, 1), -1)
    return unit * (level(jnp.abs(code), noise.astype(jnp.float32) * np.float32(_STEP * 2.0**-31)) * sign)


def level(size: jax.Array, noise: jax.Array | float = 0.0) -> jax.Array:
    """The level of a code above 0 by its size, a float, over that of `_FIRST`; a root's with `noise` added to it once.

    The bits of geometric levels are lines. XLA's GPU backend counts operations here, and would rather write the
    velocity to memory than do a few more of them for each of its three uses.
    """
    root = _line(size, _FIRST, 1, float(_STEP))
    foot, tail = _line(size, _FIRST, _ONE, _HALF), _line(size, _LAST + 1, _BEYOND, _STRIDE)
    # Before the tail any noise leaves the root above its line, which has no bits of NaN: it passes zero at a code.
    power = _float(jnp.where(size < _FIRST, foot, tail).astype(jnp.int32))
    return jnp.where(size < _FIRST, power, jnp.maximum(root * (root + noise), power))


def _line(x: jax.Array, at: int, value: float, slope: float) -> jax.Array:
    """The line through (at, value)."""
    return x * np.float32(slope) + np.float32(value - at * slope)


def encode(v: jax.Array, inverse: jax.Array, noise: jax.Array) -> jax.Array:
    """The codes of float32 values, int8; 0 for what is not finite.

    Args:
      v: float32.
      inverse: float32, `SCALE` over the scale, of either sign.
      noise: int32, uniform.
    """
    r = jnp.abs(v * inverse)
    n = noise.astype(jnp.float32) * np.float32(2.0**-32)
    # Rounded by a conversion that cuts, and not as the last bits of a large float: XLA may add a constant to it early.
    root = ((jnp.sqrt(r) - 1) * _PER_ONE - n + np.float32(_FIRST + 0.5)).astype(jnp.int32)
    x = _bits(r)
    code = jnp.where((x >= _ONE) & (x < _ROOT_END), root, _rounded(r, x, 2 * jnp.abs(n)))
    # The comparison is false for NaN.
    code = jnp.where(jnp.abs(v) <= np.finfo(np.float32).max, jnp.minimum(code, _MOST), 0)
    sign = _bits(v) >> 31
    return ((code ^ sign) - sign).astype(jnp.int8)


def _rounded(r: jax.Array, x: jax.Array, chance: jax.Array) -> jax.Array:
    """The code, by its size, of a value in foot or tail with the bits `x`; `chance` is uniform in [0, 1)."""
    # Each part is floats whose bits are cut by some number of places, counted from `end`.
    is_foot = x < _ONE
    end = jnp.where(is_foot, _ONE, _BEYOND)
    places = jnp.where(is_foot, 22, 25)
    whole = (x - end) >> places
    low = end + (whole << places)
    high = low + (jnp.int32(1) << places)
    # The cells at the ends: from the root to the tail, and from zero to the foot.
    low = jnp.where(is_foot, low, jnp.maximum(low, _ROOT_END))
    is_least = r < _LOWEST
    below = jnp.where(is_least, np.float32(0), _float(low))
    above = jnp.where(is_least, _LOWEST, _float(high))
    code = whole + jnp.where(is_foot, _FIRST, _LAST + 1)
    return jnp.where(is_least, 0, code) + (chance * (above - below) < r - below).astype(jnp.int32)
