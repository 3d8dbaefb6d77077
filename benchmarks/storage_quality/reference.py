"""Two codecs in one byte that take two passes, exact maxima first: the measure for the one that takes one."""

import dataclasses
from typing import ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from momentum_optax.storage.protocol import EncodeContext
from momentum_optax.storage.rows import row_axes


class ReferenceVelocity(NamedTuple):
    """Square-root codes, int8 of the leaf's shape, and scales, float32, one entry per row; one array per velocity."""

    codes: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]

    @staticmethod
    def decode(parts: "ReferenceVelocity") -> tuple[jax.Array, ...]:
        """The velocities: the scale times the signed square of code / 127."""
        pairs = zip(parts.codes, parts.scale, strict=True)
        return tuple(scale * (jnp.abs(code) * code) for code, scale in ((c / np.float32(127), s) for c, s in pairs))


@dataclasses.dataclass(frozen=True)
class Reference:
    """One byte per velocity in two passes: exact maxima first, then unbiased rounding. No leaf is too small for it."""

    seed: int = 0
    state_type: ClassVar[type[ReferenceVelocity]] = ReferenceVelocity
    reads_step: ClassVar[bool] = True
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = (127**2 - 126**2) / 127**2

    def init(self, leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct, order: int) -> ReferenceVelocity:
        """Zeros; no two arrays share a buffer."""
        row = [1 if axis in row_axes(leaf.shape) else size for axis, size in enumerate(leaf.shape)]
        return ReferenceVelocity(
            tuple(jnp.zeros_like(leaf, dtype=jnp.int8) for _ in range(order)),
            tuple(jnp.zeros(row, jnp.float32) for _ in range(order)),
        )

    def encode(
        self, velocities: tuple[jax.Array, ...], previous: ReferenceVelocity, write: EncodeContext
    ) -> ReferenceVelocity:
        """The velocities rounded to one of the two neighbouring levels, with the mean right; finite ones only."""
        del previous
        key = jax.random.fold_in(jax.random.key(self.seed), cast(jax.Array, write.stamp))
        pairs = [_encode(v, jax.random.fold_in(key, k)) for k, v in enumerate(velocities)]
        return ReferenceVelocity(*zip(*pairs, strict=True))


class DynamicVelocity(NamedTuple):
    """Codes, uint8 of the leaf's shape, and scales, float32, one entry per block; one array per velocity."""

    codes: tuple[jax.Array, ...]
    scale: tuple[jax.Array, ...]

    @staticmethod
    def decode(parts: "DynamicVelocity") -> tuple[jax.Array, ...]:
        """The velocities: the scale times the level of each code."""
        return tuple(_read(code, scale) for code, scale in zip(parts.codes, parts.scale, strict=True))


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """The code of Dettmers et al. (ICLR 2022, arXiv:2110.02861): blocks of 256 with their maxima, rounding to nearest.

    After a sign, the number of zeros before the first one is a power of ten, and what follows a fraction of it: 64
    levels from 0.1 to 1 of the block's largest, 32 from 0.01 to 0.1 and so on, down to one about 5.5e-7, and zero.
    """

    state_type: ClassVar[type[DynamicVelocity]] = DynamicVelocity
    reads_step: ClassVar[bool] = False
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = 0.9 / 64

    def init(self, leaf: jax.Array | np.ndarray | jax.ShapeDtypeStruct, order: int) -> DynamicVelocity:
        """Zeros; no two arrays share a buffer."""
        blocks = (1,) * (len(leaf.shape) - 1) + (-(-leaf.size // BLOCK),)
        return DynamicVelocity(
            tuple(jnp.full_like(leaf, ZERO, dtype=jnp.uint8) for _ in range(order)),
            tuple(jnp.zeros(blocks, jnp.float32) for _ in range(order)),
        )

    def encode(
        self, velocities: tuple[jax.Array, ...], previous: DynamicVelocity, write: EncodeContext
    ) -> DynamicVelocity:
        """The nearest levels."""
        del write
        pairs = [_nearest(v, scale.shape) for v, scale in zip(velocities, previous.scale, strict=True)]
        return DynamicVelocity(*zip(*pairs, strict=True))


BLOCK = 256


def _dynamic_levels() -> np.ndarray:
    """All 256 in ascending order: the middles of even parts of each decade, both signs, zero, and 1."""
    decades = [10.0 ** (i - 6) * (0.1 + 0.9 * (np.arange(2**i) + 0.5) / 2**i) for i in range(7)]
    positive = np.concatenate(decades)
    return np.concatenate([-positive[::-1], [0.0], positive, [1.0]]).astype(np.float32)


LEVELS = _dynamic_levels()
ZERO = int(np.flatnonzero(LEVELS == 0)[0])


def _blocks(x: jax.Array) -> jax.Array:
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _nearest(v: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Codes and scales, in this shape, of one velocity."""
    blocks = _blocks(v)
    scale = jnp.max(jnp.abs(blocks), 1, keepdims=True)
    shares = blocks / jnp.where(scale > 0, scale, 1)
    codes = jnp.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, shares)
    return codes.astype(jnp.uint8).reshape(-1)[: v.size].reshape(v.shape), scale.reshape(shape)


def _read(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """One velocity."""
    values = jnp.asarray(LEVELS)[_blocks(codes)] * scale.reshape(-1, 1)
    return values.reshape(-1)[: codes.size].reshape(codes.shape)


def _encode(v: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of one velocity."""
    scale = jnp.max(jnp.abs(v), row_axes(v.shape), keepdims=True)
    squares = jnp.abs(v) / jnp.where(scale > 0, scale, 1) * np.float32(127**2)
    low = jnp.minimum(jnp.floor(jnp.sqrt(squares)), 126)
    # Decoded values are squares, so the chance to round up is linear between squares: that makes the mean right.
    up = jax.random.uniform(key, v.shape) < (squares - low * low) / (2 * low + 1)
    return (jnp.sign(v) * (low + up)).astype(jnp.int8), scale
