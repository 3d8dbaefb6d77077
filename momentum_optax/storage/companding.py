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

A value that the optimizer divides by its size, as in Adam, must not become much larger by rounding: where
one neighbour is far above, as below the foot and in the tail, it goes to the lower one, although the mean is less then.
And up to the eighth its chances take turns from write to write, which leaves a third of the error of independent ones
in an average of ten.

Absolute errors are those of a root, which sums of velocities need; relative ones stay below those of a float with one
bit, which divisions by an element's own size need.

Everything is done in the bits of float32: a few operations an element, which XLA fuses. They are functions of
`jax.lax`: an operator of `jax.numpy` is traced as a function of its own, anew for every shape, in three times the time.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Codes by size: 0 is zero, then come `_FIRST` - 1 levels of the foot, the root from `_FIRST` to `_LAST`, and the tail.
_FIRST, _LAST, _MOST = 28, 120, 127


# A code of the root less this is the root of its level.
_SHIFT = 23


# Distances of levels in the bits of a float, of which an octave is 2^23.
_FOOT_BITS, _TAIL_BITS = 22, 25
_FOOT, _TAIL = 1 << _FOOT_BITS, 1 << _TAIL_BITS


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
    code = codes.astype(jnp.int32)
    # Not `jnp.sign`, which XLA's GPU backend takes to be dear.
    sign = jax.lax.clamp(np.float32(-1), code.astype(jnp.float32), np.float32(1))
    twice = jax.lax.mul(noise.astype(jnp.float32), np.float32(2.0**-31))
    return jax.lax.mul(unit, jax.lax.mul(level(jax.lax.abs(code), twice), sign))


def level(size: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    """The level of a code above 0 by its size, int32; `SCALE` at the scale. `noise` is twice a root's.

    The bits of the other levels are lines. XLA's GPU backend counts operations here, and would rather write the
    velocity to memory than do a few more of them for each of its three uses.
    """
    root = jax.lax.sub(size.astype(jnp.float32), np.float32(_SHIFT))
    root = jax.lax.mul(root, root if noise is None else jax.lax.add(root, noise))
    # Before the tail any noise leaves the root above its line. Positive floats compare as their bits do.
    above = jax.lax.max(_bits(root), _line(size, _LAST + 1, _BEYOND, _TAIL))
    return _float(_either(jax.lax.lt(size, np.int32(_FIRST)), _line(size, _FIRST, _ROOT, _FOOT), above))


def _line(x: jax.Array, at: int, value: int, distance: int) -> jax.Array:
    """The line through (at, value) of a slope that is a power of two, modulo 2^32."""
    start = np.uint32((value - at * distance) % 2**32).view(np.int32)
    return jax.lax.add(jax.lax.shift_left(x, np.int32(distance.bit_length() - 1)), start)


def _either(condition: jax.Array, x: jax.Array | int, y: jax.Array | int) -> jax.Array:
    """`jnp.where` for int32, without a function to inline."""
    full = (jax.lax.full_like(condition, z, jnp.int32) if isinstance(z, int) else z for z in (x, y))
    return jax.lax.select(condition, *full)


def encode(v: jax.Array, inverse: jax.Array, noise: jax.Array, phase: jax.Array | None = None) -> jax.Array:
    """The codes of float32 values, int8; 0 for what is not finite.

    Args:
      v: float32.
      inverse: float32, `SCALE` over the scale, of either sign.
      noise: int32, uniform.
      phase: int32 from 0 to 7, the leading bits of the chances, of values that the optimizer divides by their size;
        None of other values.
    """
    r = jax.lax.abs(jax.lax.mul(v, inverse))
    n = jax.lax.mul(noise.astype(jnp.float32), np.float32(2.0**-32))
    # Rounded by a conversion that cuts, and not as the last bits of a large float: XLA adds a constant to it early, and
    # what is stored is no longer right on average.
    root = jax.lax.add(jax.lax.sub(jax.lax.sqrt(r), n), np.float32(_SHIFT + 0.5)).astype(jnp.int32)
    x = _bits(r)
    is_foot, is_tail = jax.lax.lt(x, np.int32(_ROOT)), jax.lax.ge(x, np.int32(_ROOT_END))
    chance = jax.lax.mul(jax.lax.abs(n), np.float32(2))
    code = _either(jax.lax.bitwise_or(is_foot, is_tail), _rounded(r, x, is_foot, chance, phase), root)
    # The comparison is false for NaN.
    is_finite = jax.lax.le(jax.lax.abs(v), np.finfo(np.float32).max)
    code = _either(is_finite, jax.lax.min(code, np.int32(_MOST)), 0)
    sign = jax.lax.shift_right_arithmetic(_bits(v), np.int32(31))
    return jax.lax.sub(jax.lax.bitwise_xor(code, sign), sign).astype(jnp.int8)


def _rounded(r: jax.Array, x: jax.Array, is_foot: jax.Array, chance: jax.Array, phase: jax.Array | None) -> jax.Array:
    """The code, by its size, of a value in foot or tail with the bits `x`; `chance` is uniform in [0, 1)."""
    end, shift = _either(is_foot, _ROOT, _BEYOND), _either(is_foot, _FOOT_BITS, _TAIL_BITS)
    whole = jax.lax.shift_right_arithmetic(jax.lax.sub(x, end), shift)
    low = jax.lax.add(end, jax.lax.shift_left(whole, shift))
    high = jax.lax.add(end, jax.lax.shift_left(jax.lax.add(whole, np.int32(1)), shift))
    code = jax.lax.max(jax.lax.add(whole, _either(is_foot, _FIRST, _LAST + 1)), np.int32(0))
    # The cells at the ends: from the root to the tail, and from zero to the foot.
    below = _either(is_foot, low, jax.lax.max(low, np.int32(_ROOT_END)))
    below = _float(_either(jax.lax.gt(code, np.int32(0)), below, 0))
    above = _float(jax.lax.max(high, np.int32(_LEAST)))
    if phase is not None:
        chance = jax.lax.mul(jax.lax.add(phase.astype(jnp.float32), chance), np.float32(1 / 8))
    is_up = jax.lax.lt(jax.lax.mul(chance, jax.lax.sub(above, below)), jax.lax.sub(r, below))
    if phase is not None:
        # Of the foot the levels are no farther apart.
        is_up = jax.lax.bitwise_and(is_up, jax.lax.le(above, jax.lax.mul(r, np.float32(1.5))))
    return jax.lax.add(code, is_up.astype(jnp.int32))
