"""Velocities kept as plain arrays, in float32 or in bfloat16."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .protocol import arithmetic_dtype


class Float32Velocity(NamedTuple):
    """Velocities in full precision. `values`: one array per velocity."""

    values: tuple[Any, ...]

    @staticmethod
    def decode(parts: "Float32Velocity") -> tuple[jax.Array, ...]:
        """The values."""
        return parts.values


class Bfloat16Velocity(NamedTuple):
    """Velocities in bfloat16. `values`: one array per velocity."""

    values: tuple[Any, ...]

    @staticmethod
    def decode(parts: "Bfloat16Velocity") -> tuple[jax.Array, ...]:
        """The values, widened to float32; complex ones as they are."""
        return tuple(value.astype(arithmetic_dtype(value.dtype)) for value in parts.values)


@dataclasses.dataclass(frozen=True)
class Cast:
    """A storage that casts. Complex leaves keep their own dtype: there is no narrower complex one.

    Attributes:
      parts: The class of the stored form.
      narrow: Whether real velocities are kept in bfloat16 rather than in the arithmetic's dtype.
    """

    parts: Any
    narrow: bool

    def init(self, leaf: Any, order: int) -> Any:
        """Zeros."""
        full = arithmetic_dtype(leaf.dtype)
        dtype = jnp.bfloat16 if self.narrow and not jnp.issubdtype(full, jnp.complexfloating) else full
        # Each velocity is made on its own: two that shared a buffer could not be donated.
        return self.parts(tuple(jnp.zeros_like(leaf, dtype=dtype) for _ in range(order)))

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any) -> Any:
        """The velocities in the dtypes of `previous`."""
        pairs = zip(velocities, previous.values, strict=True)
        return self.parts(tuple(new.astype(old.dtype) for new, old in pairs))


def float32() -> Cast:
    """Velocities in float32, 4 bytes per parameter and velocity; in float64 or complex where the leaf is."""
    return Cast(Float32Velocity, narrow=False)


def bfloat16() -> Cast:
    r"""Velocities in bfloat16, 2 bytes per parameter and velocity, rounded to nearest.

    The relative error of one rounding is at most 2^-8. Slow averages stall: once a step changes a velocity by less than
    half a unit in its last place nothing changes at all. An `ema` of a constant 1 stops at 0.984, 0.805, 0.25 and 0.031
    for decay 0.9, 0.99, 0.999 and 0.9999; take `float32` for decays above 0.9.
    """
    return Cast(Bfloat16Velocity, narrow=True)
