r"""Velocities in one byte, written and read elementwise so that XLA keeps the whole optimizer step in one pass.

A velocity v of a row with scale s is companded by a signed square root, $y = \pm K \sqrt{|v|/s}$, so that small values
keep small errors. Noise n in [-1/2, 1/2), a hash that decoding repeats, is subtracted before rounding,
$c = \lfloor y - n + 1/2 \rfloor$, and comes back when reading, $|c| (c + 2n)\,s/K^2$. Since c + n is y plus an error
that is uniform whatever y is, and $c (c + 2n) = (c + n)^2 - n^2$, the mean over n is exactly v, and the error has half
the variance of ordinary stochastic rounding. Zero stays zero.

The scale must be known before the maximum is. It is a multiple of the largest value of the steps before, which is read
off the codes themselves: a maximum over bytes that are written anyway costs no pass, one over float32 would. Values
beyond the scale take the codes above K, which stand for steps up from the scale in the bits of a float32, 1, 1.25, 2,
5, 16, 80, ... scales, and are rounded between them at random. While a leaf has no scale at all every code is such a
code, from the least float32 up.

What is here was chosen by what XLA makes of it: a handful of operations, or one more array or number that a step reads
besides its large ones, decide whether it is compiled into one pass.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from .noise import stamp_of
from .protocol import Write, times
from .rows import layout_of, next_margin, row_hashes, row_largest, row_noise, zeros_along

# Codes up to K are square roots, those from K + 1 to 127 the tail.
_BODY, _LAST = 115, 127
# The t-th level of the tail is t^2 quarters of an octave up, and from here on it goes up by equal steps.
_QUARTER, _LINEAR = 1 << 21, 9
# Where the tail starts, in the bits of a float32: at one scale; for a leaf that has none, at the least float32.
_ONE, _LEAST_BITS = 0x3F800000, 0x00800000
# Between these a scale, its inverse and every level of it are floats.
_SMALLEST, _GREATEST = 2.0**-110, 2.0**102
# The scale is `margin` times the largest recent value. `margin` follows the share of rows that outgrew theirs.
_FORGET, _MARGIN, _OUTGROWN = 0.9, 2.0, 0.005


class Int8Velocity(NamedTuple):
    """Velocities in one byte; each part a tuple of arrays, one per velocity or one that all velocities share.

    Attributes:
      codes: int8, of the leaf's shape; a leaf that is not compressed has its velocity here, in full. One per velocity.
      gain: float32, one entry: what the scale is multiplied by for this velocity. One per velocity.
      scale: float32, what the codes were written with; one entry per row.
      first: float32, one entry: the first code of the tail.
      reach: float32, the largest recent value, falling slowly; one entry per row.
      margin: float32, one entry: the next scale is so many times `reach`.
      stamp: uint32, one entry: the noise that the codes were written with.
    """

    codes: tuple[Any, ...]
    gain: tuple[Any, ...]
    scale: tuple[Any, ...]
    first: tuple[Any, ...]
    reach: tuple[Any, ...]
    margin: tuple[Any, ...]
    stamp: tuple[Any, ...]

    @staticmethod
    def decode(parts: "Int8Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        if not parts.codes or parts.codes[0].dtype != jnp.int8:
            return parts.codes
        (scale,), (first,), (stamp,) = parts.scale, parts.first, parts.stamp
        hashes = row_hashes(parts.codes[0].shape)
        return tuple(
            _decode(codes, scale * gain, first, row_noise(hashes, stamp, k))
            for k, (codes, gain) in enumerate(zip(parts.codes, parts.gain, strict=True))
        )

    @staticmethod
    def rescale(parts: "Int8Velocity", factor: Any) -> "Int8Velocity":
        """The velocities times a number: the scales, a negative one too, and not the codes."""
        return parts._replace(
            codes=tuple(x if x.dtype == jnp.int8 else times(x, factor) for x in parts.codes),
            scale=tuple(times(x, factor) for x in parts.scale),
            reach=tuple(times(x, jnp.abs(factor)) for x in parts.reach),
        )


@dataclasses.dataclass(frozen=True)
class Int8:
    """See `int8`."""

    seed: int = 0
    min_size: int = 4096
    parts: ClassVar[Any] = Int8Velocity
    reads_step: ClassVar[bool] = True
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = 2.0 / _BODY

    def init(self, leaf: Any, order: int) -> Int8Velocity:
        """Zeros; each array made on its own, since two that shared a buffer could not be donated."""
        layout = layout_of(leaf, self.min_size, jnp.int8)
        return Int8Velocity(
            codes=layout.codes(leaf, order),
            gain=tuple(jnp.ones(layout.one, jnp.float32) for _ in range(order)),
            **{
                name: tuple(zeros_along(leaf, shape, dtype) for _ in range(min(order, 1)))
                for name, shape, dtype in (
                    ("scale", layout.row, jnp.float32),
                    ("first", layout.one, jnp.float32),
                    ("reach", layout.row, jnp.float32),
                    ("margin", layout.one, jnp.float32),
                    ("stamp", layout.one, jnp.uint32),
                )
            },
        )

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, write: Write) -> Int8Velocity:
        """The velocities in bytes, where `previous` is."""
        old = previous.codes
        if not old or old[0].dtype != jnp.int8:
            full = tuple(v.astype(x.dtype) for v, x in zip(velocities, old, strict=True))
            return Int8Velocity(full, *previous[1:])
        shape, one = old[0].shape, (1,) * old[0].ndim
        (reach,), (margin,) = previous.reach, previous.margin
        known = jnp.max(reach, keepdims=True) > 0
        # A row that looks silent may yet wake up: keep it within reach of the tail.
        scale = jnp.maximum(margin * reach, jnp.max(reach, keepdims=True) * 2.0**-24)
        scale = jnp.where(known, jnp.clip(scale, _SMALLEST, _GREATEST), np.float32(1))
        first = jnp.where(known, np.float32(_BODY + 1), np.float32(1))
        gain = tuple(jnp.full(one, g, jnp.float32) for g in write.gains)
        stamp, hashes = stamp_of(self.seed, write.stamp).reshape(one), row_hashes(shape)
        codes = tuple(
            _encode(v.astype(jnp.float32), scale * g, first, row_noise(hashes, stamp, k))
            for k, (v, g) in enumerate(zip(velocities, gain, strict=True))
        )
        largest = _level(row_largest(codes), scale, first)
        return Int8Velocity(
            codes,
            gain,
            (scale,),
            (first,),
            (jnp.maximum(largest, _FORGET * reach),),
            (jnp.where(known, next_margin(margin, largest > scale, _OUTGROWN), np.float32(_MARGIN)),),
            (stamp,),
        )


def int8(seed: int = 0, *, min_size: int = 4096) -> Int8:
    r"""Velocities in one byte per parameter and velocity, plus 8 bytes for each row of at least 512 elements.

    The rounding has no bias, at any size. On white noise the relative error of a stored velocity, in rows of 512, is
    below 0.03 for decay 0.9 and 0.08 for 0.99; it grows with the memory, and slowly with the row. A row's scale follows
    its largest value of the steps before, so that a step needs no second look at its data. Values that outgrow it are
    not cut but rounded coarsely for that step, between levels that lie 1.25, 1.6, and further out up to 20 times apart
    (the scale then falls by a tenth a step):

    * the first step of a leaf, which has no scale yet: the error of the first velocity is between half of it and all of
      it, and fades with it. To have the first step exact as well, take it in float32 and `convert` the state;
    * a spike, or a row that wakes up after a long silence: off by about its own size for that step, in norm; a single
      element may come out up to 20 times too large.

    What is lost: an element more than 2.9e7 times its row's scale is cut there. Rows below 2^-24 of their leaf's
    largest are coarser the smaller they are. Velocities below 1.2e-38 are zero. A NaN or infinite velocity is stored as
    zero: its element starts anew.

    Args:
      seed: Of the noise, a whole number from 0. The noise is a function of (seed, step, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full, as are complex ones; a whole
        number from 1.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is no number.

    Reference:
      Subtractive dither: Roberts, IRE Trans. Information Theory 1962; Gray and Stockham, IEEE Trans. Information Theory
      1993. Eight-bit optimizer states: Dettmers et al., ICLR 2022, arXiv:2110.02861.
    """
    checks.integer("seed", seed, 0)
    checks.integer("min_size", min_size, 1)
    return Int8(int(seed), int(min_size))


def _start(first: jax.Array) -> jax.Array:
    """The bits of the tail's lowest level, in scales."""
    return jnp.where(first > 1, np.int32(_ONE), np.int32(_LEAST_BITS))


def _tail_level(t: jax.Array, start: jax.Array) -> jax.Array:
    """The t-th level of the tail, in scales."""
    steps = (t * jnp.minimum(t, np.float32(_LINEAR))).astype(jnp.int32)
    return jax.lax.bitcast_convert_type(start + steps * np.int32(_QUARTER), jnp.float32)


def _decode(codes: jax.Array, scale: jax.Array, first: jax.Array, noise: jax.Array) -> jax.Array:
    unit: jax.Array = jax.lax.optimization_barrier(scale * np.float32(1 / _BODY**2))
    code = codes.astype(jnp.float32)
    size = jnp.abs(code)
    tail = _tail_level(size - first, _start(first)) * np.float32(_BODY**2)
    return unit * jnp.where(size >= first, jnp.where(code < 0, -tail, tail), size * (code + 2 * noise))


def _encode(v: jax.Array, scale: jax.Array, first: jax.Array, noise: jax.Array) -> jax.Array:
    inverse, start = jax.lax.optimization_barrier(1 / scale), _start(first)
    size = jnp.abs(v) * inverse
    bits = jax.lax.bitcast_convert_type(size, jnp.int32)
    body = bits < start
    quarters = (bits - start).astype(jnp.float32) * np.float32(1 / _QUARTER)
    root = jnp.sqrt(jnp.where(body, size, quarters))
    # Whichever of the two ways up is the longer: up to `_LINEAR` they are the same.
    t = jnp.floor(jnp.maximum(jnp.minimum(root, np.float32(_LINEAR)), quarters * np.float32(1 / _LINEAR)))
    low, high = _tail_level(t, start), _tail_level(t + 1, start)
    t = jnp.where((noise + 0.5) * (high - low) < size - low, t + 1, t)
    y = jnp.where(body, root * np.float32(_BODY), jnp.minimum(t + first, np.float32(_LAST)))
    # Half way to the next code: a tail code is written as it is. A little less, so that a zero stays one.
    shift = jnp.where(body, np.float32(0.5 - 2.0**-25) - noise, np.float32(0.5))
    y = jnp.where(v < 0, -y, y) + shift
    # Not finite: the element starts anew. The comparison is false for NaN. Asked here and not above, where XLA's CPU
    # backend would make a branch of it and take three times as long.
    y = jnp.where(jnp.abs(v) <= np.finfo(np.float32).max, y, 0.5)
    # By way of int32: XLA's CPU backend converts floats to bytes slowly.
    return jnp.floor(y).astype(jnp.int32).astype(jnp.int8)


def _level(size: jax.Array, scale: jax.Array, first: jax.Array) -> jax.Array:
    """What a code of that size stands for, noise apart."""
    tail = _tail_level(size - first, _start(first))
    return scale * jnp.where(size >= first, tail, size * size * np.float32(1 / _BODY**2))
