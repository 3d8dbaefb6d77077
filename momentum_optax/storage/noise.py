"""Noise for stochastic rounding: a hash of (stamp, element), so that a replay rounds alike and no key is kept.

A stamp stands for the seed, the step, the leaf and the velocity. The element is its position in the whole array, which
XLA counts globally however the array is sharded.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from .._typing import jitted

# Odd constants of the MurmurHash3 finalizer and of the golden ratio; products wrap around in 32 bits.
_GOLDEN, _FIRST, _SECOND = (np.uint32(c) for c in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35))


def mix(x: jax.Array) -> jax.Array:
    """A permutation of uint32 in which every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * _FIRST
    x = (x ^ (x >> 13)) * _SECOND
    return x ^ (x >> 16)


def stamp_of(*numbers: jax.Array | np.uint32 | int) -> jax.Array:
    """One uint32 from several integers, in their order and modulo 2^32; scalars or arrays that broadcast."""
    # A Python integer modulo 2^32, as JAX would convert it if it fitted an int32.
    return _hashed(*(np.uint32(n % 2**32) if isinstance(n, int) else n for n in numbers))


@jitted
def _hashed(*numbers: jax.Array | np.uint32) -> jax.Array:
    x = jnp.zeros((), jnp.uint32)
    for number in numbers:
        x = mix((x ^ number.astype(jnp.uint32)) + _GOLDEN)
    return x


def wrapped(size: int) -> jax.Array | np.uint32:
    """A size modulo 2^32, also one that `jax.export` knows as a symbol only."""
    return np.uint32(size % 2**32) if isinstance(size, int) else jnp.asarray(size).astype(jnp.uint32)


def random_bits(shape: tuple[int, ...], stamp: jax.Array) -> jax.Array:
    """Independent uint32, one per element: the hash of `stamp` and the element's position."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        if not isinstance(size, int) or size > 1:
            stride = wrapped(math.prod(shape[axis + 1 :]))
            position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return mix(position * _GOLDEN + stamp)
