"""Velocities in full precision."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from .protocol import Write, arithmetic_dtype, times


class Float32Velocity(NamedTuple):
    """Velocities in full precision. `values`: one array per velocity."""

    values: tuple[Any, ...]

    @staticmethod
    def decode(parts: "Float32Velocity") -> tuple[jax.Array, ...]:
        """The values."""
        return parts.values

    @staticmethod
    def rescale(parts: "Float32Velocity", factor: Any) -> "Float32Velocity":
        """The values times a number, rounded to nearest."""
        return Float32Velocity(tuple(times(x, factor) for x in parts.values))


@dataclasses.dataclass(frozen=True)
class Float32:
    """See `float32`."""

    parts: ClassVar[Any] = Float32Velocity
    reads_step: ClassVar[bool] = False
    bytes_per_parameter: ClassVar[float] = 4.0
    step_size: ClassVar[float] = 2.0**-23
    nonnegative: ClassVar[bool] = True

    def init(self, leaf: Any, order: int) -> Float32Velocity:
        """Zeros; each velocity made on its own, since two that shared a buffer could not be donated."""
        dtype = arithmetic_dtype(leaf.dtype)
        return Float32Velocity(tuple(jnp.zeros_like(leaf, dtype=dtype) for _ in range(order)))

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, write: Write) -> Float32Velocity:
        """The velocities in the dtypes of `previous`."""
        pairs = zip(velocities, previous.values, strict=True)
        return Float32Velocity(tuple(new.astype(old.dtype) for new, old in pairs))


def float32() -> Float32:
    """Velocities in float32, 4 bytes per parameter and velocity; in float64 or complex where the leaf is."""
    return Float32()
