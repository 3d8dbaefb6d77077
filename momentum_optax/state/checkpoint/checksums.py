"""Checksums of arrays and numbers: one for the same bits in the same places, wherever they are kept.

An array is taken as words of 32 bits (narrower elements fill the low bits of one, eight bytes are two, the low one
first), each hashed with its place; the sum of the hashes, in whole numbers, does not depend on the mesh. Host arrays
are cut into words on the host: as JAX arrays they would lose their high words.
"""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..._typing import DType, Leaf
from ...storage.noise import mix, random_bits

# A leaf of a state that can be saved.
Value: TypeAlias = "Leaf | complex"
_Function = TypeVar("_Function", bound=Callable[..., jax.Array])


def _compiled(function: _Function) -> _Function:
    """`jax.jit`, with the function's signature."""
    return cast(_Function, jax.jit(function))


# The dtype that a description gives for Python integers of more than 64 bits.
WHOLE = "int"


def has_checksum(x: object) -> bool:
    """Whether `x` is an array or number of at most 64 bits (an int: of any size), its real and imaginary part each."""
    if not hasattr(x, "dtype"):
        return isinstance(x, bool | int | float | complex)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    width = 16 if jnp.issubdtype(x.dtype, np.complexfloating) else 8
    is_known = jnp.issubdtype(x.dtype, np.number) or jnp.issubdtype(x.dtype, np.bool_)
    return bool(is_known and x.dtype.itemsize <= width)


def dtype_name(x: Value) -> str:
    """The dtype of an array or number; for a Python number the one that JAX takes it for, or a wider one that fits."""
    if hasattr(x, "dtype"):
        return str(x.dtype.newbyteorder("=") if isinstance(x, np.ndarray) else x.dtype)
    if isinstance(x, int) and not isinstance(x, bool):
        for dtype in (jnp.result_type(0), np.dtype(np.int64)):
            if np.iinfo(dtype).min <= x <= np.iinfo(dtype).max:
                return str(dtype)
        return WHOLE
    return str(jnp.result_type(x))


def checksum(x: Value) -> jax.Array:
    """A uint32 for an array or number that `has_checksum`."""
    if isinstance(x, jax.Array):
        return _of_array(_on_device(x))
    if isinstance(x, int) and dtype_name(x) == WHOLE:
        size = x.bit_length() // 32 + 1
        return _of_words(np.frombuffer(x.to_bytes(4 * size, "little", signed=True), "<u4").astype(np.uint32))
    x = np.asarray(x) if hasattr(x, "dtype") else np.asarray(x, dtype_name(x))
    x = x.astype(x.dtype.newbyteorder("="))
    if jnp.issubdtype(x.dtype, np.complexfloating):
        return _joined(_of_words(_host_words(x.real)), _of_words(_host_words(x.imag)))
    return _of_words(_host_words(x))


def _on_device(x: jax.Array) -> jax.Array:
    """`x` where it can be computed with: not in the host's memory."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    # JAX's stubs have no methods for devices.
    device = cast(Any, next(iter(x.sharding.device_set)))
    usual = device.default_memory().kind
    return x if x.sharding.memory_kind in (None, usual) else jax.device_put(x, x.sharding.with_memory_kind(usual))


@_compiled
def _of_array(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        return _joined(_of_array(jnp.real(x)), _of_array(jnp.imag(x)))
    x = x.astype(_whole_bytes(x.dtype))
    # Eight bytes become two words, along a new axis.
    word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return _of_words(jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32))


def _host_words(x: np.ndarray) -> np.ndarray:
    """The words of an array of the host, as `_of_array` has them."""
    x = np.ascontiguousarray(x.astype(_whole_bytes(x.dtype))).reshape(x.shape)
    if x.dtype.itemsize == 8:
        bits = x.view(np.uint64)
        return np.stack([bits & np.uint64(2**32 - 1), bits >> np.uint64(32)], -1).astype(np.uint32)
    return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).astype(np.uint32)


def _whole_bytes(dtype: DType) -> DType:
    """A dtype that holds the values of `dtype` in whole bytes: the sizes of narrower ones depend on the backend."""
    if jnp.issubdtype(dtype, np.bool_):
        return np.dtype(np.int8)
    if jnp.issubdtype(dtype, np.integer):
        return np.dtype(np.int8) if jnp.iinfo(dtype).bits < 8 else dtype
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 8 else dtype


@_compiled
def _of_words(words: jax.Array | np.ndarray) -> jax.Array:
    """The sum over the words, compiled once a shape."""
    # The bits and the place are hashed one after the other, so that neither can make up for the other.
    return jnp.sum(mix(mix(jnp.asarray(words)) ^ random_bits(words.shape, jnp.uint32(0))), dtype=jnp.uint32)


def _joined(real: jax.Array, imaginary: jax.Array) -> jax.Array:
    return real + mix(imaginary)
