"""Velocities in full precision."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from .._export import serializable
from .._typing import Leaf, Number
from .protocol import EncodeContext, arithmetic_dtype, in_dtype, times


@serializable
class Float32Velocity(NamedTuple):
    """Velocities in full precision. `values`: one array per velocity."""

    values: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Float32Velocity") -> tuple[jax.Array, ...]:
        """The values."""
        return state.values

    @staticmethod
    def rescale(state: "Float32Velocity", factor: Number) -> "Float32Velocity":
        """The values times a number, rounded to nearest."""
        return Float32Velocity(tuple(times(x, factor) for x in state.values))


@dataclasses.dataclass(frozen=True)
class Float32:
    """See `float32`."""

    state_type: ClassVar[type[Float32Velocity]] = Float32Velocity
    reads_step: ClassVar[bool] = False
    bytes_per_parameter: ClassVar[float] = 4.0
    step_size: ClassVar[float] = 2.0**-23
    nonnegative: ClassVar[bool] = True

    def init(self, leaf: Leaf, order: int) -> Float32Velocity:
        """Zeros; each velocity made separately, since two that shared a buffer could not be donated."""
        dtype = arithmetic_dtype(leaf.dtype)
        return Float32Velocity(tuple(jnp.zeros_like(leaf, dtype=dtype) for _ in range(order)))

    def encode(
        self, velocities: tuple[jax.Array, ...], previous: Float32Velocity, context: EncodeContext
    ) -> Float32Velocity:
        """The velocities in the dtypes of `previous`."""
        pairs = zip(velocities, previous.values, strict=True)
        return Float32Velocity(tuple(in_dtype(new, old.dtype) for new, old in pairs))


def float32() -> Float32:
    """Velocities in float32, 4 bytes per parameter and velocity; in float64 or complex where the leaf is."""
    return Float32()
