r"""The scale of each row for a write, from what the last codes have shown and from a window of what enters now.

The largest value of a row is known only once all of it has been computed, and by then its codes must have been written:
a second look would cost a second pass. So a scale is a multiple of the largest value at the step before, read off the
codes, or of the largest in a window of a 32nd of what enters, if that is more. What makes rows large at once, a first
step, a spike, a row that wakes up, shows in all parts of a row; an outlier that the window misses meets the tail of the
code.
"""

import math
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import Number
from .companding import SCALE
from .noise import wrapped

# The window is at least this share of a row, in as many pieces. They lie evenly, so that each device has its own where
# an axis is split into as many shares or fewer, and that a short axis of which a part is dead shows its other part.
_SHARE, _PIECES = 32, 16


# Of rows with more than `_MANY` elements in the window XLA's GPU backend writes it to memory and reads it again, unless
# it is reduced in parts of `_PART` first. Pieces of `_LONG` and more are whole numbers of parts.
_PART, _MANY, _LONG = 128, 1024, 512


# A tile of a TPU's memory.
_SUBLANES, _LANES = 8, 128


# The scale is that of the last codes times `MARGIN`, or their largest value and the window's times `_SUM` together, as
# while a memory fills, or the window's largest times `_ROOM` less the first of these, after a spike. The less room a
# row has, the finer its levels are. The scale falls by no more than `_FALL` in a step, or `_SLOW` where it is not sure
# what enters, or `_SILENT` where the window is zero: a row that is silent may wake up.
_ROOM, _SUM, MARGIN, _GROWTH = 2.5, 1.0, np.float32(1.35), np.float32(1.5)
_FALL, _SLOW, _SILENT = np.float32(0.5), np.float32(0.9), np.float32(0.999)


# Between these a scale, its inverse and every level of it are floats.
_SMALLEST, _GREATEST = np.float32(2.0**-100), np.float32(2.0**102)


# What rows are written with that have no scale and of which the window shows nothing, and the bit that says so.
_DEFAULT, _UNKNOWN = np.float32(2.0**16), np.uint32(1 << 31)


def inverse_scales(entering: jax.Array, factor: Number, is_sure: bool, reach: jax.Array) -> jax.Array:
    """`SCALE` over the scale of each row; the last bit is set where nothing is seen to enter.

    It is negative where the scale is not known and a default stands in.

    Args:
      entering: Of the leaf's shape; what is about to be written is at least about `factor` times as large.
      factor: Not negative.
      is_sure: Whether that is known. If not it counts in rows without a scale alone.
      reach: The largest values of the last codes times `MARGIN`, one for each row; 0 where there is none. Like the
        result it is without the axes of a row.
    """
    entering = jax.lax.stop_gradient(entering)
    # One of a leaf's age has the rank of the leaf.
    factor = jax.lax.mul(jnp.asarray(factor, jnp.float32).reshape(()), np.float32(_ROOM))
    sharding = jax.typeof(reach).sharding

    def smallest(array: jax.Array, reach: jax.Array, factor: jax.Array) -> jax.Array:
        def in_pieces(array: jax.Array, reach: jax.Array, factor: jax.Array) -> jax.Array:
            window = _pieces(array, reach.ndim, _PIECES)
            bits = _inverses(window, reach, tuple(range(reach.ndim)), factor, is_sure)
            return jax.lax.reduce_min(*_in_parts(bits, reach.ndim))

        def on_tpu(array: jax.Array, reach: jax.Array, factor: jax.Array) -> jax.Array:
            if not _has_tiles(array.shape, reach.ndim):
                window, dims = _pieces(array, reach.ndim, 1), tuple(range(reach.ndim))
            else:
                window, dims = _tiles(array)
            bits = _inverses(window, reach.reshape([window.shape[d] for d in dims]), dims, factor, is_sure)
            return jax.lax.reduce_min(bits, [d for d in range(bits.ndim) if d not in dims]).reshape(reach.shape)

        bits = jax.lax.platform_dependent(array, reach, factor, tpu=on_tpu, default=in_pieces)
        return jax.lax.bitcast_convert_type(cast(jax.Array, bits), jnp.float32)

    if any(jax.typeof(entering).sharding.spec):
        # Over explicit mesh axes a window of a part would need a separate sharding.
        return cast(jax.Array, jax.sharding.auto_axes(smallest, out_sharding=sharding)(entering, reach, factor))
    return smallest(entering, reach, factor)


def _inverses(
    window: jax.Array, reach: jax.Array, dims: tuple[int, ...], factor: jax.Array, is_sure: bool
) -> jax.Array:
    """The inverse that each element asks for, in bits of which the smallest count; `reach` lies along `dims`."""

    # Functions of `jax.lax`: each operator of jax.numpy would be traced as a function, anew for every shape.
    def full(x: np.float32 | np.uint32) -> jax.Array:
        return jax.lax.full(window.shape, x)

    size, zero = jax.lax.abs(window.astype(jnp.float32)), full(np.float32(0))
    # The comparison is false for NaN, which must not hide the rest of its row.
    size = jax.lax.select(jax.lax.le(size, np.finfo(np.float32).max), jax.lax.mul(size, factor), zero)
    beside = jax.lax.broadcast_in_dim(reach, window.shape, dims)
    both = jax.lax.add(jax.lax.mul(beside, np.float32(1 / MARGIN)), jax.lax.mul(size, np.float32(_SUM / _ROOM)))
    scale = jax.lax.max(jax.lax.max(jax.lax.sub(size, beside), beside), both)
    if not is_sure:
        scale = jax.lax.select(jax.lax.le(beside, zero), scale, beside)
    inverse = jax.lax.div(full(SCALE), jax.lax.clamp(_SMALLEST, scale, _GREATEST))
    # All of it before the minimum over the window, which then is the one small operation that a step begins with. As
    # whole numbers without a sign, among which negative floats are the largest.
    bits = jax.lax.bitcast_convert_type(inverse, jnp.uint32)
    bits = jax.lax.select(jax.lax.gt(scale, zero), bits, full(_DEFAULT.view(np.uint32) | _UNKNOWN))
    is_unseen = jax.lax.le(size, zero).astype(jnp.uint32)
    return jax.lax.bitwise_or(jax.lax.bitwise_and(bits, np.uint32(2**32 - 2)), is_unseen)


def _in_parts(bits: jax.Array, rank: int) -> tuple[jax.Array, list[int]]:
    """The smallest bits of each part of a long row, or all of a shorter one; and the axes after the first `rank`."""
    axes = list(range(rank, bits.ndim))
    if not all(isinstance(n, int) for n in bits.shape) or math.prod(bits.shape[rank:]) <= _MANY:
        return bits, axes
    *outer, n = bits.shape
    length = n if n % _PART else _PART
    # Without the barrier XLA would reduce all at once.
    parts = jax.lax.reduce_min(bits.reshape(*outer, n // length, length), [bits.ndim])
    return jax.lax.optimization_barrier(parts), axes


def next_reach(inverse: jax.Array, largest: jax.Array, reach: jax.Array, is_sure: bool) -> tuple[jax.Array, jax.Array]:
    """Where the `reach` changes for the next write, and to what, from the largest value of each row over the unit.

    It is unchanged where that is 0 and nothing enters. Where something does, all of a row was too small for its scale,
    as after values that were not finite: the scale falls, or the row would stay at zero for good.

    Where it is not sure what enters, a row that has grown has room to grow by as much again, up to `_GROWTH` times, and
    a new row by that: a memory doubles at its second step.
    """

    def full(x: np.float32) -> jax.Array:
        return jax.lax.full_like(reach, x)

    last = jax.lax.bitwise_and(jax.lax.bitcast_convert_type(inverse, jnp.int32), np.int32(1))
    is_silent = jax.lax.gt(last, np.int32(0))
    fall = jax.lax.select(is_silent, full(_SILENT * SCALE), full((_FALL if is_sure else _SLOW) * SCALE))
    most = jax.lax.mul(largest, MARGIN)
    if not is_sure:
        grown = jax.lax.clamp(np.float32(1), jax.lax.mul(most, np.float32(1 / SCALE)), _GROWTH)
        is_new = jax.lax.le(reach, np.float32(0))
        most = jax.lax.mul(most, jax.lax.select(is_new, full(_GROWTH), grown))
    is_seen = jax.lax.bitwise_or(jax.lax.gt(largest, np.float32(0)), jax.lax.bitwise_not(is_silent))
    # Where a default stood in for the scale it does not bound the next: `inverse` is negative there.
    return is_seen, jax.lax.max(jax.lax.div(most, jax.lax.abs(inverse)), jax.lax.div(fall, inverse))


def _pieces(array: jax.Array, rank: int, most: int) -> jax.Array:
    """About a 32nd of each row, in even pieces of one axis; rows are the axes after the first `rank`.

    In one piece where the axis allows no more, or on a TPU, which would copy an array of any other shape.
    """
    shape = array.shape
    axes = tuple(range(rank, array.ndim))
    if not all(isinstance(shape[a], int) for a in axes):
        # What is zero counts as what is not seen.
        return jnp.where(_is_in_pieces(shape, axes, most), array, 0)
    axis = next((a for a in axes if shape[a] >= _SHARE), max(axes))
    n = shape[axis]
    count = math.gcd(n, most)
    length = -(-n // (_SHARE * count))
    length = -(-length // _PART) * _PART if length >= _LONG else length
    if count == 1:
        return jax.lax.slice_in_dim(array, 0, length, axis=axis)
    split = array.reshape(*shape[:axis], count, n // count, *shape[axis + 1 :])
    # In order, since XLA's GPU backend transposes the window for any other one.
    return jax.lax.slice_in_dim(split, 0, length, axis=axis + 1)


def _is_in_pieces(shape: tuple[int, ...], axes: tuple[int, ...], most: int) -> jax.Array:
    """Whether an element is in the window of `_pieces`, for sizes that are symbols of `jax.export`.

    `most` is a power of two.
    """

    def along(axis: int) -> jax.Array:
        n = jnp.asarray(wrapped(shape[axis]))
        # The greatest common divisor with a power of two.
        count = (n | np.uint32(most)) & -(n | np.uint32(most))
        length = (n + _SHARE * count - 1) // (_SHARE * count)
        length = jnp.where(length >= _LONG, (length + _PART - 1) // _PART * _PART, length)
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        return index % (n // count) < length

    is_in = along(max(axes))
    for axis in sorted(axes, reverse=True):
        is_in = jnp.where(wrapped(shape[axis]) >= _SHARE, along(axis), is_in)
    return is_in


def _has_tiles(shape: tuple[int, ...], rank: int) -> bool:
    """Whether rows are the last axis, and whole tiles of a TPU's memory cover the leaf."""
    return (
        0 < rank == len(shape) - 1
        and all(isinstance(n, int) for n in shape)
        and shape[-1] % _LANES == 0
        and shape[-2] % _SUBLANES == 0
    )


def _tiles(array: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
    """`_pieces` of the last axis, as tiles: a TPU would copy an array of any other shape. And the axes of the rows."""
    *outer, m, n = array.shape
    count = math.gcd(n // _LANES, _PIECES)
    tiles = array.reshape(*outer, m // _SUBLANES, _SUBLANES, n // _LANES, _LANES)
    tiles = jnp.moveaxis(tiles, -3, -2)[..., :: n // _LANES // count, :, : -(-n // (_SHARE * count))]
    return tiles, (*range(len(outer) + 1), len(outer) + 2)
