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

from .._typing import Condition, Number
from .companding import SCALE
from .noise import wrapped
from .rows import row_axes

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


def inverse_scales(entering: jax.Array, factor: Number, is_sure: Condition, reach: jax.Array) -> jax.Array:
    """`SCALE` over the scale of each row; the last bit is set where nothing is seen to enter.

    It is negative where the scale is not known and a default stands in.

    Args:
      entering: Of the leaf's shape; what is about to be written is at least about `factor` times as large.
      factor: Not negative.
      is_sure: Whether that is known. If not it counts in rows without a scale alone.
      reach: The largest values of the last codes times `MARGIN`, one for each row; 0 where there is none.
    """
    entering = jax.lax.stop_gradient(entering)
    axes = row_axes(entering.shape)
    # One of a leaf's age has the rank of the leaf.
    factor = jnp.asarray(factor * _ROOM, jnp.float32).reshape(())
    is_sure = jnp.asarray(is_sure)
    sharding = jax.typeof(reach).sharding

    def smallest(array: jax.Array, reach: jax.Array, factor: jax.Array, is_sure: jax.Array) -> jax.Array:
        def in_pieces(array: jax.Array, reach: jax.Array, factor: jax.Array, is_sure: jax.Array) -> jax.Array:
            window, beside, inner = _pieces(array, reach, axes, _PIECES)
            bits = _in_parts(_inverses(window, beside, factor, is_sure), inner)
            return jnp.min(bits, inner).reshape(reach.shape)

        def on_tpu(array: jax.Array, reach: jax.Array, factor: jax.Array, is_sure: jax.Array) -> jax.Array:
            is_tiled = _has_tiles(array.shape, axes)
            window, beside, inner = _tiles(array, reach) if is_tiled else _pieces(array, reach, axes, 1)
            return jnp.min(_inverses(window, beside, factor, is_sure), inner).reshape(reach.shape)

        bits = jax.lax.platform_dependent(array, reach, factor, is_sure, tpu=on_tpu, default=in_pieces)
        return jax.lax.bitcast_convert_type(cast(jax.Array, bits), jnp.float32)

    if any(jax.typeof(entering).sharding.spec):
        # Over explicit mesh axes a window of a part would need a separate sharding.
        return cast(
            jax.Array, jax.sharding.auto_axes(smallest, out_sharding=sharding)(entering, reach, factor, is_sure)
        )
    return smallest(entering, reach, factor, is_sure)


def _inverses(window: jax.Array, reach: jax.Array, factor: jax.Array, is_sure: jax.Array) -> jax.Array:
    """The inverse that each element asks for, in bits of which the smallest count; `reach` broadcasts to `window`."""
    size = jnp.abs(window.astype(jnp.float32))
    # The comparison is false for NaN, which must not hide the rest of its row.
    size = jnp.where(size <= np.finfo(np.float32).max, size * factor, 0)
    grown = jnp.maximum(
        jnp.maximum(size - reach, reach), reach * np.float32(1 / MARGIN) + size * np.float32(_SUM / _ROOM)
    )
    scale = jnp.where(is_sure | (reach <= 0), grown, reach)
    inverse = SCALE / jnp.clip(scale, _SMALLEST, _GREATEST)
    # All of it before the minimum over the window, which then is the one small operation that a step begins with. As
    # whole numbers without a sign, among which negative floats are the largest.
    bits = jax.lax.bitcast_convert_type(inverse, jnp.uint32)
    bits = jnp.where(scale > 0, bits, _DEFAULT.view(np.uint32) | _UNKNOWN)
    return jnp.where(size > 0, bits & np.uint32(2**32 - 2), bits | np.uint32(1))


def _in_parts(bits: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The smallest bits of each part of a long row, or all of a shorter one."""
    if not all(isinstance(n, int) for n in bits.shape) or math.prod(bits.shape[a] for a in axes) <= _MANY:
        return bits
    *outer, n = bits.shape
    length = n if n % _PART else _PART
    # Without the barrier XLA would reduce all at once.
    parts: jax.Array = jax.lax.optimization_barrier(jnp.min(bits.reshape(*outer, n // length, length), -1))
    return parts


def next_reach(inverse: jax.Array, largest: jax.Array, reach: jax.Array, is_sure: Condition) -> jax.Array:
    """The `reach` for the next write, from the largest value of each row over the unit.

    It is unchanged where that is 0 and nothing enters. Where something does, all of a row was too small for its scale,
    as after values that were not finite: the scale falls, or the row would stay at zero for good.

    Where it is not sure what enters, a row that has grown has room to grow by as much again, up to `_GROWTH` times, and
    a new row by that: a memory doubles at its second step.
    """
    is_silent = (jax.lax.bitcast_convert_type(inverse, jnp.int32) & 1) > 0
    fall = jnp.where(is_silent, _SILENT, jnp.where(is_sure, _FALL, _SLOW)) * SCALE
    most = largest * MARGIN
    grown = jnp.where(reach > 0, jnp.clip(most * np.float32(1 / SCALE), 1, _GROWTH), _GROWTH)
    most = most * jnp.where(is_sure, np.float32(1), grown)
    is_seen = (largest > 0) | ~is_silent
    # Where a default stood in for the scale it does not bound the next: `inverse` is negative there.
    return jnp.where(is_seen, jnp.maximum(most / jnp.abs(inverse), fall / inverse), reach)


def _pieces(
    array: jax.Array, reach: jax.Array, axes: tuple[int, ...], most: int
) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """About a 32nd of each row, in even pieces of one axis; `reach` beside it; the axes of a row, `axes` before.

    In one piece where the axis allows no more, or on a TPU, which would copy an array of any other shape.
    """
    shape = array.shape
    if not all(isinstance(shape[a], int) for a in axes):
        # What is zero counts as what is not seen.
        return jnp.where(_is_in_pieces(shape, axes, most), array, 0), reach, axes
    axis = next((a for a in sorted(axes) if shape[a] >= _SHARE), max(axes))
    n = shape[axis]
    count = math.gcd(n, most)
    length = -(-n // (_SHARE * count))
    length = -(-length // _PART) * _PART if length >= _LONG else length
    if count == 1:
        return jax.lax.slice_in_dim(array, 0, length, axis=axis), reach, axes
    split = array.reshape(*shape[:axis], count, n // count, *shape[axis + 1 :])
    window = jax.lax.slice_in_dim(split, 0, length, axis=axis + 1)
    # In order, since XLA's GPU backend transposes the window for any other one.
    return window, jnp.expand_dims(reach, axis), tuple(sorted((axis, *(a + (a >= axis) for a in axes))))


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


def _has_tiles(shape: tuple[int, ...], axes: tuple[int, ...]) -> bool:
    """Whether rows are the last axis, and whole tiles of a TPU's memory cover the leaf."""
    return (
        len(shape) > 1
        and axes == (len(shape) - 1,)
        and all(isinstance(n, int) for n in shape)
        and shape[-1] % _LANES == 0
        and shape[-2] % _SUBLANES == 0
    )


def _tiles(array: jax.Array, reach: jax.Array) -> tuple[jax.Array, jax.Array, tuple[int, ...]]:
    """`_pieces` of the last axis, as tiles: a TPU would copy an array of any other shape."""
    *outer, m, n = array.shape
    count = math.gcd(n // _LANES, _PIECES)
    tiles = array.reshape(*outer, m // _SUBLANES, _SUBLANES, n // _LANES, _LANES)
    tiles = jnp.moveaxis(tiles, -3, -2)[..., :: n // _LANES // count, :, : -(-n // (_SHARE * count))]
    axis = len(outer) + 1
    return tiles, reach.reshape(*outer, m // _SUBLANES, 1, _SUBLANES, 1), (axis, axis + 2)
