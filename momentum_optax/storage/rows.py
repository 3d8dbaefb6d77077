"""Rows: the elements that share a scale; and noise for them that costs a handful of operations an element."""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._typing import DType, Leaf
from .noise import mix, running_index
from .protocol import arithmetic_dtype

# A row is as many trailing axes of a leaf as hold at least this number of elements; they share a scale.
ROW_SIZE = 512
"""The least number of elements that share a scale: trailing axes are joined until a row has as many."""


class CodeShapes(NamedTuple):
    """The dtype of the codes of a leaf, and the shapes of parts with one entry per row and with a single entry."""

    dtype: DType
    row: tuple[int, ...]
    one: tuple[int, ...]

    def codes(self, leaf: Leaf, order: int) -> tuple[jax.Array, ...]:
        """Zeros; each array made separately, since two that shared a buffer could not be donated."""
        return tuple(jnp.zeros_like(leaf, dtype=self.dtype) for _ in range(order))


def code_shapes(leaf: Leaf, min_size: int, codes: DType) -> CodeShapes:
    """In `codes`, or in full where the leaf has fewer elements than `min_size`, counted globally, or is complex."""
    full = arithmetic_dtype(leaf.dtype)
    one = (1,) * len(leaf.shape)
    is_small = not leaf.shape or not reaches(leaf.shape, min_size, "min_size")
    if is_small or jnp.issubdtype(full, jnp.complexfloating):
        return CodeShapes(full, one, one)
    inner = row_axes(leaf.shape)
    return CodeShapes(codes, tuple(1 if d in inner else n for d, n in enumerate(leaf.shape)), one)


def zeros_along(leaf: Leaf, shape: tuple[int, ...], dtype: DType) -> jax.Array:
    """Zeros of the rank of `leaf`, over explicit mesh axes split like it along each axis of its length.

    What is computed from the leaf later is split so, and the types of a state must not drift.
    """
    if not isinstance(leaf, jax.Array) or not any(jax.typeof(leaf).sharding.spec):
        # Traced in half the time of `jnp.zeros`: each leaf has three of them.
        return jax.lax.broadcast(np.zeros((), dtype), shape)
    sharding = jax.typeof(leaf).sharding
    names = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept = [name if n == m else None for name, n, m in zip(names, shape, leaf.shape, strict=True)]
    # Outside jit the abstract mesh of a type does for no array.
    array: Any = sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    return jnp.zeros(shape, dtype, device=NamedSharding(array.mesh, PartitionSpec(*kept)))


def split_as(array: jax.Array, leaf: jax.Array) -> jax.Array:
    """An array of the leaf's shape, or of length 1, over explicit mesh axes split as the leaf is: to join the two."""
    own, sharding = jax.typeof(array).sharding, jax.typeof(leaf).sharding
    if not any(own.spec) and not any(sharding.spec):
        return array
    axes = zip(sharding.spec, array.shape, leaf.shape, strict=True)
    spec = PartitionSpec(*(axis if n == m else None for axis, n, m in axes))
    result: jax.Array = jax.sharding.reshard(array, NamedSharding(sharding.mesh, spec))
    return result


def row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The trailing axes that share a scale: as many as give a row at least `ROW_SIZE` elements."""
    axes: list[int] = []
    for axis in reversed(range(len(shape))):
        axes.append(axis)
        if axis and reaches(shape[axis:], ROW_SIZE, "the least length of a row"):
            break
    return tuple(axes)


def in_rows(part: jax.Array, leaf: Leaf) -> jax.Array:
    """A part with one entry per row of `leaf`, without the axes of a row, which have length 1 there."""
    return jax.lax.squeeze(part, row_axes(leaf.shape))


def as_part(rows: jax.Array, leaf: Leaf) -> jax.Array:
    """The inverse of `in_rows`."""
    return jax.lax.expand_dims(rows, row_axes(leaf.shape))


def over_rows(rows: jax.Array, leaf: jax.Array) -> jax.Array:
    """An array of the shape of `leaf` from one without the axes of a row."""
    return split_as(jax.lax.broadcast_in_dim(rows, leaf.shape, tuple(range(rows.ndim))), leaf)


def reaches(shape: tuple[int, ...], least: int, what: str) -> bool:
    """Whether an array has as many elements.

    Raises:
      ValueError: If `jax.export` knows its sizes as symbols only, and not enough about them.
    """
    if all(isinstance(n, int) for n in shape):
        return math.prod(shape) >= least
    try:
        return bool(math.prod(shape) >= least)
    except Exception as error:  # whose class JAX 0.7.2 has elsewhere than newer versions
        raise ValueError(
            f"symbolic sizes must be known to be above or below {what}, {least} elements, for a storage in few bits, "
            f"got {shape}: bound them, as in symbolic_shape('n,m', constraints=('n >= 8', 'm >= {ROW_SIZE}'))"
        ) from error


def position(shape: tuple[int, ...], axes: tuple[int, ...]) -> jax.Array:
    """The running index over `axes`, with all other axes of size 1."""
    return running_index(shape, {a: tuple(n if d == a else 1 for d, n in enumerate(shape)) for a in axes})


def seeds(leaf: Leaf, like: jax.Array, *numbers: int) -> jax.Array:
    """An odd uint32 for each row of `leaf`, of the shape of `like`, that depends on these numbers too."""
    stamp: Any = np.zeros(1, np.uint32)
    for number in numbers:
        stamp = mix((stamp ^ np.uint32(number % 2**32)) + np.uint32(0x9E3779B9))
    if not all(isinstance(n, int) for n in like.shape):
        outer = tuple(d for d, n in enumerate(like.shape) if not isinstance(n, int) or n > 1)
        return mix(position(leaf.shape, outer) * np.uint32(0x85EBCA77) ^ stamp[0]) | np.uint32(1)
    # With NumPy: numbers of leaves in a program would make each leaf's another one to compile.
    index: Any = np.arange(math.prod(like.shape), dtype=np.uint32).reshape(like.shape)
    made = jnp.asarray(mix(index * np.uint32(0x85EBCA77) ^ stamp) | np.uint32(1))
    is_split = isinstance(leaf, jax.Array) and any(jax.typeof(leaf).sharding.spec)
    return zeros_along(leaf, like.shape, np.uint32) + made if is_split else made


# The noise of an element is the product of a number of its row and one of its place. The former is multiplied by
# `GROWTH` from write to write: a multiplicative generator for each element (L'Ecuyer 1999).
GROWTH = 1099087573


# A row's numbers of places are a constant of the program up to the first length, or up to the second where enough rows
# share them; where fewer do, reading them would cost more than working them out.
_SHORT, _LONG, _SHARED = 1 << 12, 1 << 14, 32


class RowNumbers(NamedTuple):
    """What the noise of elements follows from.

    Attributes:
      rows: A number for each row, of the length 1 along its axes.
      places: For each velocity a number for each place in a row, of the axes of a row.
    """

    rows: jax.Array
    places: tuple[jax.Array, ...]

    @classmethod
    def of(cls, noise: jax.Array, leaf: jax.Array, order: int) -> "RowNumbers":
        """Those of `order` velocities of a leaf.

        From one barrier, behind which places are worked out once, and not for every element again. Without the rows in
        it XLA's CPU backend would lay the places out for all leaves of a shape at once, order the operands of their
        kernels by that, for the first leaf otherwise than for the rest, and compile each kernel twice.
        """
        places = tuple(jnp.asarray(_places(leaf.shape, k)) for k in range(order))
        if _is_constant(leaf.shape) or _is_shared(leaf.shape):
            noise, places = jax.lax.optimization_barrier((noise, places))
        return cls(noise, places)


def element_noise(numbers: RowNumbers, leaf: jax.Array, k: int, power: int = 0) -> jax.Array:
    """int32, uniform, for each element of `leaf`; that of the velocity `k`, after `power` more writes."""
    bits = jax.lax.mul(over_rows(in_rows(numbers.rows, leaf), leaf), _over_places(numbers.places[k], leaf))
    # The same places for every power: a write shares the product with the reading before it.
    bits = jax.lax.mul(bits, np.uint32(GROWTH**power % 2**32)) if power else bits
    return jax.lax.bitcast_convert_type(bits, jnp.int32)


def element_phase(numbers: RowNumbers, leaf: jax.Array, k: int) -> jax.Array:
    """int32 from 0 to 7 for each element of `leaf`, of the velocity `k`; each once in any eight writes in a row.

    So are the quarters 0 and 1, 2 and 3, ... in any four, and both halves in any two: a sequence of van der Corput.
    `GROWTH` is 5 modulo 8, so that the lowest bits of a row's number but two count the writes, in some order.
    """
    bits = jax.lax.bitwise_xor(over_rows(in_rows(numbers.rows, leaf), leaf), _over_places(numbers.places[k], leaf))
    reversed_bits = (bits & np.uint32(4)) | ((bits >> 2) & np.uint32(2)) | ((bits >> 4) & np.uint32(1))
    return jax.lax.bitcast_convert_type(reversed_bits, jnp.int32)


def _over_places(places: jax.Array, leaf: jax.Array) -> jax.Array:
    """An array of the shape of `leaf` from one of the axes of a row."""
    return split_as(jax.lax.broadcast_in_dim(places, leaf.shape, row_axes(leaf.shape)[::-1]), leaf)


def _places(shape: tuple[int, ...], k: int) -> jax.Array | np.ndarray:
    """The numbers of the places of a row, of the axes of a row, for the velocity `k`."""
    row = _row(shape)
    whole = tuple(range(len(row)))
    is_constant = _is_constant(shape)
    index: Any = np.arange(math.prod(row), dtype=np.uint32).reshape(row) if is_constant else position(row, whole)
    # Another factor for another velocity: a sum would shift its noise along by the same for a whole row.
    index = index * np.uint32(0x9E3779B1 * 0x85EBCA6B**k % 2**32) + np.uint32(0x3C6EF372)
    return cast("jax.Array | np.ndarray", index ^ (index >> 15))


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[len(shape) - len(row_axes(shape)) :]


def _is_shared(shape: tuple[int, ...]) -> bool:
    """Whether enough rows share the numbers of places, as far as is known."""
    is_known = all(isinstance(n, int) for n in shape)
    return not is_known or math.prod(shape) >= _SHARED * math.prod(_row(shape))


def _is_constant(shape: tuple[int, ...]) -> bool:
    """Whether the numbers of places are a constant of the program."""
    is_known = all(isinstance(n, int) for n in shape)
    return is_known and math.prod(_row(shape)) <= (_LONG if _is_shared(shape) else _SHORT)


def row_largest(codes: tuple[jax.Array, ...]) -> jax.Array:
    """The largest |code| of each row over all velocities, as a float, without the axes of a row."""
    sizes = [jax.lax.abs(code.astype(jnp.float32)) for code in codes]
    return jax.lax.reduce_max(functools.reduce(jax.lax.max, sizes), row_axes(codes[0].shape))
