"""The common parts of storages in few bits: their arguments, which leaves they compress, and the layout of a new state.

A storage of this kind is a class of states, a table of the parts beside its codes, and functions to read and write one
leaf; see `Compressed`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from .. import _checks
from .._typing import DType, Leaf, Number
from .protocol import EncodeContext, check_axis_names, times
from .rows import code_shapes, seeds, zeros_along


class CompressedVelocity(Protocol):
    """A state with codes: a NamedTuple with `codes` first."""

    @property
    def codes(self) -> tuple[jax.Array, ...]:
        """One array per velocity, of the leaf's shape."""
        ...

    @property
    def _replace(self) -> Callable[..., Self]: ...


class ScaledVelocity(CompressedVelocity, Protocol):
    """A state whose velocities are codes times a scale."""

    @property
    def scale(self) -> tuple[jax.Array, ...]:
        """The scales that the codes were written with."""
        ...

    @property
    def reach(self) -> tuple[jax.Array, ...]:
        """The least scale of the next write."""
        ...

    @property
    def noise(self) -> tuple[jax.Array, ...]:
        """What the noise of the codes follows from."""
        ...


V = TypeVar("V", bound=CompressedVelocity)
S = TypeVar("S", bound=ScaledVelocity)


class Part(NamedTuple):
    """An array beside the codes of a leaf.

    Attributes:
      per: Whether there is one entry per row or a single one.
      dtype: Of the entries.
      shared: Whether all velocities of a leaf share one array, or each has one.
    """

    per: Literal["row", "leaf"]
    dtype: DType
    shared: bool = True


@dataclasses.dataclass(frozen=True)
class Compressed(Generic[V]):
    """Velocities as codes beside what gives them their scale.

    A storage derives from it and has `state_type`, a NamedTuple whose first field is `codes`; `code_dtype`;
    `beside_codes`, the fields after `codes` in their order; and `compress`, which writes one leaf.
    """

    seed: int = 0
    min_size: int = 4096
    axis_names: tuple[str, ...] | None = None
    reads_step: ClassVar[bool] = True
    state_type: ClassVar[Any]
    code_dtype: ClassVar[DType]
    beside_codes: ClassVar[dict[str, Part]]

    @classmethod
    def checked(cls, seed: int, min_size: int, axis_names: tuple[str, ...] | None) -> Self:
        """A storage with these arguments.

        Raises:
          ValueError: If a number is out of range, or `axis_names` names an axis.
          TypeError: If `seed` or `min_size` is not a whole number.
        """
        _checks.seed(seed)
        _checks.integer("min_size", min_size, 1)
        check_axis_names(axis_names)
        return cls(int(seed), int(min_size), axis_names)

    def init(self, leaf: Leaf, order: int) -> V:
        """Zeros; each array made separately, since two that shared a buffer could not be donated."""
        shapes = code_shapes(leaf, self.min_size, self.code_dtype)

        def new(part: Part) -> jax.Array:
            return zeros_along(leaf, shapes.row if part.per == "row" else shapes.one, part.dtype)

        count = {True: min(order, 1), False: order}
        beside = {name: tuple(new(part) for _ in range(count[part.shared])) for name, part in self.beside_codes.items()}
        new_state: V = self.state_type(codes=shapes.codes(leaf, order), **beside)
        return self.numbered(new_state, leaf)

    def numbered(self, parts: V, leaf: Leaf, *numbers: int) -> V:
        """The parts of a new state with the noise of the leaf of these numbers: they are data then, and not program."""
        if "noise" not in self.beside_codes or not is_compressed(parts.codes, self.code_dtype):
            return parts
        noise: tuple[jax.Array, ...] = getattr(parts, "noise")  # noqa: B009
        return parts._replace(noise=tuple(seeds(leaf, old, self.seed, *numbers) for old in noise))

    def encode(self, velocities: tuple[jax.Array, ...], previous: V, context: EncodeContext) -> V:
        """The velocities in codes where `previous` holds codes, in full elsewhere."""
        if is_compressed(previous.codes, self.code_dtype):
            return self.compress(velocities, previous, context)
        full = tuple(v.astype(x.dtype) for v, x in zip(velocities, previous.codes, strict=True))
        return previous._replace(codes=full)

    def compress(self, velocities: tuple[jax.Array, ...], previous: V, context: EncodeContext) -> V:
        """The velocities in codes."""
        raise NotImplementedError


def is_compressed(codes: tuple[jax.Array, ...], dtype: DType) -> bool:
    """Whether the first part of a leaf holds codes, not the velocities in full; False without velocities."""
    return bool(codes) and codes[0].dtype == dtype


def rescaled(state: S, factor: Number, dtype: DType) -> S:
    """The state of `factor` times the velocities, for codes with a `scale` and a `reach`; the codes stay."""
    return state._replace(
        codes=tuple(x if x.dtype == dtype else times(x, factor) for x in state.codes),
        scale=tuple(times(x, factor) for x in state.scale),
        reach=tuple(times(x, jnp.abs(factor)) for x in state.reach),
    )
