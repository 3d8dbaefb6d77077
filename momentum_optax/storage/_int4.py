r"""Velocities in four bits: square roots as in `int8`, for codes up to K = 6, and one code beyond for 4 scales.

Values between one scale and four are rounded to either at random. Whether up or not is decided by the size of the noise
and not by its sign, so that what is read of a code K is one scale on average still.

Fifteen codes cannot hold both values and where they lie. While a leaf has no scale its codes hold the latter alone: the
exponents of its velocities in strides of 36 octaves, which begin elsewhere in every row, so that together the rows tell
how large the largest is.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._export import serializable
from .._typing import Count, DType, Number, jitted
from .compressed import Compressed, Part, is_compressed, rescaled
from .noise import stamp_of
from .protocol import EncodeContext
from .rows import next_margin, row_hashes, row_largest, row_noise
from .slopes import marked, unmarked

# Codes up to K are square roots; the last one stands for `_BEYOND` scales.
_BODY, _LAST, _BEYOND = 6, 7, 4.0


# While a leaf has no scale: octaves per code.
_STRIDE = 36


# The scale is `margin` times the largest recent value. That value falls by the factor `_FORGET` a step, to no less than
# `_FLOOR` of the leaf's largest.
_FORGET, _MARGIN, _OUTGROWN, _FLOOR = 0.9, 2.0, 0.05, 2.0**-8


# Between these a scale and its inverse are floats.
_SMALLEST, _GREATEST = 2.0**-110, 2.0**120


@serializable
class Int4Velocity(NamedTuple):
    """Velocities in four bits; each part a tuple of arrays, one per velocity or one that all velocities share.

    Attributes:
      codes: int4, of the leaf's shape; a leaf that is not compressed has its velocity here, in full. One per velocity.
      gain: float32, one entry: what the scale is multiplied by for this velocity. One per velocity.
      scale: float32, what the codes were written with; one entry per row. Zero while a leaf has none.
      reach: float32, the largest recent value, falling slowly; one entry per row.
      margin: float32, one entry: the factor from `reach` to the next scale.
      stamp: uint32, one entry: the noise that the codes were written with.
    """

    codes: tuple[jax.Array, ...]
    gain: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]
    reach: tuple[jax.Array, ...]
    margin: tuple[jax.Array, ...]
    stamp: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Int4Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        return _decoded(state) if is_compressed(state.codes, jnp.int4) else state.codes

    @staticmethod
    def rescale(state: "Int4Velocity", factor: Number) -> "Int4Velocity":
        """The velocities times a number: the scales, a negative one too, and not the codes."""
        return rescaled(state, factor, jnp.int4)


@dataclasses.dataclass(frozen=True)
class Int4(Compressed[Int4Velocity]):
    """See `int4`."""

    state_type: ClassVar[type[Int4Velocity]] = Int4Velocity
    code_dtype: ClassVar[DType] = jnp.int4
    beside_codes: ClassVar[dict[str, Part]] = {
        "gain": Part("leaf", jnp.float32, shared=False, initial=1),
        "scale": Part("row", jnp.float32),
        "reach": Part("row", jnp.float32),
        "margin": Part("leaf", jnp.float32),
        "stamp": Part("leaf", jnp.uint32),
    }
    bytes_per_parameter: ClassVar[float] = 0.5
    step_size: ClassVar[float] = 2.0 / _BODY
    largest_decay: ClassVar[float] = 0.95

    def compress(
        self, velocities: tuple[jax.Array, ...], previous: Int4Velocity, context: EncodeContext
    ) -> Int4Velocity:
        """The codes of the velocities, at a scale that follows from the steps before."""
        before, noise = (previous.reach[0], previous.margin[0]), context.noise_of(self.seed)
        return _encoded(velocities, context.relative_scales, before, noise)


def int4(seed: int = 0, *, min_size: int = 4096, axis_names: tuple[str, ...] | None = None) -> Int4:
    r"""Velocities in four bits per parameter and velocity, plus 8 bytes per row (`storage.ROW_SIZE`).

    For memories of about ten steps, decay 0.9, that are added to the weights: SGD, Nesterov. There the
    relative error of a stored velocity is 0.4 on white noise and was 0.6 to 0.8 for whole networks, without bias; their
    final losses were about those of float32. Not for Adam, whose direction is lost (a cosine of 0.2) and whose steps
    become thousands of times as long; nor for Lion, whose decay is 0.99; and Muon refuses it. The
    noise of each step adds up over the memory: at decay 0.95 it is about as large as the velocity, and at 0.99 it feeds
    itself, outgrows the velocity and training suffers; take `int8`. A decay above 0.95 that is a number gets a warning.
    Half a byte is what TPUs and GPUs store; XLA's CPU backend keeps a whole one for each code.

    Further losses, the heaviest first:

    * the first step of a leaf tells its scale and nothing else: the velocity begins with the second gradient. (To keep
      the first, take it in float32 and `convert` the state.) A leaf of less than ten rows may need a few steps more;
    * an element of more than 4 times its row's scale is clipped to that limit. Scales follow by up to 8 times a
      step, so that of a lone spike little is left, and a lasting rise is followed at once;
    * a row far below its leaf's largest, less than 2^-12 of it, is mostly noise, without bias.

    A NaN or infinite velocity is stored as zero: its element starts anew.

    Args:
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, step, leaf, velocity, element).
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


@jitted
def _decoded(state: Int4Velocity) -> tuple[jax.Array, ...]:
    """The velocities of one leaf in four bits."""
    (scale,), (stamp,) = state.scale, state.stamp
    scale = unmarked(scale)
    hashes = row_hashes(state.codes[0].shape)
    return tuple(
        _decode(codes, scale * gain, row_noise(hashes, stamp, k))
        for k, (codes, gain) in enumerate(zip(state.codes, state.gain, strict=True))
    )


@jitted
def _encoded(
    velocities: tuple[jax.Array, ...],
    scales: tuple[Number, ...],
    before: tuple[jax.Array, jax.Array],
    noise: tuple[Count, Count],
) -> Int4Velocity:
    """The velocities of one leaf in four bits, at a scale that follows from the steps before."""
    reach, margin = before
    most = jnp.max(reach, keepdims=True)
    scale = jnp.clip(margin * jnp.maximum(reach, most * _FLOOR), _SMALLEST, _GREATEST)
    scale = jnp.where(most > 0, scale, 0.0)
    stamp = stamp_of(*noise).reshape((1,) * reach.ndim)
    hashes = row_hashes(velocities[0].shape)
    gain = tuple(jnp.full((1,) * reach.ndim, g, jnp.float32) for g in scales)
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
