"""Stored velocities and fields of a state, by their names in the mappings of `convert` and `rescale`."""

from collections.abc import Collection

from jax.tree_util import GetAttrKey

from .._typing import KeyPath, PyTree
from ..transform import MomentumState
from ..wrappers.compress import CompressedState
from ..wrappers.fields import CompressedField, field_name
from ..wrappers.selection import SIGNED

# What a mapping calls the velocities of `scale_by_momentum`.
VELOCITY = "velocity"


def is_momentum_or_compressed(x: object) -> bool:
    """Whether `x` is the state of `scale_by_momentum` or `compress`."""
    return isinstance(x, MomentumState | CompressedState)


def is_momentum_or_field(x: object) -> bool:
    """Whether `x` is the state of `scale_by_momentum` or a field of `compress`."""
    return isinstance(x, MomentumState | CompressedField)


def name_of(path: KeyPath, x: PyTree) -> str:
    """The name of a node of a state: "velocity" for a state of `scale_by_momentum`, else its field."""
    return VELOCITY if isinstance(x, MomentumState) else field_name(path) or ""


def owner_of(path: KeyPath) -> str:
    """The class of the NamedTuple whose field is at `path`, a path of `optax.tree.get_all_with_path`."""
    return getattr(path[-1], "tuple_name", "")


def holds_squares(owner: str, name: str, second_moments: Collection[str]) -> bool:
    """Whether the field `name` of the state of class `owner` holds squares."""
    return name in second_moments and (owner, name) not in SIGNED


def below_field(path: KeyPath) -> KeyPath:
    """The rest of `path` after the field of a NamedTuple that it passed last."""
    return path[_field_end(path) :]


def up_to_field(path: KeyPath) -> KeyPath:
    """`path` up to the field of a NamedTuple that it passed last."""
    return path[: _field_end(path)]


def _field_end(path: KeyPath) -> int:
    return 1 + max((i for i, key in enumerate(path) if isinstance(key, GetAttrKey)), default=-1)
