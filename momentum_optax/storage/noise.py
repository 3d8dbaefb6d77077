"""Noise for stochastic rounding: a hash of (stamp, element), so that a replay rounds alike and no key is kept.

A stamp stands for the seed, the step, the leaf and the velocity. The element is its position in the whole array, which
XLA counts globally however the array is sharded.

Where leaves are many, `element_bits` costs a third of the operations of `random_bits`: a product of a number of the
step, one of the row, and one of the leaf and the column, each of them hashed.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import Count, jitted

# Odd constants of the MurmurHash3 finalizer and of the golden ratio; products wrap around in 32 bits.
_GOLDEN, _FIRST, _SECOND = (np.uint32(c) for c in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))
# Tells the two hashes of a step apart.
_TWO = np.array([0x243F6A88, 0x85A308D3], np.uint32)


def mix(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 13)) * _SECOND
    return x ^ (x >> 16)


def stamp_of(*numbers: jax.Array | np.uint32 | int, leaf: int | None = None) -> jax.Array:
    """One uint32 from several integers, in their order and modulo 2^32; scalars or arrays that broadcast.

    Args:
      *numbers: The integers.
      leaf: One more, last, that tells leaves apart. It is data of the program: with a literal no two leaves would have
        the same kernels, of which XLA's CPU backend compiles equal ones once.
    """
    known = next((i for i, n in enumerate(numbers) if not isinstance(n, int | np.integer)), len(numbers))
    # What is known needs no operations of the program. An array, since scalars of NumPy warn.
    stamp: Any = np.zeros(1, np.uint32)
    for number in numbers[:known]:
        stamp = mix((stamp ^ np.uint32(int(number) % 2**32)) + _GOLDEN)
    stamp = jnp.asarray(stamp[0])
    if known < len(numbers):
        # A Python integer modulo 2^32, as JAX would convert it if it fitted an int32.
        stamp = _hashed(stamp, *(np.uint32(n % 2**32) if isinstance(n, int) else n for n in numbers[known:]))
    # Two different numbers, since XLA takes an array of equal ones for a literal.
    return stamp if leaf is None else _first_hashed(stamp, np.array([leaf, ~leaf], np.int32).view(np.uint32))


@jitted
def _hashed(x: jax.Array, *numbers: jax.Array | np.uint32) -> jax.Array:
    for number in numbers:
        x = mix((x ^ number.astype(jnp.uint32)) + _GOLDEN)
    return x


@jitted
def _first_hashed(x: jax.Array, pair: jax.Array | np.ndarray) -> jax.Array:
    return mix(jax.lax.squeeze(jax.lax.slice(x ^ pair, (0,), (1,)), (0,)) + _GOLDEN)


def stamp_of_step(step: Count) -> jax.Array:
    """One uint32 that stands for the step; all leaves share it.

    The hash is a sum of two: what is elementwise XLA would work out again, and compile, in the kernel of every leaf.
    """
    return _summed(jnp.asarray(np.uint32(step % 2**32) if isinstance(step, int) else step).astype(jnp.uint32))


@jitted
def _summed(x: jax.Array) -> jax.Array:
    pair = mix((jax.lax.broadcast(x, (2,)) ^ _TWO) + _GOLDEN)
    result: jax.Array = jax.lax.reduce(pair, np.uint32(0), jax.lax.bitwise_xor, (0,))
    return result


def column_numbers(size: int, *numbers: int) -> np.ndarray:
    """What `element_bits` needs of the leaf that has these numbers: one odd hash for each of `size` columns.

    Where that would be too many, or none knows how many, the leaf's own and its complement. It is data of a program, of
    which leaves of one shape then have the same kernels; so it has no fewer than two entries, since XLA takes an array
    of length 1 for a literal.
    """
    stamp: Any = np.zeros(1, np.uint32)
    for number in numbers:
        stamp = mix((stamp ^ np.uint32(number % 2**32)) + _GOLDEN)
    if not _is_constant((size,)):
        return np.concatenate([stamp, ~stamp])
    index: Any = np.arange(max(size, 2), dtype=np.uint32)
    return np.asarray(_odd(index, stamp))


def element_bits(shape: tuple[int, ...], stamp: jax.Array, columns: jax.Array | np.ndarray) -> jax.Array:
    """Random uint32, one per element, from `stamp_of_step` and `column_numbers` of the last axis.

    For an element and steps in a row they are independent and uniform: the product of the step's hash and an odd
    number. Among the elements of one step they are that hash times hashes of their rows and columns.
    """
    *outer, last = shape or (1,)
    stamps = jax.lax.broadcast(stamp, columns.shape)
    if _is_constant((last,)):
        bits = jax.lax.mul(columns, stamps)
        bits = bits if columns.shape[0] == last else jax.lax.slice(bits, (0,), (1,))
    else:
        # What cancels keeps the leaf's number from becoming a literal.
        leaf = jax.lax.slice(columns + stamps, (0,), (1,)) - stamp
        bits = _odd(jax.lax.broadcasted_iota(jnp.uint32, (last,), 0), leaf) * stamp
    if not shape:
        return jax.lax.squeeze(bits, (0,))
    bits = jax.lax.broadcast_in_dim(bits, shape, (len(outer),))
    if not outer:
        return bits
    rows = _row_numbers(tuple(outer))
    return jax.lax.mul(jax.lax.broadcast_in_dim(rows, shape, tuple(range(len(outer)))), bits)


def _row_numbers(shape: tuple[int, ...]) -> jax.Array | np.ndarray:
    """An odd uint32 for each running index over these axes; a constant of the program unless there are many."""
    salt: Any = np.full((1,) * len(shape), 0x2545F491, np.uint32)
    index: Any
    if _is_constant(shape):
        index = np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)
    else:
        index = running_index(shape, dict.fromkeys(range(len(shape)), shape))
    return _odd(index, salt)


def _is_constant(shape: tuple[int, ...]) -> bool:
    """Whether the numbers of these axes are constants of a program; otherwise they are worked out in it."""
    return all(isinstance(n, int) for n in shape) and math.prod(shape) <= 1 << 14


def _odd(index: jax.Array, salt: jax.Array) -> jax.Array:
    """Odd uint32, the hashes of indices; arrays of NumPy too."""
    return mix(index * _GOLDEN + salt) | np.uint32(1)


def wrapped(size: int) -> jax.Array | np.uint32:
    """A size modulo 2^32, also one that `jax.export` knows as a symbol only."""
    return np.uint32(size % 2**32) if isinstance(size, int) else jnp.asarray(size).astype(jnp.uint32)


def random_bits(shape: tuple[int, ...], stamp: jax.Array) -> jax.Array:
    """Independent uint32, one per element: the hash of `stamp` and the element's position."""
    return mix(running_index(shape, {axis: shape for axis in range(len(shape))}) * _GOLDEN + stamp)


def running_index(shape: tuple[int, ...], along: dict[int, tuple[int, ...]]) -> jax.Array:
    """The running index, uint32, over some axes of an array of this shape; each in an array of the shape `along` it.

    Without a factor of one or a sum with zero: all operations are there to be compiled for every leaf.
    """
    index, stride = None, 1
    for axis in sorted(along, reverse=True):
        size = shape[axis]
        if not isinstance(size, int) or size > 1:
            term = jax.lax.broadcasted_iota(jnp.uint32, along[axis], axis)
            term = term if isinstance(stride, int) and stride == 1 else term * wrapped(stride)
            index = term if index is None else index + term
        stride *= size
    return jnp.zeros((1,) * len(shape), jnp.uint32) if index is None else index
