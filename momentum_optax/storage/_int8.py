r"""Velocities in one byte, written and read elementwise so that XLA keeps the whole optimizer step in one pass.

A velocity v of a row with scale s is companded by a signed square root, $y = \pm K \sqrt{|v|/s}$, so that small values
keep small errors. Noise n in [-1/2, 1/2), a hash that decoding repeats, is subtracted before rounding,
$c = \lfloor y - n + 1/2 \rfloor$, and comes back when reading, $|c| (c + 2n)\,s/K^2$. Since c + n is y plus an error
that is uniform whatever y is, and $c (c + 2n) = (c + n)^2 - n^2$, the mean over n is exactly v, and the error has half
the variance of ordinary stochastic rounding. Zero stays zero.

The scale must be known before the maximum is. It is a multiple of the largest value of the steps before, which is read
off the codes themselves: a maximum over bytes that are written anyway costs no pass, one over float32 would. Values
beyond the scale take the codes above K, whose levels are the squares of $1 + (4^t - 1)/64$, 1.1, 1.5, 3.9, 25, 288, ...
scales, and are rounded between them at random. While a leaf has no scale at all every code is a power of 4, from the
least float32 up.

The form of the code follows from XLA's fusion: a handful of operations, or one more array or number that a step reads
besides its large ones, decide whether it is compiled into one pass.
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
from .rows import next_margin, row_hashes, row_largest, row_noise, split_as
from .slopes import marked, unmarked

# Codes up to K are square roots, those from K + 1 to 127 the tail.
_BODY, _LAST = 118, 127


# Roots of the tail's levels, in scales: 1 + (4^t - 1) of these. What makes the power of their code of 4^t of them.
_NEAR = 2.0**-6


_POWERS = 4.0 ** (_BODY - 64) / _NEAR


# Floats of this size lie one apart.
_WHOLE = 1.5 * 2.0**23


# Between these a scale, its inverse and every level of it are floats.
_SMALLEST, _GREATEST = 2.0**-110, 2.0**102


# The scale is `margin` times the largest recent value. `margin` follows the share of rows that outgrew theirs.
_FORGET, _MARGIN, _OUTGROWN = 0.9, 2.0, 0.01


@serializable
class Int8Velocity(NamedTuple):
    """Velocities in one byte; each part a tuple of arrays, one per velocity or one that all velocities share.

    Attributes:
      codes: int8, of the leaf's shape; a leaf that is not compressed has its velocity here, in full. One per velocity.
      gain: float32, one entry: what the scale is multiplied by for this velocity. One per velocity.
      scale: float32, what the codes were written with, K^2 while there is no scale; one entry per row.
      body: float32, one entry: the last code before the tail; 0 without a scale.
      reach: float32, the largest recent value, falling slowly; one entry per row.
      margin: float32, one entry: the factor from `reach` to the next scale.
      stamp: uint32, one entry: the noise that the codes were written with.
    """

    codes: tuple[jax.Array, ...]
    gain: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]
    body: tuple[jax.Array, ...]
    reach: tuple[jax.Array, ...]
    margin: tuple[jax.Array, ...]
    stamp: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Int8Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        return _decoded(state) if is_compressed(state.codes, jnp.int8) else state.codes

    @staticmethod
    def rescale(state: "Int8Velocity", factor: Number) -> "Int8Velocity":
        """The velocities times a number: the scales, a negative one too, and not the codes."""
        return rescaled(state, factor, jnp.int8)


@dataclasses.dataclass(frozen=True)
class Int8(Compressed[Int8Velocity]):
    """See `int8`."""

    state_type: ClassVar[type[Int8Velocity]] = Int8Velocity
    code_dtype: ClassVar[DType] = jnp.int8
    beside_codes: ClassVar[dict[str, Part]] = {
        "gain": Part("leaf", jnp.float32, shared=False, initial=1),
        "scale": Part("row", jnp.float32),
        "body": Part("leaf", jnp.float32),
        "reach": Part("row", jnp.float32),
        "margin": Part("leaf", jnp.float32),
        "stamp": Part("leaf", jnp.uint32),
    }
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = 2.0 / _BODY

    def compress(
        self, velocities: tuple[jax.Array, ...], previous: Int8Velocity, context: EncodeContext
    ) -> Int8Velocity:
        """The codes of the velocities, at a scale that follows from the steps before."""
        before, noise = (previous.reach[0], previous.margin[0]), context.noise_of(self.seed)
        return _encoded(velocities, context.relative_scales, before, noise)


def int8(seed: int = 0, *, min_size: int = 4096, axis_names: tuple[str, ...] | None = None) -> Int8:
    r"""Velocities in one byte per parameter and velocity, plus 8 bytes per row (`storage.ROW_SIZE`).

    The rounding has no bias, at any size. On white noise the relative error of a stored velocity, in rows of 512, is
    below 0.03 for decay 0.9 and 0.08 for 0.99; it grows with the memory, and slowly with the row. A row's scale follows
    its largest value of the steps before, so that a step needs no second look at its data. It is 1.1 to 4 times that
    value; on steady noise one row in a hundred outgrows it in a step. Values that do are not clipped but rounded
    coarsely for that step, between levels that lie 1.1, 1.4, 2.6, and further out up to 16 times apart (the scale then
    falls by a tenth a step):

    * the first step of a leaf, which has no scale yet: the error of the first velocity is between half of it and all of
      it, and fades with it. To have the first step exact as well, take it in float32 and `convert` the state;
    * a spike, or a row that wakes up after a long silence: off by about its own size for that step, in norm; a single
      element may come out up to 16 times too large.

    What is below 7e-5 of its row's scale is stored as zero or as one unit, at random. The mean is right, which is
    enough for an update that is added to the weights. Adam, Lion and Muon divide an element by its own size or take its
    sign: under them columns whose gradients are 1000 times smaller than their row's largest lose their direction, and
    steps can become many times too long. Keep such leaves in bfloat16.

    An element more than 1.7e7 times its row's scale is clipped to that limit. Rows below 2^-24 of their leaf's
    largest are coarser the smaller they are. Velocities below 1.2e-38 are zero. A NaN or infinite velocity is stored as
    zero: its element starts anew.

    Args:
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, step, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full, as are complex ones; a whole
        number from 1.
      axis_names: Under `shard_map` and `pmap`, the mesh axes along which a leaf is split. None: whatever JAX knows, an
        error where it is split, or where JAX does not know (`check_vma=False`, `pmap`). (): none, every device has
        whole leaves, though perhaps its own.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `seed` or `min_size` is not a whole number.

    Reference:
      Subtractive dither: Roberts, IRE Trans. Information Theory 1962; Gray and Stockham, IEEE Trans. Information Theory
      1993. Eight-bit optimizer states: Dettmers et al., ICLR 2022, arXiv:2110.02861.
    """
    return Int8.checked(seed, min_size, axis_names)


@jitted
def _decoded(state: Int8Velocity) -> tuple[jax.Array, ...]:
    """The velocities of one leaf in bytes."""
    (scale,), (body,), (stamp,) = state.scale, state.body, state.stamp
    scale = unmarked(scale)
    hashes = row_hashes(state.codes[0].shape)
    return tuple(
        _decode(codes, scale * gain, body, row_noise(hashes, stamp, k))
        for k, (codes, gain) in enumerate(zip(state.codes, state.gain, strict=True))
    )


@jitted
def _encoded(
    velocities: tuple[jax.Array, ...],
    scales: tuple[Number, ...],
    before: tuple[jax.Array, jax.Array],
    noise: tuple[Count, Count],
) -> Int8Velocity:
    """The velocities of one leaf in bytes, at a scale that follows from the steps before."""
    reach, margin = before
    known = jnp.max(reach, keepdims=True) > 0
    # A row that looks silent may yet wake up: keep it within reach of the tail.
    scale = jnp.maximum(margin * reach, jnp.max(reach, keepdims=True) * 2.0**-24)
    scale = jnp.where(known, jnp.clip(scale, _SMALLEST, _GREATEST), np.float32(1))
    body = jnp.where(known, np.float32(_BODY), np.float32(0))
    stamp = stamp_of(*noise).reshape((1,) * reach.ndim)
    hashes = row_hashes(velocities[0].shape)
    gain = tuple(jnp.full((1,) * reach.ndim, g, jnp.float32) for g in scales)
    codes = tuple(
        _encode(v.astype(jnp.float32), scale * g, body, row_noise(hashes, stamp, k))
        for k, (v, g) in enumerate(zip(velocities, gain, strict=True))
    )
    most = row_largest(codes)
    largest = _level(most, scale, body)
    return Int8Velocity(
        codes,
        gain,
        (marked(jnp.where(known, scale, np.float32(_BODY**2)), *velocities),),
        (body,),
        (jnp.maximum(largest, _FORGET * reach),),
        (jnp.where(known, next_margin(margin, most > body, _OUTGROWN), np.float32(_MARGIN)),),
        (stamp,),
    )


def _power(size: jax.Array) -> jax.Array:
    """The float32 whose exponent counts codes: 2^-126 for 1, four times as much for each one more."""
    return jax.lax.bitcast_convert_type((size << 24) - np.int32(1 << 23), jnp.float32)


def _tail_level(power: jax.Array, body: jax.Array, one: float = 1.0) -> jax.Array:
    """The level of the code that has this power: in scales, or in what the scale's root is `one` of."""
    root = power * np.float32(one / _POWERS) + np.float32(one * (1 - _NEAR))
    return jnp.where(body > 0, root * root, power)


def _decode(codes: jax.Array, scale: jax.Array, body: jax.Array, noise: jax.Array) -> jax.Array:
    unit: jax.Array = jax.lax.optimization_barrier(scale * np.float32(1 / _BODY**2))
    code = codes.astype(jnp.float32)
    size = jnp.abs(code)
    tail = _tail_level(_power(jnp.abs(codes.astype(jnp.int32))), body, _BODY)
    value = jnp.where(size <= body, size * code, jnp.where(code < 0, -tail, tail))
    # Whatever lies in the tail has passed the end of the body, with the noise of the last code there.
    return unit * (value + 2 * noise * jnp.minimum(size, body))


def _encode(v: jax.Array, scale: jax.Array, body: jax.Array, noise: jax.Array) -> jax.Array:
    inverse: jax.Array = jax.lax.optimization_barrier(1 / scale)
    size = jnp.abs(v) * inverse
    root = jnp.sqrt(size)
    noise = split_as(noise, v)
    noise = jnp.where(v < 0, -noise, noise)
    # The code of the level below, if the value lies in the tail, is in the exponent.
    power = jnp.where(body > 0, root * np.float32(_POWERS) - np.float32(_POWERS * (1 - _NEAR)), size)
    code = ((jax.lax.bitcast_convert_type(power, jnp.uint32) + np.uint32(1 << 23)) >> 24).astype(jnp.int32)
    # Zero, and what is beyond the last level, would have differences of infinities between its levels.
    below = _power(jnp.clip(code, 1, _LAST))
    low, high = (_tail_level(below * np.float32(up), body) for up in (1, 4))
    code = jnp.minimum(jnp.where((noise + 0.5) * (high - low) < size - low, code + 1, code), _LAST)
    y = jnp.where((root < 1) & (body > 0), root * np.float32(_BODY) - noise, code.astype(jnp.float32))
    y = jnp.where(v < 0, -y, y)
    # Not finite: the element starts anew. The comparison is false for NaN. Asked here and not above, where XLA's CPU
    # backend would make a branch of it and take three times as long.
    y = jnp.where(jnp.abs(v) <= np.finfo(np.float32).max, y, 0)
    # The nearest whole number, as the last bits of a float: XLA's CPU backend spends many operations on conversions.
    bits = jax.lax.bitcast_convert_type(y + np.float32(_WHOLE), jnp.int32) - np.float32(_WHOLE).view(np.int32)
    return bits.astype(jnp.int8)


def _level(size: jax.Array, scale: jax.Array, body: jax.Array) -> jax.Array:
    """The value of a code of that size, noise apart."""
    tail = _tail_level(_power(size.astype(jnp.int32)), body)
    return scale * jnp.where(size <= body, size * size * np.float32(1 / _BODY**2), tail)
