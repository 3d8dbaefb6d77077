r"""Velocities in four bits, in the form of `int8`: square roots up to a bound, and one code for all that is beyond.

With the bound as 1, a code c from -6 to 6 stands for $c |c| / 36$, rounded and read with noise as in `companding`.

The code 7 stands for no one value. Each row draws an octave k from 0 to 7 at every write, and there it is read as $1 +
2^k / 8$, from 1.125 to 17. With u in [0, 1) the size of an element's noise, a value x > 1 becomes 7 if k + u is below
t(x), and 6 if not, where $\int_0^t 2^{\lfloor s \rfloor} ds = 64 (x - 1)$: then the mean of what is read is x. In the
bits of a float t is a line: it is e + m where $1 + 64 (x - 1)$ is $2^e (1 + m)$. What is a little beyond the bound thus
becomes something a little beyond it, and what is far beyond keeps its mean up to where t is 8, at 5.

What is read of a code 6 is 1 on average still, since the sign of the noise decides nothing here. Octaves belong to rows
so that a row's largest code tells its largest value.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._export import serializable
from .._typing import DType, Number
from .companding import SCALE
from .compressed import is_compressed, rescaled
from .guard import MARGIN
from .one_pass import Code, InOnePass, decoded
from .rows import GROWTH

# The bound in scales; the codes up to `_ROOTS` are square roots, and the next one stands for what is beyond.
_SHARE, _ROOTS = 0.64, 6
_BOUND = np.float32(_SHARE) * SCALE
# What a row without anything beyond is taken to reach.
_STAY = np.float32(0.9) / MARGIN * SCALE


# What is beyond is read as 1 + 2^`_FIRST`, or that with twice the power, and so on, in so many octaves.
_FIRST, _OCTAVES = -3, 8
_STEEP = np.float32(_OCTAVES / 2.0**_FIRST)


# Where the exponent of a float begins, and the bits of 1.
_EXPONENT, _ONE = 23, np.int32(127 << 23)


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


def _octave(row: jax.Array, power: int) -> jax.Array:
    """The octave of each row, from its number `power` writes before, where a float's exponent is; 0 for 0."""
    row = row * np.uint32(GROWTH**power) if power else row
    return (row >> (29 - _EXPONENT)) & np.uint32((_OCTAVES - 1) << _EXPONENT)


def _if_beyond(is_beyond: jax.Array, row: jax.Array) -> jax.Array:
    """The number of an element's row where it lies beyond the bound, and 0 elsewhere.

    XLA's GPU backend would make a kernel of what is computed for rows alone.
    """
    return jnp.where(is_beyond, row, np.uint32(0))


def _encode(
    v: jax.Array, inverse: jax.Array, noise: jax.Array, phase: jax.Array | None, row: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del phase
    r = jnp.abs(v * inverse) * np.float32(1 / _BOUND)
    # Half way to the next code where the noise is zero. A little less, so that a zero stays one.
    half = np.float32(0.5 - 2.0**-25) - noise.astype(jnp.float32) * np.float32(2.0**-32)
    root = (jnp.sqrt(jnp.minimum(r, 1)) * np.float32(_ROOTS) + half).astype(jnp.int32)
    # Of a negative number one less than its size, so that an octave holds them all.
    size = noise ^ (noise >> 31)
    octave = jax.lax.bitcast_convert_type(_octave(_if_beyond(r > 1, row), 1), jnp.int32)
    place = (size >> (31 - _EXPONENT)) + _ONE + octave
    is_beyond = place < _bits(r * _STEEP - (_STEEP - 1))
    code = jnp.minimum(root, _ROOTS) + is_beyond.astype(jnp.int32)
    # Not finite: the element starts anew. The comparison is false for NaN.
    is_finite = jnp.abs(v) <= np.finfo(np.float32).max
    code = jax.lax.select(is_finite, code, jax.lax.full_like(code, 0))
    sign = _bits(v) >> 31
    codes = ((code ^ sign) - sign).astype(jnp.int4)
    kinds = is_finite & is_beyond, is_finite & (r > 0)
    return codes, jax.lax.platform_dependent(codes, *kinds, cpu=_size_on_cpu, default=_size)


def _size(codes: jax.Array, *_: jax.Array) -> jax.Array:
    return codes.astype(jnp.int8)


def _size_on_cpu(codes: jax.Array, is_beyond: jax.Array, is_nonzero: jax.Array) -> jax.Array:
    """As much as `_level` needs: XLA's CPU backend would compute the codes twice, and write their roots to memory."""
    del codes
    nonzero = is_nonzero.astype(jnp.int8)
    return jax.lax.select(is_beyond, jax.lax.full_like(nonzero, _ROOTS + 1), nonzero)


def _decode(codes: jax.Array, unit: jax.Array, noise: jax.Array, row: jax.Array) -> jax.Array:
    code = codes.astype(jnp.float32)
    size = jnp.abs(code)
    is_beyond = size > _ROOTS
    # Both over the code 7.
    bound = np.float32(_ROOTS**2 / (_ROOTS + 1))
    octave = _octave(_if_beyond(is_beyond, row), 0)
    beyond = _float(octave + np.float32(bound * 2.0**_FIRST).view(np.uint32)) + bound
    root = size + noise.astype(jnp.float32) * np.float32(2.0**-31)
    return unit * (code * jax.lax.select(is_beyond, beyond, root))


def _level(most: jax.Array, row: jax.Array) -> jax.Array:
    beyond = _float(_octave(row, 1) + np.float32(2.0**_FIRST).view(np.uint32)) + 1
    # Roots tell too little of how large a row is: where nothing lies beyond, the scale falls by a tenth.
    return jnp.where(most > _ROOTS, beyond * _BOUND, jnp.minimum(most, 1) * _STAY)


_CODE = Code(_encode, _decode, _level, unit=float(_BOUND) / _ROOTS**2, share=_SHARE)


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
    r"""Velocities in four bits per parameter and velocity, plus 12 bytes per row (`storage.ROW_SIZE`).

    For memories of about ten steps, decay 0.9, that are added to the weights: SGD, Nesterov. The rounding has no bias.
    On white noise one rounding is within 0.2 in norm, and as those of a whole memory add up the relative error of a
    stored velocity is 0.4; it was 0.6 to 0.7 for whole networks, whose final losses were about those of float32. Not
    for Adam, whose direction is lost (a cosine of 0.2) and whose steps become thousands of times as long; nor for Lion,
    whose decay is 0.99; and Muon refuses it. The error on white noise is 0.8 at decay 0.95, and at 0.99 the noise feeds
    itself, outgrows the velocity and training suffers; take `int8`. A decay above 0.95 that is a number gets a warning.
    Half a byte is what TPUs and GPUs store; XLA's CPU backend keeps a whole one for each code.

    Scales are those of `int8`, so that the first step of a leaf, a spike of all of a row and a row that wakes up as
    large as it was are as exact as any other step; fifty steps later most of what is left of a spike is noise.
    Fifteen codes have no room for what lies apart:

    * a single element that has grown keeps its mean up to 3.2 times its row's scale, about four times the row's largest
      value of the step before, and is clipped beyond. Above 0.64 scales it is read as up to eight times what it exceeds
      that by, at random, and the next scale follows what is read;
    * a first step of which the part that `int8` looks at is zero throughout is written at a scale of about 0.1, which
      then rises about threefold a step, or falls by a tenth once that part is not zero;
    * an element of less than 1 % of its row's largest is mostly noise, without bias.

    A NaN or infinite velocity is stored as zero: its element starts anew.

    Args:
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, number of
        writes, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full, as are complex ones; a whole
        number from 1.
      axis_names: None, or () to say that under `shard_map` or `pmap`, where JAX may not know, every device has whole
        leaves.

    Raises:
      ValueError: If a number is out of range, or `axis_names` names an axis.
      TypeError: If `seed` or `min_size` is not a whole number.

    Reference:
      Four-bit states: Li, Chen and Zhu, NeurIPS 2023, arXiv:2309.01507. Subtractive dither: see `int8`.
    """
    return Int4.checked(seed, min_size, axis_names)
