"""Velocities in bfloat16, rounded stochastically or to nearest."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks
from .._export import serializable
from .._typing import Leaf, Number
from .protocol import EncodeContext, arithmetic_dtype, check_axis_names, times
from .rounding import rounded_at


@serializable
class Bfloat16Velocity(NamedTuple):
    """Velocities in bfloat16. `values`: one array per velocity."""

    values: tuple[jax.Array, ...]

    @staticmethod
    def decode(state: "Bfloat16Velocity") -> tuple[jax.Array, ...]:
        """The values, widened to float32; complex ones unchanged."""
        return tuple(value.astype(arithmetic_dtype(value.dtype)) for value in state.values)

    @staticmethod
    def rescale(state: "Bfloat16Velocity", factor: Number) -> "Bfloat16Velocity":
        """The values times a number, rounded to nearest."""
        return Bfloat16Velocity(tuple(times(x, factor) for x in state.values))


@dataclasses.dataclass(frozen=True)
class Bfloat16:
    """See `bfloat16`."""

    rounding: str = "stochastic"
    seed: int = 0
    axis_names: tuple[str, ...] | None = None
    state_type: ClassVar[type[Bfloat16Velocity]] = Bfloat16Velocity
    bytes_per_parameter: ClassVar[float] = 2.0
    step_size: ClassVar[float] = 2.0**-7
    nonnegative: ClassVar[bool] = True
    reads_numbers: ClassVar[bool] = True

    @property
    def reads_step(self) -> bool:
        """Whether the rounding changes from step to step."""
        return self.rounding == "stochastic"

    def init(self, leaf: Leaf, order: int) -> Bfloat16Velocity:
        """Zeros; each velocity made separately, since two that shared a buffer could not be donated."""
        full = arithmetic_dtype(leaf.dtype)
        dtype = full if jnp.issubdtype(full, jnp.complexfloating) else jnp.bfloat16
        return Bfloat16Velocity(tuple(jnp.zeros_like(leaf, dtype=dtype) for _ in range(order)))

    def encode(
        self, velocities: tuple[jax.Array, ...], previous: Bfloat16Velocity, context: EncodeContext
    ) -> Bfloat16Velocity:
        """The velocities in the dtypes of `previous`."""
        stamp = context.stamp if self.reads_step else None
        return Bfloat16Velocity(
            tuple(
                rounded_at(new, stamp, (self.seed, *context.numbers, k), jnp.bfloat16)
                if stamp is not None and old.dtype == jnp.bfloat16
                else new.astype(old.dtype)
                for k, (new, old) in enumerate(zip(velocities, previous.values, strict=True))
            )
        )


def bfloat16(rounding: str = "stochastic", seed: int = 0, *, axis_names: tuple[str, ...] | None = None) -> Bfloat16:
    r"""Velocities in bfloat16, 2 bytes per parameter and velocity.

    Complex leaves keep their own dtype: there is no narrower complex one. The relative error of one rounding is below
    2^-7 (stochastic, without bias: the mean over the noise is the value) or at most 2^-8 (nearest).

    Rounded to nearest, slow averages stall: once a step changes a velocity by less than half a unit in its last place
    nothing changes at all. An `ema` of a constant 1 stops at 0.984, 0.805, 0.25 and 0.031 for decay 0.9, 0.99, 0.999
    and 0.9999. Rounded stochastically it reaches 1.

    Args:
      rounding: "stochastic" or "nearest".
      seed: Of the noise, a whole number in [0, 2^32). The noise is a function of (seed, step, leaf, velocity, element):
        a replay with the same compiled step is the run, bit for bit. Models under `vmap` share it.
      axis_names: None, or () to say that under `shard_map` or `pmap`, where JAX may not know, every device has whole
        leaves.

    Raises:
      ValueError: If `rounding` is neither of these, `seed` is out of range, or `axis_names` names an axis.
      TypeError: If `seed` is not a whole number.

    Reference:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015, arXiv:1502.02551.
    """
    _checks.choice("rounding", rounding, ("stochastic", "nearest"))
    _checks.seed(seed)
    check_axis_names(axis_names)
    return Bfloat16(rounding, int(seed), axis_names)
