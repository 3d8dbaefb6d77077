r"""Velocities in one byte, written and read elementwise so that XLA keeps the whole optimizer step in one pass.

A velocity v of a row with scale s is companded by a signed square root, $y = \pm K \sqrt{|v|/s}$, so that small values
keep small errors. Noise n in [-1/2, 1/2), a hash that decoding repeats, is subtracted before rounding,
$c = \lfloor y - n + 1/2 \rfloor$, and comes back when reading, $|c| (c + 2n)\,s/K^2$. Since c + n is y plus an error
that is uniform whatever y is, and $c (c + 2n) = (c + n)^2 - n^2$, the mean over n is exactly v, and the error has half
the variance of ordinary stochastic rounding. Zero stays zero.

The scale must be known before the maximum is. It is a multiple of the largest value of the steps before, which is read
off the codes themselves: a maximum over bytes that are written anyway costs no pass, one over float32 would. Values
beyond the scale take the codes above K, which stand for $s\,(1 + t^2/155)^{32}$, t = 0, 1, ..., and are rounded between
them at random. While a leaf has no scale at all, every code is such a code, above a scale too small to matter.

What is here was chosen by what XLA makes of it: a handful of operations more, and a compiled step takes two passes.
"""

import dataclasses
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import checks
from .noise import mix, stamp_of
from .protocol import Write, arithmetic_dtype

# Axes are joined into rows until a scale serves as many elements as this.
_ROW = 512
# Codes up to K are square roots, those from K + 1 to 127 the tail.
_BODY, _LAST = 115, 127
# The tail's levels are (1 + t^2/155)^32 scales: 1, 1.2, 2.3, 6, 23, ..., 1e8 for the 12 codes beyond the square roots.
_BEND, _SQUARINGS = 155.0, 5
# The scale of a leaf that has none: from here 127 tail codes reach to 2^102.
_FINEST = 2.0**-112
# The scale is `margin` times the largest recent value. `margin` follows the share of rows that outgrew theirs.
_FORGET, _MARGIN, _LEAST, _MOST, _PUSH, _OUTGROWN = 0.9, 2.0, 1.1, 4.0, 0.2, 0.005


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
        hashes = _hashes(parts.codes[0].shape)
        return tuple(
            _decode(codes, scale * gain, first, _noise(hashes, stamp, k))
            for k, (codes, gain) in enumerate(zip(parts.codes, parts.gain, strict=True))
        )

    @staticmethod
    def again(parts: "Int8Velocity") -> "Int8Velocity":
        """The same, one scalar of it behind a barrier, which is enough; TPUs want as little of it twice as can be."""
        return parts._replace(first=jax.lax.optimization_barrier(parts.first))


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
        full = arithmetic_dtype(leaf.dtype)
        small = math.prod(leaf.shape) < self.min_size or not leaf.shape or jnp.issubdtype(full, jnp.complexfloating)
        one = (1,) * len(leaf.shape)
        row = one if small else tuple(1 if d in _row_axes(leaf.shape) else n for d, n in enumerate(leaf.shape))
        dtype = full if small else jnp.int8
        return Int8Velocity(
            codes=tuple(jnp.zeros_like(leaf, dtype=dtype) for _ in range(order)),
            gain=tuple(jnp.ones(one, jnp.float32) for _ in range(order)),
            **{
                name: tuple(jnp.zeros(shape, dtype) for _ in range(min(order, 1)))
                for name, shape, dtype in (
                    ("scale", row, jnp.float32),
                    ("first", one, jnp.float32),
                    ("reach", row, jnp.float32),
                    ("margin", one, jnp.float32),
                    ("stamp", one, jnp.uint32),
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
        scale = jnp.where(known, jnp.maximum(scale, _FINEST), _FINEST)
        first = jnp.where(known, np.float32(_BODY + 1), np.float32(1))
        gain = tuple(jnp.full(one, g, jnp.float32) for g in write.gains)
        stamp, hashes = stamp_of(self.seed, write.stamp).reshape(one), _hashes(shape)
        codes = tuple(
            _encode(v.astype(jnp.float32), scale * g, first, _noise(hashes, stamp, k))
            for k, (v, g) in enumerate(zip(velocities, gain, strict=True))
        )
        largest = _level(_largest(codes), scale, first)
        return Int8Velocity(
            codes,
            gain,
            (scale,),
            (first,),
            (jnp.maximum(largest, _FORGET * reach),),
            (jnp.where(known, _next_margin(margin, largest > scale), np.float32(_MARGIN)),),
            (stamp,),
        )


def int8(seed: int = 0, *, min_size: int = 4096) -> Int8:
    r"""Velocities in one byte per parameter and velocity, plus 8 bytes for each row of at least 512 elements.

    The rounding has no bias, at any size. On white noise the relative error of a stored velocity is below 0.03 for
    decay 0.9 and 0.08 for 0.99; it grows with the memory. A row's scale follows its largest value of the steps before,
    so that a step needs no second look at its data. Values that outgrow it are not cut but rounded coarsely for that
    step, between levels that lie 1.2, 2, and further out up to 13 times apart (the scale then falls by a tenth a step):

    * the first step of a leaf, which has no scale yet: the error of the first velocity is between half of it and all of
      it, and fades with it. To have the first step exact as well, take it in float32 and `convert` the state;
    * a spike, or a row that wakes up after a long silence: off by about its own size for that step, in norm; a single
      element may come out up to 13 times too large.

    What is lost: an element more than 10^8 times its row's scale is cut there. Rows below 2^-24 of their leaf's largest
    are coarser the smaller they are. Velocities below 2e-34 are zero. A NaN or infinite velocity is stored as zero: its
    element starts anew.

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


def _row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The trailing axes that share a scale: as many as give a row at least `_ROW` elements."""
    axes: list[int] = []
    for axis in reversed(range(len(shape))):
        axes.append(axis)
        if math.prod(shape[axis:]) >= _ROW:
            break
    return tuple(axes)


def _position(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """The running index over `axes`, with all other axes of size 1."""
    index = jnp.zeros((1,) * len(shape), jnp.uint32)
    stride = 1
    for axis in sorted(axes, reverse=True):
        line = tuple(n if d == axis else 1 for d, n in enumerate(shape))
        index = index + jax.lax.broadcasted_iota(jnp.uint32, line, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _hashes(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """A hash of an element's row and one of its place in it: small arrays, so that the rest is a handful of operations.

    Behind a barrier, since XLA would work them out again for every element.
    """
    inner = _row_axes(shape)
    outer = tuple(d for d in range(len(shape)) if d not in inner)
    row = mix(_position(shape, outer) * np.uint32(0x85EBCA77) + np.uint32(0x2545F491))
    column = mix(_position(shape, inner) * np.uint32(0x9E3779B1) + np.uint32(0x3C6EF372))
    return jax.lax.optimization_barrier((mix(row), column))  # type: ignore[no-any-return]


def _noise(hashes: tuple[jax.Array, jax.Array], stamp: jax.Array, k: int) -> jax.Array:
    """Uniform in [-1/2, 1/2): a random odd multiple of an element's hash plus a random number, both from the stamp."""
    row, column = hashes
    here = stamp_of(stamp, k)
    here, factor = jax.lax.optimization_barrier((here, mix(here ^ np.uint32(0x68BC21EB)) | np.uint32(1)))
    bits = ((row ^ column) + here) * factor
    return jax.lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32) * np.float32(2.0**-32)


def _power(x: jax.Array, squarings: int = _SQUARINGS) -> jax.Array:
    for _ in range(squarings):
        x = x * x
    return x


def _decode(codes: jax.Array, scale: jax.Array, first: jax.Array, noise: jax.Array) -> jax.Array:
    scale, unit = jax.lax.optimization_barrier((scale, scale * np.float32(1 / _BODY**2)))
    code = codes.astype(jnp.float32)
    size = jnp.abs(code)
    t = size - first
    # One squaring short, and the scale in between: the last one alone would leave the range of float32.
    root = _power(1 + t * t * np.float32(1 / _BEND), _SQUARINGS - 1)
    tail = root * scale * root
    body = size * (code + 2 * noise) * unit
    return jnp.where(t >= 0, jnp.where(code < 0, -tail, tail), body)


def _encode(v: jax.Array, scale: jax.Array, first: jax.Array, noise: jax.Array) -> jax.Array:
    size = jnp.abs(v)
    # Not finite: the element starts anew. The comparison is false for NaN.
    size = jnp.where(size <= np.finfo(np.float32).max, size, 0.0)
    inverse, body = jax.lax.optimization_barrier((jax.lax.rsqrt(scale), first - 1))
    root = jnp.sqrt(size) * inverse
    y = jnp.where(root < 1, root * body, jnp.minimum(_tail(root, noise) + first, np.float32(_LAST)))
    # Half way to the next code: a tail code is written as it is.
    shift = jnp.where(root < 1, 0.5 - noise, 0.5)
    # By way of int32: XLA's CPU backend converts floats to bytes slowly.
    return jnp.floor(jnp.where(v < 0, -y, y) + shift).astype(jnp.int32).astype(jnp.int8)


def _tail(root: jax.Array, noise: jax.Array) -> jax.Array:
    """Which of the two levels around root^2 scales, as t; at random so that the mean is exact."""
    fraction = root
    for _ in range(_SQUARINGS - 1):
        fraction = jnp.sqrt(fraction)
    t = jnp.floor(jnp.sqrt(jnp.maximum(fraction * np.float32(_BEND) - np.float32(_BEND), 0.0)))
    # In multiples of the level below, which stay within float32.
    below = 1 / (1 + t * t * np.float32(1 / _BEND))
    above = _power((1 + (t + 1) * (t + 1) * np.float32(1 / _BEND)) * below)
    return t + jnp.where((noise + 0.5) * (above - 1) < _power(fraction * below) - 1, 1.0, 0.0)


def _largest(codes: tuple[jax.Array, ...]) -> jax.Array:
    """The largest |code| of each row over all velocities, as a float."""
    most = jnp.abs(codes[0].astype(jnp.float32))
    for code in codes[1:]:
        most = jnp.maximum(most, jnp.abs(code.astype(jnp.float32)))
    return jnp.max(most, _row_axes(most.shape), keepdims=True)


def _level(size: jax.Array, scale: jax.Array, first: jax.Array) -> jax.Array:
    """What a code of that size stands for, noise apart."""
    t = size - first
    root = _power(1 + t * t * np.float32(1 / _BEND), _SQUARINGS - 1)
    return jnp.where(t >= 0, root * scale * root, size * size * (scale * np.float32(1 / _BODY**2)))


def _next_margin(margin: jax.Array, outgrown: jax.Array) -> jax.Array:
    """More room where more rows than one in 200 outgrew their scale, less where fewer did."""
    # Counted in whole numbers: their sum is the same on every mesh.
    share = jnp.sum(outgrown, dtype=jnp.int32, keepdims=True).astype(jnp.float32) * np.float32(
        1 / max(outgrown.size, 1)
    )
    return jnp.clip(margin * (1 + _PUSH * (share - _OUTGROWN)), _LEAST, _MOST)
