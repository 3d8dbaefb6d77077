"""A codec in one byte that takes two passes, which no compiled step can afford: the measure for those that take one."""

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


def _encode(v: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of one velocity."""
    scale = jnp.max(jnp.abs(v), row_axes(v.shape), keepdims=True)
    squares = jnp.abs(v) / jnp.where(scale > 0, scale, 1) * np.float32(127**2)
    low = jnp.minimum(jnp.floor(jnp.sqrt(squares)), 126)
    # Decoded values are squares, so the chance to round up is linear between squares: that makes the mean right.
    up = jax.random.uniform(key, v.shape) < (squares - low * low) / (2 * low + 1)
    return (jnp.sign(v) * (low + up)).astype(jnp.int8), scale
