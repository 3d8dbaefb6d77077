r"""Velocities in four bits, in the form of `int8`: square roots up to a bound, and one code for all that is beyond.

With the bound as 1, a code c from -6 to 6 stands for $c |c| / 36$, rounded and read with noise as in `companding`.

The code 7 stands for no one value. With u in [0, 1) the size of the noise, which decoding repeats, it is read as $1 +
2^{\lfloor 6 u \rfloor} / 4$, from 1.25 to 9. A value x > 1 becomes 7 if u is below t(x), and 6 if not, where
$\int_0^t 2^{\lfloor 6 u \rfloor} du = 4 (x - 1)$, so that the mean of what is read is x. In the bits of a float t is a
line: it is $(e + m) / 6$ where $1 + 24 (x - 1)$ is $2^e (1 + m)$. What is a little beyond the bound thus becomes
something a little beyond it, and what is far beyond keeps its mean up to where t is 1, at 3.6.

What is read of a code 6 is 1 on average still, since the sign of the noise decides nothing here.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._export import serializable
from .._typing import DType, Number
from ._int8 import Code, InOnePass, decoded
from .companding import SCALE
from .compressed import is_compressed, rescaled

# The bound in scales; the codes up to `_ROOTS` are square roots, and the next one stands for what is beyond.
_SHARE, _ROOTS = 0.64, 6
_BOUND = np.float32(_SHARE) * SCALE


# What is beyond is read as 1 + 2^`_FIRST`, or twice that beyond 1, and so on, `_OCTAVES` times.
_FIRST, _OCTAVES = -2, 6
_STEEP = _OCTAVES / 2.0**_FIRST


# The bits of 1.0, and where the exponent of a float begins.
_ONE, _EXPONENT = 127 << 23, 23


@serializable
class Int4Velocity(NamedTuple):
    """Velocities in four bits; each part a tuple of arrays, one per velocity or one that all velocities share.

    Attributes:
      codes: int4, of the leaf's shape; a leaf that is not compressed has its velocity here, in full. One per velocity.
      scale: float32, what the code 1 stands for; one entry per row. One per velocity.
      reach: float32, the least scale of the next write, one entry per row; 0 while it is not known.
      noise: uint32, odd, what the noise of the codes follows from; one entry per row.
    """

    codes: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]
    reach: tuple[jax.Array, ...]
    noise: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Int4Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        if not is_compressed(state.codes, jnp.int4):
            return state.codes
        velocities: tuple[jax.Array, ...] = decoded(_CODE, state.codes, state.scale, state.noise[0])
        return velocities

    @staticmethod
    def rescale(state: "Int4Velocity", factor: Number) -> "Int4Velocity":
        """The velocities times a number: the scales, a negative one too, and not the codes."""
        return rescaled(state, factor, jnp.int4)


def _float(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _place(noise: jax.Array) -> jax.Array:
    """6 u, in units in which an octave of the bits of a float is 1."""
    # Of a negative number one less than its size, so that all of them lie in [0, 2^31).
    size = noise ^ (noise >> 31)
    return ((size >> 3) * np.int32(_OCTAVES)) >> np.int32(28 - _EXPONENT)


def _beyond(octave: jax.Array) -> jax.Array:
    """What the last code stands for in an octave of 6 u, in bounds."""
    return _float((octave + np.int32(127 + _FIRST)) << _EXPONENT) + 1


def _encode(v: jax.Array, inverse: jax.Array, noise: jax.Array, phase: jax.Array | None) -> jax.Array:
    del phase
    r = jnp.abs(v * inverse) * np.float32(1 / _BOUND)
    n = noise.astype(jnp.float32) * np.float32(2.0**-32)
    # Half way to the next code where the noise is zero. A little less, so that a zero stays one.
    y = jnp.sqrt(jnp.minimum(r, 1)) * np.float32(_ROOTS) - n + np.float32(0.5 - 2.0**-25)
    is_beyond = _place(noise) + np.int32(_ONE) < _bits(r * np.float32(_STEEP) - np.float32(_STEEP - 1))
    code = jnp.minimum(y.astype(jnp.int32), _ROOTS) + is_beyond.astype(jnp.int32)
    # Not finite: the element starts anew. The comparison is false for NaN.
    code = jnp.where(jnp.abs(v) <= np.finfo(np.float32).max, code, 0)
    sign = _bits(v) >> 31
    return ((code ^ sign) - sign).astype(jnp.int4)


def _decode(codes: jax.Array, unit: jax.Array, noise: jax.Array) -> jax.Array:
    code = codes.astype(jnp.int32).astype(jnp.float32)
    size = jnp.abs(code)
    beyond = _beyond(_place(noise) >> _EXPONENT) * np.float32(_ROOTS**2 / (_ROOTS + 1))
    return unit * (code * jnp.where(size > _ROOTS, beyond, size + noise.astype(jnp.float32) * np.float32(2.0**-31)))


def _size(codes: jax.Array, noise: jax.Array) -> jax.Array:
    size = jnp.abs(codes.astype(jnp.int32))
    return jnp.where(size > _ROOTS, size + (_place(noise) >> _EXPONENT), size)


def _level(most: jax.Array) -> jax.Array:
    beyond = _beyond(most.astype(jnp.int32) - (_ROOTS + 1))
    return jnp.where(most > _ROOTS, beyond, most * most * np.float32(1 / _ROOTS**2)) * _BOUND


_CODE = Code(_encode, _decode, _size, _level, unit=float(_BOUND) / _ROOTS**2, share=_SHARE)


@dataclasses.dataclass(frozen=True)
class Int4(InOnePass[Int4Velocity]):
    """See `int4`."""

    code: ClassVar[Code] = _CODE
    state_type: ClassVar[type[Int4Velocity]] = Int4Velocity
    code_dtype: ClassVar[DType] = jnp.int4
    bytes_per_parameter: ClassVar[float] = 0.5
    step_size: ClassVar[float] = 2.0 / _ROOTS
    largest_decay: ClassVar[float] = 0.95


def int4(seed: int = 0, *, min_size: int = 4096, axis_names: tuple[str, ...] | None = None) -> Int4:
    r"""Velocities in four bits per parameter and velocity, plus 12 bytes per row (`storage.ROW_SIZE`)."""
    return Int4.checked(seed, min_size, axis_names)
