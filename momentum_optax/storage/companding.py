r"""Signed numbers in a byte: square roots of what is near a row's scale, floats of few bits above and below.

The codes from 28 to 120 are roots: with c the code less 23 and the scale as 1, the value is $(c/97)^2$, from 0.0027 to
1. Below lies a foot: levels at distances of half an octave, counted in the bits of a float, down to 2.3e-7, then zero.
Above lies a tail: 2, then 16 times as much for each code, up to 3.4e7.

In the root a noise n in [-1/2, 1/2) that decoding repeats is subtracted before rounding, $c = \lfloor y - n + 1/2
\rfloor$, and comes back when reading: $c (c + 2n)$. Since c + n is y plus an error that is uniform whatever y is, and
$c (c + 2n) = (c + n)^2 - n^2$, the mean over n is exactly y^2, and the error has half the variance of ordinary
stochastic rounding. Elsewhere a value goes to one of its two neighbours, up if $2 |n|$ is below the share of the way
from one to the other. That does not depend on the sign of n, so that the codes at which root, foot and tail meet are
their levels on average, as everything else is. Zero stays zero.

Absolute errors are those of a root, which sums of velocities need; relative ones stay below those of a float with one
bit, which divisions by an element's own size need.

Everything is done in the bits of float32: a few operations an element, which XLA fuses.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Codes by size: 0 is zero, then come `_FIRST` - 1 levels of the foot, the root from `_FIRST` to `_LAST`, and the tail.
_FIRST, _LAST, _MOST = 28, 120, 127


# A code of the root less this is the root of its level.
_SHIFT = 23


# Distances of levels in the bits of a float, of which an octave is 2^23.
_FOOT, _TAIL = 1 << 22, 1 << 25


# The bits of the levels of `_FIRST` and `_LAST`, of the level after that, and of that of code 1.
_ROOT, _ROOT_END = (int(np.float32((c - _SHIFT) ** 2).view(np.int32)) for c in (_FIRST, _LAST))
_BEYOND = _ROOT_END + (1 << 23)
_LEAST = _ROOT - (_FIRST - 1) * _FOOT


# The scale, that is the level of `_LAST`; and the relative distance of neighbouring levels about it.
SCALE = np.float32((_LAST - _SHIFT) ** 2)
STEP_SIZE = 2 / (_LAST - _SHIFT)


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
    return unit * (level(jnp.abs(code), noise.astype(jnp.float32) * np.float32(2.0**-31)) * sign)


def level(size: jax.Array, noise: jax.Array | float = 0.0) -> jax.Array:
    """The level of a code above 0 by its size, a float; `SCALE` at the scale. `noise` is twice a root's.

    The bits of the other levels are lines. XLA's GPU backend counts operations here, and would rather write the
    velocity to memory than do a few more of them for each of its three uses.
    """
    foot, tail = _line(size, _FIRST, _ROOT, _FOOT), _line(size, _LAST + 1, _BEYOND, _TAIL)
    power = _float(jnp.where(size < _FIRST, foot, tail).astype(jnp.int32))
    # Before the tail any noise leaves the root above its line.
    root = size - np.float32(_SHIFT)
    return jnp.where(size < _FIRST, power, jnp.maximum(root * (root + noise), power))


def _line(x: jax.Array, at: int, value: int, slope: int) -> jax.Array:
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
    root = (jnp.sqrt(r) - n + np.float32(_SHIFT + 0.5)).astype(jnp.int32)
    x = _bits(r)
    code = jnp.where((x >= _ROOT) & (x < _ROOT_END), root, _rounded(r, x, 2 * jnp.abs(n)))
    # The comparison is false for NaN.
    code = jnp.where(jnp.abs(v) <= np.finfo(np.float32).max, jnp.minimum(code, _MOST), 0)
    sign = _bits(v) >> 31
    return ((code ^ sign) - sign).astype(jnp.int8)


def _rounded(r: jax.Array, x: jax.Array, chance: jax.Array) -> jax.Array:
    """The code, by its size, of a value in foot or tail with the bits `x`; `chance` is uniform in [0, 1)."""
    is_foot = x < _ROOT
    end = jnp.where(is_foot, _ROOT, _BEYOND)
    # How many levels from the end, rounded down: one too few or too many at a level itself does no harm.
    whole = jnp.floor((x - end).astype(jnp.float32) * jnp.where(is_foot, np.float32(1 / _FOOT), np.float32(1 / _TAIL)))
    whole = whole.astype(jnp.int32)
    distance = jnp.where(is_foot, _FOOT, _TAIL)
    low = end + whole * distance
    # The cells at the ends: from the root to the tail, and from zero to the foot.
    below = _float(jnp.where(is_foot, low, jnp.maximum(low, _ROOT_END)))
    is_least = x < _LEAST
    below = jnp.where(is_least, np.float32(0), below)
    above = _float(jnp.where(is_least, _LEAST, low + distance))
    code = jnp.where(is_least, 0, whole + jnp.where(is_foot, _FIRST, _LAST + 1))
    return code + (chance * (above - below) < r - below).astype(jnp.int32)
