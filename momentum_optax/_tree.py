"""Trees like the parameters: taken apart leaf by leaf, put together again, and found in the state of any optimizer.

Besides arrays such a tree may hold None (no parameter, or no gradient), `optax.MaskedNode` (masked by Optax) and Flax's
boxes: nodes around one array with metadata, `flax.core.meta.AxisMetadata` in Linen (`nn.Partitioned`,
`nn.LogicallyPartitioned`) and `nnx.Variable` in NNX. A tree without its boxes is called bare. Transformations compute
with bare trees and return them in the boxes of what they were given, so that boxed and bare gradients and states go
together.

In a new state an array of the parameter's shape is in the parameter's box. One that is shorter along some axes is in a
box whose names are None there, and in no box if no name is left: it is split as the parameter is, where that can be.
Flax is never imported here: where there is a box, it has been.
"""

import dataclasses
import enum
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from ._typing import KeyPath, PyTree, TreeDef

# Metadata of `nnx.Variable` that names the mesh axes of each axis; the last two in older versions of Flax.
_NNX_NAMES = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def absent(x: Any) -> bool:
    """Whether a leaf is left out: None, or masked by Optax."""
    return x is None or isinstance(x, optax.MaskedNode)


def path_name(path: Any) -> str:
    """A key path as errors name it: `params['dense']['kernel']`."""
    return "params" + jax.tree_util.keystr(path)


def flatten_with_path(
    tree: PyTree, is_leaf: Callable[[PyTree], bool] | None = None
) -> tuple[list[tuple[KeyPath, PyTree]], TreeDef]:
    """Pairs of path and leaf, and the structure; `jax.tree_util.tree_flatten_with_path` with types."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)


def find_all(tree: Any, *kinds: type) -> list[tuple[Any, Any]]:
    """Path and node for each outermost node of these classes, in any chain, mask, wrapper or NNX state."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))
    return [(path, x) for path, x in pairs if isinstance(x, kinds)]


# Leaves and trees of them.


def to_trees(slots: list[Any], treedef: Any, layout: Any) -> Any:
    """One state of trees from one state of arrays for each leaf.

    Args:
      slots: For each leaf of `treedef` a state of the structure `layout`; an entry may be in a box.
      treedef: The structure of the parameters, where None and masked leaves are structure.
      layout: The structure of the state of one leaf.
    """
    # Not `jax.tree.transpose`, which takes no tree without leaves and no boxes.
    rows = map(layout.flatten_up_to, slots)
    columns = zip(*rows, strict=True) if slots else [()] * layout.num_leaves
    return layout.unflatten([treedef.unflatten(column) for column in columns])


def to_slots(state: Any, treedef: Any, layout: Any) -> list[Any]:
    """The inverse of `to_trees`, for a bare state: one state of arrays for each leaf."""
    columns = [treedef.flatten_up_to(tree) for tree in layout.flatten_up_to(state)]
    if not columns:
        return [layout.unflatten(())] * treedef.num_leaves
    return [layout.unflatten(row) for row in zip(*columns, strict=True)]


def matched(tree: Any, treedef: Any) -> list[Any] | None:
    """For each leaf of `treedef` the array in the bare `tree`, or None; None instead of a list if the trees differ."""
    try:
        leaves: list[Any] = treedef.flatten_up_to(tree)
    except (KeyError, TypeError, ValueError):
        return None
    return leaves if jax.tree_util.all_leaves([x for x in leaves if x is not None]) else None


def layout_of(parts: Any) -> Any:
    """The structure of one leaf's parts, from the parts of a whole tree: a NamedTuple of tuples, one entry each."""
    return jax.tree.structure(type(parts)(*((0,) * len(field) for field in parts)))


# Boxes.


class _Kind(enum.Enum):
    """What a class is to a tree."""

    LINEN = enum.auto()
    NNX = enum.auto()
    OTHER = enum.auto()


@functools.cache
def _kind(cls: Any) -> _Kind:
    """Whether instances of a class are boxes, and whose."""
    for module, name, kind in (("flax.nnx", "Variable", _Kind.NNX), ("flax.core.meta", "AxisMetadata", _Kind.LINEN)):
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and issubclass(cls, base):
            return kind
    return _Kind.OTHER


def _kind_of(x: Any) -> _Kind:
    cls: Any = type(x)
    return _kind(cls)


def is_box(x: Any) -> bool:
    """Whether `x` is a box of Flax around one leaf. One around a tree is a node like others.

    So is a box of Linen around nothing, which Optax's masks make: its other transformations compare with it. Variables
    of NNX go whatever is in them, as with `nnx.as_pure`.
    """
    kind = _kind_of(x)
    if kind is _Kind.OTHER:
        return False
    child = content(x)
    return jax.tree_util.all_leaves([child]) or (kind is _Kind.NNX and absent(child))


def content(x: Any) -> Any:
    """What is in the box `x`; anything else is its own content."""
    if _kind_of(x) is _Kind.OTHER:
        return x
    (child,) = jax.tree.leaves(x, is_leaf=lambda node: node is not x)
    return child


def empty(x: Any) -> bool:
    """Whether a leaf is left out, in a box of Linen perhaps."""
    return absent(content(x))


def unboxed(tree: Any) -> Any:
    """The bare tree; the same object if there is no box."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_box)
    return treedef.unflatten(map(content, leaves)) if any(map(is_box, leaves)) else tree


def plain(tree: Any) -> Any:
    """The live state of an `nnx.Optimizer` as arrays, in what boxes of Linen there are."""
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_box)
    return treedef.unflatten([content(x) if _kind_of(x) is _Kind.NNX else x for x in leaves])


def reboxed(bare: Any, like: Any) -> Any:
    """The arrays of a bare tree in the boxes of `like`, a tree of the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(bare))


def boxes_of(tree: Any) -> list[Any]:
    """For each leaf of the bare tree its box, or the leaf itself."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_box) if not absent(content(x))]


def in_box(box: Any, slot: Any) -> Any:
    """The arrays of `slot`, the state of the leaf in `box`, in boxes that fit; `slot` itself if `box` is none."""
    return jax.tree.map(functools.partial(_fitted, box), slot) if is_box(box) else slot


def _fitted(box: Any, x: Any) -> Any:
    """`x` in the box of its parameter, as far as that is true of it."""
    shape = jnp.shape(content(box))
    if jnp.shape(x) == shape:
        return _refilled(box, x)
    if jnp.ndim(x) != len(shape):
        return x
    kept = [n == m for n, m in zip(jnp.shape(x), shape, strict=True)]
    box = _renamed(box, lambda names: _where(kept, names))
    return x if box is None else _refilled(box, x)


def _refilled(box: Any, x: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(box, is_leaf=lambda node: node is not box), [x])


def _where(kept: list[bool], names: Any) -> Any:
    """The names of axes, None for those that are not kept."""
    return type(names)(*_pad(names, kept)) if isinstance(names, PartitionSpec) else tuple(_pad(names, kept))


def _pad(names: Any, kept: list[bool]) -> list[Any]:
    return [name if keep else None for name, keep in zip(names, kept, strict=False)]


def _renamed(box: Any, rename: Callable[[Any], Any]) -> Any:
    """The box with other names of axes; None if it has none, or none is left."""
    if _kind_of(box) is _Kind.LINEN:
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


def is_live(tree: Any) -> bool:
    """Whether `tree` is the state of an `nnx.Optimizer`, with every array in a variable."""
    leaves = jax.tree.leaves(tree, is_leaf=is_box)
    return bool(leaves) and all(_kind_of(x) is _Kind.NNX for x in leaves)


def live(tree: Any) -> Any:
    """`tree` as the state of an `nnx.Optimizer`."""
    array = sys.modules["flax.nnx"].OptArray
    return jax.tree.map(lambda x: x if is_box(x) else array(x), tree, is_leaf=is_box)
