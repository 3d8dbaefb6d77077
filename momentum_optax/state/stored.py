"""Stored velocities and fields of a state, by their names in the mappings of `convert` and `rescale`."""

from collections.abc import Callable, Collection
from typing import NamedTuple

import jax

from .._checks import is_named_tuple
from .._tree import map_children
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


class FieldPath(NamedTuple):
    """The path of a leaf in a state, and the fields of NamedTuples on it.

    Attributes of other classes are not fields, although their keys are of the same type: parameters consist of such
    classes with Equinox.

    Attributes:
      path: The key path.
      ends: For each field, outer ones first, the number of keys up to it.
    """

    path: KeyPath
    ends: tuple[int, ...] = ()

    def child(self, node: PyTree, key: KeyPath) -> "FieldPath":
        """The path of the child at `key` of the node at this path."""
        path = (*self.path, *key)
        return FieldPath(path, (*self.ends, len(path)) if is_named_tuple(node) else self.ends)

    def up_to_field(self) -> KeyPath:
        """The path up to the last field."""
        return self.path[: self.ends[-1]] if self.ends else ()

    def last_field(self) -> tuple[str, KeyPath]:
        """The name of the last field, "" if there is none, and the rest of the path."""
        field = self.up_to_field()
        return (field[-1].name if field else ""), self.path[len(field) :]

    def below_fields(self) -> list[KeyPath]:
        """For each field the rest of the path."""
        return [self.path[end:] for end in self.ends]


_ROOT = FieldPath(())


def map_with_fields(
    function: Callable[[FieldPath, PyTree], PyTree],
    node: PyTree,
    is_leaf: Callable[[PyTree], bool] = lambda _: False,
    path: FieldPath = _ROOT,
) -> PyTree:
    """A state with `function(path, leaf)` in place of each leaf."""
    if is_leaf(node) or jax.tree_util.all_leaves([node]):
        return function(path, node)
    return map_children(lambda key, child: map_with_fields(function, child, is_leaf, path.child(node, key)), node)
