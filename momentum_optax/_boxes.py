"""Flax's boxes: nodes of a tree around one array, with metadata that names mesh axes.

They are `flax.core.meta.AxisMetadata` in Linen (`nn.Partitioned`, `nn.LogicallyPartitioned`) and `nnx.Variable` in NNX.
Here is one box at a time; `_tree` takes trees out of their boxes and puts them back.

In a new state an array of the parameter's shape is in the parameter's box. One that is shorter along some axes is in a
box whose names are None there, and in no box if no name is left: it is split as the parameter is, where that can be.
Flax is never imported here: where there is a box, it has been.
"""

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ._typing import Function, Leaf, PyTree

State = TypeVar("State")
AxisNames = TypeVar("AxisNames", tuple[str | None, ...], PartitionSpec)

# Metadata of `nnx.Variable` that names the mesh axes of each axis; the last two in older versions of Flax.
_NNX_NAMES = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def _cached(function: Function) -> Function:
    """`functools.cache` for functions of a class, which type checkers do not take for hashable."""
    return cast(Function, functools.cache(function))


class BoxKind(enum.Enum):
    """The library of Flax that a class of boxes is from."""

    LINEN = enum.auto()
    NNX = enum.auto()
    NONE = enum.auto()


@_cached
def box_kind(cls: type) -> BoxKind:
    """Whether instances of a class are boxes, and of which library."""
    rows = (("flax.nnx", "Variable", BoxKind.NNX), ("flax.core.meta", "AxisMetadata", BoxKind.LINEN))
    for module, name, kind in rows:
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and issubclass(cls, base):
            return kind
    return BoxKind.NONE


def content(x: PyTree) -> PyTree:
    """The leaf in the box `x`; `x` itself if it is not a box."""
    if box_kind(type(x)) is BoxKind.NONE:
        return x
    (child,) = jax.tree.leaves(x, is_leaf=lambda node: node is not x)
    return child


def in_variable(x: Leaf) -> PyTree:
    """An array as `nnx.Optimizer` keeps one of its state."""
    return sys.modules["flax.nnx"].OptArray(x)


def in_box(box: PyTree, leaf_state: State) -> State:
    """The arrays of `leaf_state`, the state of the leaf in `box`, in boxes that fit; unchanged without a box."""
    if box_kind(type(box)) is BoxKind.NONE:
        return leaf_state
    return cast(State, jax.tree.map(functools.partial(_fitted, box), leaf_state))


def _fitted(box: PyTree, x: Leaf) -> PyTree:
    """`x` in the box of its parameter, with the names of the axes that it has in full."""
    shape = jnp.shape(content(box))
    if jnp.shape(x) == shape:
        return _refilled(box, x)
    if jnp.ndim(x) != len(shape):
        return x
    kept = [n == m for n, m in zip(jnp.shape(x), shape, strict=True)]
    box = _renamed(box, lambda names: _where(kept, names))
    return x if box is None else _refilled(box, x)


def _refilled(box: PyTree, x: Leaf) -> PyTree:
    return jax.tree.map(lambda _: x, box, is_leaf=lambda node: node is not box)


def _where(kept: list[bool], names: AxisNames) -> AxisNames:
    """The names of axes, None for those that are not kept."""
    return type(names)(*_pad(names, kept)) if isinstance(names, PartitionSpec) else tuple(_pad(names, kept))


def _pad(names: AxisNames, kept: list[bool]) -> list[str | None]:
    return [name if keep else None for name, keep in zip(names, kept, strict=False)]


def _renamed(box: PyTree, rename: Callable[[AxisNames], AxisNames]) -> PyTree:
    """The box with other names of axes; None if it has none, or none is left."""
    if box_kind(type(box)) is BoxKind.LINEN:
        if not isinstance(getattr(box, "names", None), tuple):
            return None
        names = rename(box.names)
        return dataclasses.replace(box, names=names) if any(names) else None
    metadata = box.get_metadata()
    there = {key: metadata[key] for key in _NNX_NAMES if metadata.get(key)}
    if not there or not all(isinstance(names, tuple | PartitionSpec) for names in there.values()):
        return None
    new = {key: rename(names) for key, names in there.items()}
    return box.replace(content(box), **new) if any(any(names) for names in new.values()) else None
