r"""Velocities in four bits: square roots as in `byte`, for codes up to K = 6, and one code beyond for 4 scales.

Values between one scale and four are rounded to either at random. Whether up or not is decided by the size of the noise
and not by its sign, so that what is read of a code K is one scale on average still.

Fifteen codes cannot hold both values and where they lie. While a leaf has no scale its codes hold the latter alone: the
exponents of its velocities in strides of 36 octaves, which begin elsewhere in every row, so that together the rows tell
how large the largest is.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .noise import stamp_of
from .protocol import Write, check_axis_names, times
from .rows import layout_of, next_margin, row_hashes, row_largest, row_noise, zeros_along
from .slopes import marked, unmarked

# Codes up to K are square roots; the last one stands for so many scales.
_BODY, _LAST, _BEYOND = 6, 7, 4.0


# While a leaf has no scale: octaves per code.
_STRIDE = 36


# The scale is `margin` times the largest recent value, which falls so much a step, but so much of the leaf's at least.
_FORGET, _MARGIN, _OUTGROWN, _FLOOR = 0.9, 2.0, 0.05, 2.0**-8


# Between these a scale and its inverse are floats.
_SMALLEST, _GREATEST = 2.0**-110, 2.0**120


class Int4Velocity(NamedTuple):
    """Velocities in four bits; each part a tuple of arrays, one per velocity or one that all velocities share.

    Attributes:
      codes: int4, of the leaf's shape; a leaf that is not compressed has its velocity here, in full. One per velocity.
      gain: float32, one entry: what the scale is multiplied by for this velocity. One per velocity.
      scale: float32, what the codes were written with; one entry per row. Zero while a leaf has none.
      reach: float32, the largest recent value, falling slowly; one entry per row.
      margin: float32, one entry: the next scale is so many times `reach`.
      stamp: uint32, one entry: the noise that the codes were written with.
    """

    codes: tuple[Any, ...]
    gain: tuple[Any, ...]
    scale: tuple[Any, ...]
    reach: tuple[Any, ...]
    margin: tuple[Any, ...]
    stamp: tuple[Any, ...]

    @staticmethod
    def decode(parts: "Int4Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        if not parts.codes or parts.codes[0].dtype != jnp.int4:
            return parts.codes
        read: tuple[jax.Array, ...] = _read(parts)
        return read

    @staticmethod
    def rescale(parts: "Int4Velocity", factor: Any) -> "Int4Velocity":
        """The velocities times a number: the scales, a negative one too, and not the codes."""
        return parts._replace(
            codes=tuple(x if x.dtype == jnp.int4 else times(x, factor) for x in parts.codes),
            scale=tuple(times(x, factor) for x in parts.scale),
            reach=tuple(times(x, jnp.abs(factor)) for x in parts.reach),
        )


@dataclasses.dataclass(frozen=True)
class Int4:
    """See `int4`."""

    seed: int = 0
    min_size: int = 4096
    axis_names: tuple[str, ...] | None = None
    parts: ClassVar[Any] = Int4Velocity
    reads_step: ClassVar[bool] = True
    bytes_per_parameter: ClassVar[float] = 0.5
    step_size: ClassVar[float] = 2.0 / _BODY
    largest_decay: ClassVar[float] = 0.95

    def init(self, leaf: Any, order: int) -> Int4Velocity:
        """Zeros; each array made on its own, since two that shared a buffer could not be donated."""
        layout = layout_of(leaf, self.min_size, jnp.int4)
        return Int4Velocity(
            codes=layout.codes(leaf, order),
            gain=tuple(jnp.ones(layout.one, jnp.float32) for _ in range(order)),
            **{
                name: tuple(zeros_along(leaf, shape, dtype) for _ in range(min(order, 1)))
                for name, shape, dtype in (
                    ("scale", layout.row, jnp.float32),
                    ("reach", layout.row, jnp.float32),
                    ("margin", layout.one, jnp.float32),
                    ("stamp", layout.one, jnp.uint32),
                )
            },
        )

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, write: Write) -> Int4Velocity:
        """The velocities in four bits, where `previous` is."""
        old = previous.codes
        if not old or old[0].dtype != jnp.int4:
            full = tuple(v.astype(x.dtype) for v, x in zip(velocities, old, strict=True))
            return Int4Velocity(full, *previous[1:])
        one = (1,) * old[0].ndim
        gain = tuple(jnp.full(one, g, jnp.float32) for g in write.gains)
        stamp = stamp_of(self.seed, write.stamp)
        written: Int4Velocity = _written(velocities, gain, previous.reach[0], previous.margin[0], stamp)
        return written


def int4(seed: int = 0, *, min_size: int = 4096, axis_names: tuple[str, ...] | None = None) -> Int4:
    r"""Velocities in four bits per parameter and velocity, plus 8 bytes for each row of at least 512 elements.

    For memories of about ten steps, decay 0.9. There the relative error of a stored velocity is 0.4 on white noise and
    was 0.6 to 0.8 for the leaves of three networks, without bias; their final losses were about those of float32. The
    noise of each step adds up over the memory: at decay 0.95 it is about as large as the velocity, and at 0.99 it feeds
    itself, outgrows the velocity and training suffers; take `int8`. A decay above 0.95 that is a number gets a warning.
    Half a byte is what TPUs and GPUs store; XLA's CPU backend keeps a whole one for each code.

    What is lost, besides, in this order of weight:

    * the first step of a leaf tells its scale and nothing else: the velocity begins with the second gradient. (To keep
      the first, take it in float32 and `convert` the state.) A leaf of less than ten rows may need a few steps more;
    * an element of more than 4 times its row's scale is cut there. Scales follow by up to 8 times a step, so that of a
      lone spike little is left, and a lasting rise is followed at once;
    * a row far below its leaf's largest, less than 2^-12 of it, is mostly noise, without bias.

    A NaN or infinite velocity is stored as zero: its element starts anew.

    Args:
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, step, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full, as are complex ones; a whole
        number from 1.
      axis_names: Under `shard_map` and `pmap`, the mesh axes along which a leaf is split. None: whatever JAX knows, an
        error where it is split, or where JAX does not know (`check_vma=False`, `pmap`). (): none, every device has
        whole leaves, though perhaps its own.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is no number.

    Reference:
      Four-bit states: Li, Chen and Zhu, NeurIPS 2023, arXiv:2309.01507. Subtractive dither: see `int8`.
    """
    _checks.seed(seed)
    _checks.integer("min_size", min_size, 1)
    check_axis_names(axis_names)
    return Int4(int(seed), int(min_size), axis_names)


# Traced once for all leaves of a shape.
@jax.jit
def _read(parts: Int4Velocity) -> tuple[jax.Array, ...]:
    """The velocities of one leaf in four bits."""
    (scale,), (stamp,) = parts.scale, parts.stamp
    scale = unmarked(scale)
    hashes = row_hashes(parts.codes[0].shape)
    return tuple(
        _decode(codes, scale * gain, row_noise(hashes, stamp, k))
        for k, (codes, gain) in enumerate(zip(parts.codes, parts.gain, strict=True))
    )


@jax.jit
def _written(velocities: Any, gain: Any, reach: jax.Array, margin: jax.Array, stamp: jax.Array) -> Int4Velocity:
    """The velocities of one leaf in four bits, at a scale that follows from the steps before."""
    most = jnp.max(reach, keepdims=True)
    scale = jnp.clip(margin * jnp.maximum(reach, most * _FLOOR), _SMALLEST, _GREATEST)
    scale = jnp.where(most > 0, scale, 0.0)
    stamp, hashes = stamp.reshape((1,) * reach.ndim), row_hashes(velocities[0].shape)
    begin = (stamp_of(stamp, -1, hashes[0]) >> 8).astype(jnp.float32) * np.float32(_STRIDE * 2.0**-24)
    codes = tuple(
        _encode(v.astype(jnp.float32), scale * g, begin, row_noise(hashes, stamp, k))
        for k, (v, g) in enumerate(zip(velocities, gain, strict=True))
    )
    largest = row_largest(codes)
    level = scale * jnp.where(largest == _LAST, _BEYOND, largest * largest * np.float32(1 / _BODY**2))
    known = most > 0
    return Int4Velocity(
        codes,
        gain,
        (marked(scale, *velocities),),
        (jnp.where(known, jnp.maximum(level, _FORGET * reach), _found(largest, begin)),),
        (jnp.where(known, next_margin(margin, level > scale, _OUTGROWN), np.float32(_MARGIN)),),
        (stamp,),
    )


def _decode(codes: jax.Array, scale: jax.Array, noise: jax.Array) -> jax.Array:
    unit: jax.Array = jax.lax.optimization_barrier(scale * np.float32(1 / _BODY**2))
    code = codes.astype(jnp.float32)
    size = jnp.abs(code)
    return unit * jnp.where(size > _BODY, code * np.float32(_BEYOND * _BODY**2 / _LAST), size * (code + 2 * noise))


def _encode(v: jax.Array, scale: jax.Array, begin: jax.Array, noise: jax.Array) -> jax.Array:
    inverse: jax.Array = jax.lax.optimization_barrier(jnp.where(scale > 0, 1 / scale, 0.0))
    size = jnp.abs(v)
    scaled = size * inverse
    up = 2 * jnp.abs(noise) * np.float32(_BEYOND - 1) < scaled - 1
    whole = jnp.where(inverse > 0, jnp.where(up, np.float32(_LAST), np.float32(_BODY)), _stride(size, begin))
    body = (scaled < 1) & (inverse > 0)
    y = jnp.where(body, jnp.sqrt(scaled) * np.float32(_BODY), whole)
    # Half way to the next code where that is not decided yet. A little less, so that a zero stays one.
    shift = jnp.where(body, np.float32(0.5 - 2.0**-25) - noise, np.float32(0.5))
    y = jnp.where(v < 0, -y, y) + shift
    # Not finite: the element starts anew. The comparison is false for NaN.
    y = jnp.where(size <= np.finfo(np.float32).max, y, 0.5)
    return jnp.floor(y).astype(jnp.int32).astype(jnp.int4)


def _stride(size: jax.Array, begin: jax.Array) -> jax.Array:
    """In which stride of octaves the exponent lies, from 1; 0 for zero."""
    octave = (jax.lax.bitcast_convert_type(size, jnp.int32) >> 23).astype(jnp.float32)
    code = jnp.minimum(jnp.floor((octave + begin) * np.float32(1 / _STRIDE)), _LAST)
    return jnp.where(octave > 0, code, 0.0)


def _found(largest: jax.Array, begin: jax.Array) -> jax.Array:
    """About the largest value of the leaf, for every row, from the highest stride of each."""
    # Not exp2: the exponent alone, in the bits of a float.
    octave = jnp.clip(largest * _STRIDE - begin + 1, 1, 254).astype(jnp.int32)
    value = jnp.where(largest > 0, jax.lax.bitcast_convert_type(octave << 23, jnp.float32), 0.0)
    return jnp.broadcast_to(jnp.max(value, keepdims=True), largest.shape)
