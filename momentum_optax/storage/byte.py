r"""Velocities in one byte, written and read elementwise so that XLA keeps the whole optimizer step in one pass.

A velocity v of a row with scale s is companded by a signed square root: $w = K^2 |v|/s$ and $y = \sqrt w$ (2w below a
quarter), so that small values keep small errors. Noise n in [-1/2, 1/2), a hash that decoding repeats, is subtracted
before rounding down, $c = \lfloor \pm y - n \rfloor$, and added when reading, $|c + 1/2| (c + 1/2 + 2n)$: the mean over
n is exactly w, and the error has half the variance of ordinary stochastic rounding.

The scale must be known before the maximum is: it is predicted from the maximum of the step before and a sample of the
gradient. Values beyond it take the last codes, which stand for growing multiples of it and are rounded at random.
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
# Codes from -K - 1 to K are square roots; beyond them these multiples of the scale; -128 is an exact zero.
_BODY, _TAIL, _ZERO = 123, (1.0, 4.0, 2.0**20), -128
# The share of a row that is looked at before it is written.
_SAMPLE = 16


class Int8Velocity(NamedTuple):
    """Velocities in one byte; each part a tuple with one array per velocity.

    Attributes:
      codes: int8, of the leaf's shape; a leaf that is not compressed has its velocity here, in full.
      scale: float32, what the codes were written with; one entry per row.
      peak: float32, the largest finite absolute value when they were written; one entry per row.
      stamp: uint32, one entry: the noise that they were written with.
    """

    codes: tuple[Any, ...]
    scale: tuple[Any, ...]
    peak: tuple[Any, ...]
    stamp: tuple[Any, ...]

    @staticmethod
    def decode(parts: "Int8Velocity") -> tuple[jax.Array, ...]:
        """The velocities, in float32 where they are compressed."""
        return tuple(
            _decode(codes, scale, stamp) if codes.dtype == jnp.int8 else codes
            for codes, scale, stamp in zip(parts.codes, parts.scale, parts.stamp, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Int8:
    """See `int8`."""

    seed: int = 0
    min_size: int = 4096
    spread: float = 3.0
    parts: ClassVar[Any] = Int8Velocity
    reads_step: ClassVar[bool] = True

    def init(self, leaf: Any, order: int) -> Int8Velocity:
        """Zeros; each array made on its own, since two that shared a buffer could not be donated."""
        full = arithmetic_dtype(leaf.dtype)
        size = math.prod(leaf.shape)
        small = size < self.min_size or not leaf.shape or jnp.issubdtype(full, jnp.complexfloating)
        one = (1,) * len(leaf.shape)
        row = one if small else tuple(1 if d in _row_axes(leaf.shape) else n for d, n in enumerate(leaf.shape))
        each = range(order)
        return Int8Velocity(
            codes=tuple(jnp.full_like(leaf, 0 if small else _ZERO, dtype=full if small else jnp.int8) for _ in each),
            scale=tuple(jnp.zeros(row, jnp.float32) for _ in each),
            peak=tuple(jnp.zeros(row, jnp.float32) for _ in each),
            stamp=tuple(jnp.zeros(one, jnp.uint32) for _ in each),
        )

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, write: Write) -> Int8Velocity:
        """The velocities in bytes, where `previous` is."""
        written = [self._encode_one(k, v, previous, write) for k, v in enumerate(velocities)]
        return Int8Velocity(*zip(*written, strict=True)) if written else Int8Velocity((), (), (), ())

    def _encode_one(self, k: int, v: jax.Array, previous: Any, write: Write) -> tuple[Any, ...]:
        """Codes, scale, peak and stamp of velocity k."""
        old = previous.codes[k]
        if old.dtype != jnp.int8:
            return (v.astype(old.dtype), *(part[k] for part in previous[1:]))
        v = v.astype(jnp.float32)
        magnitude = _finite(v)
        scale = self._scale(k, previous.peak, write)
        stamp = stamp_of(self.seed, write.stamp, k)
        peak = jnp.max(magnitude, _row_axes(v.shape), keepdims=True)
        return _encode(v, magnitude, scale, stamp), scale, peak, stamp.reshape((1,) * v.ndim)

    def _scale(self, k: int, peaks: tuple[jax.Array, ...], write: Write) -> jax.Array:
        """The scale of each row of velocity k, before its new maximum is known."""
        carried = sum(abs(a) * peak for a, peak in zip(write.A[k], peaks, strict=True))
        decay = jnp.minimum(sum(abs(a) for a in write.A[k]), 1.0)
        # White noise of deviation 1 makes velocities of deviation 1/sqrt(1 - decay^2): so much may a step add to them.
        noise = self.spread * jnp.sqrt(1 - decay * decay) * peaks[k]
        seen = 1.25 * abs(write.B[k]) * _sample_maximum(write.gradient)
        scale = carried + jnp.maximum(noise, seen)
        # A row that looks silent may yet wake up outside the sample: keep it within reach of the tail.
        return jnp.maximum(jnp.maximum(scale, jnp.max(scale) * 2.0**-16), 1e-33).astype(jnp.float32)


def int8(seed: int = 0, *, min_size: int = 4096, spread: float = 3.0) -> Int8:
    r"""Velocities in one byte per parameter, plus 8 bytes for each row of at least 512 elements. Experimental.

    The rounding has no bias up to 2^20 times a row's scale. On white noise the relative error of a stored velocity is
    below 0.03 for decay 0.9 and 0.08 for decay 0.99; real gradients, whose maxima jump, give more. Leaves below `min_size`
    elements and complex leaves are kept in full. A NaN or infinite velocity is stored as zero: its element starts anew.

    What is lost: the scale is predicted from the step before and from the first sixteenth of each row. An element beyond
    2^20 times it is cut there. A leaf whose velocity is zero, as at the first step, and whose sample is zero too has no
    scale to predict from: what the rest of its gradient brings in that step does not enter the velocity. The update of
    that step is not affected, and from the next step on the scale is known.

    Args:
      seed: Of the noise, a whole number from 0. The noise is a function of (seed, step, leaf, velocity, element).
      min_size: Leaves with fewer elements, counted over all devices, are kept in full; a whole number from 1.
      spread: Room for growth in one step, in deviations of white gradient noise, in (0, inf). Less is finer for the
        ordinary values and coarser for those that outgrow it.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is no number.

    Reference:
      Subtractive dither: Roberts, IRE Trans. Information Theory 1962; Gray and Stockham, IEEE Trans. Information Theory
      1993. Eight-bit optimizer states: Dettmers et al., ICLR 2022, arXiv:2110.02861.
    """
    checks.integer("seed", seed, 0)
    checks.integer("min_size", min_size, 1)
    checks.number("spread", spread, "(0, inf)")
    return Int8(int(seed), int(min_size), float(spread))


def _row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The trailing axes that share a scale: as many as give a row at least `_ROW` elements."""
    axes: list[int] = []
    for axis in reversed(range(len(shape))):
        axes.append(axis)
        if math.prod(shape[axis:]) >= _ROW:
            break
    return tuple(axes)


def _sample_maximum(gradient: jax.Array) -> jax.Array:
    """The largest finite |g| in the first sixteenth of each row; a slice, so that little is read twice."""
    axes = _row_axes(gradient.shape)
    axis = max(axes, key=lambda d: gradient.shape[d])
    # JAX does not slice an axis that an explicit mesh splits: there the whole row is looked at.
    split = axis < len(spec := jax.typeof(gradient).sharding.spec) and spec[axis] is not None
    length = gradient.shape[axis] if split else max(1, gradient.shape[axis] // _SAMPLE)
    some = jax.lax.slice_in_dim(gradient, 0, length, axis=axis)
    return jnp.max(_finite(some.astype(jnp.float32)), axes, keepdims=True)


def _finite(x: jax.Array) -> jax.Array:
    """|x|, or 0 where x is not finite, so that one such element cannot set a scale."""
    magnitude = jnp.abs(x)
    return jnp.where(magnitude <= np.finfo(np.float32).max, magnitude, 0.0)


def _position(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """The running index over `axes`, with all other axes of size 1."""
    index = jnp.zeros((1,) * len(shape), jnp.uint32)
    stride = 1
    for axis in sorted(axes, reverse=True):
        line = tuple(n if d == axis else 1 for d, n in enumerate(shape))
        index = index + jax.lax.broadcasted_iota(jnp.uint32, line, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _noise(shape: tuple[int, ...], stamp: jax.Array, width: float) -> jax.Array:
    """Uniform in [-width/2, width/2), hashed from row, column and stamp; elementwise it is a handful of operations."""
    inner = _row_axes(shape)
    outer = tuple(d for d in range(len(shape)) if d not in inner)
    stamp = stamp.reshape((1,) * len(shape))
    column = mix(_position(shape, inner) * np.uint32(0x9E3779B1) + np.uint32(0x3C6EF372))
    row = mix(mix(_position(shape, outer) * np.uint32(0x85EBCA77) + stamp) + np.uint32(0x2545F491))
    factor = mix(stamp ^ np.uint32(0x68BC21EB)) | np.uint32(1)
    bits = jax.lax.bitcast_convert_type((column ^ row) * factor, jnp.int32)
    return bits.astype(jnp.float32) * np.float32(width * 2.0**-32)


def _decode(codes: jax.Array, scale: jax.Array, stamp: jax.Array) -> jax.Array:
    centre = codes.astype(jnp.int32).astype(jnp.float32) + 0.5
    size = jnp.abs(centre)
    value = size * (centre + _noise(codes.shape, stamp, 2.0))
    # A tail code has no noise: its centre times this is the multiple that it stands for. The zero code comes last.
    levels = [np.float32(x * _BODY**2 / (_BODY + 1.5 + j)) for j, x in enumerate(_TAIL)] + [np.float32(0)]
    level: Any = levels[0]
    for j, following in enumerate(levels[1:], start=_BODY + 2):
        level = jnp.where(size > j, following, level)
    return jnp.where(size > _BODY + 1, centre * level, value) * (scale * np.float32(1 / _BODY**2))


def _encode(v: jax.Array, magnitude: jax.Array, scale: jax.Array, stamp: jax.Array) -> jax.Array:
    noise = _noise(v.shape, stamp, 1.0)
    w = magnitude * (np.float32(_BODY**2) / scale)
    y = jnp.minimum(w + w, jnp.sqrt(w))
    tail: Any = np.float32(_BODY + 1.5)
    for j in range(len(_TAIL) - 1):
        low, high = (x * _BODY**2 for x in _TAIL[j : j + 2])
        tail = jnp.where(
            noise * np.float32(high - low) + np.float32((low + high) / 2) < w, np.float32(_BODY + 2.5 + j), tail
        )
    body = w < _BODY**2
    y, noise = jnp.where(body, y, tail), jnp.where(body, noise, 0.0)
    code = jnp.floor(jnp.where(v < 0, -y, y) - noise)
    # By way of int32: XLA's CPU backend converts floats to bytes slowly.
    return jnp.where(w > 0, code, np.float32(_ZERO)).astype(jnp.int32).astype(jnp.int8)
