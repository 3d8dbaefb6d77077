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
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from ._typing import Function, KeyPath, Leaf, PyTree, TreeDef

State = TypeVar("State")
IsLeaf: TypeAlias = Callable[[PyTree], bool]
AxisNames = TypeVar("AxisNames", tuple[str | None, ...], PartitionSpec)

# Metadata of `nnx.Variable` that names the mesh axes of each axis; the last two in older versions of Flax.
_NNX_NAMES = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


def absent(x: object) -> bool:
    """Whether a leaf is left out: None, or masked by Optax."""
    return x is None or isinstance(x, optax.MaskedNode)


def path_name(path: KeyPath) -> str:
    """A key path as errors name it: `params['dense']['kernel']`."""
    return "params" + jax.tree_util.keystr(path)


def find_all(tree: PyTree, *kinds: type[State]) -> list[tuple[KeyPath, State]]:
    """Path and node for each outermost node of these classes, in any chain, mask, wrapper or NNX state."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))
    return [(path, x) for path, x in pairs if isinstance(x, kinds)]


# Flattened trees.


def flatten(tree: PyTree, is_leaf: IsLeaf | None = None) -> tuple[list[PyTree], TreeDef]:
    """`jax.tree.flatten`, with a structure whose methods type checkers know."""
    return jax.tree.flatten(tree, is_leaf)


def flatten_with_path(tree: PyTree, is_leaf: IsLeaf | None = None) -> tuple[list[tuple[KeyPath, PyTree]], TreeDef]:
    """The same, with the path of each leaf."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf)


# Trees of leaves, and one state for each leaf.


def init_leaves(init_leaf: Callable[[KeyPath, Leaf], State], params: optax.Params, leaf_treedef: TreeDef) -> State:
    """A state of trees, in the boxes of the parameters, from `init_leaf(path, leaf)` for each of them.

    Args:
      init_leaf: Gives a state of arrays of the structure `leaf_treedef`.
      params: The parameters, arrays or shapes; None and masked leaves have no state.
      leaf_treedef: The structure of the state of one leaf.
    """
    pairs, treedef = flatten_with_path(unboxed(params))
    leaves = zip(pairs, boxes_of(params), strict=True)
    return to_trees([in_box(box, init_leaf(path, x)) for (path, x), box in leaves], treedef, leaf_treedef)


def update_leaves(
    update_leaf: Callable[[tuple[KeyPath, int], Leaf, State], tuple[jax.Array, State]],
    updates: optax.Updates,
    state: State,
    leaf_treedef: TreeDef,
) -> tuple[optax.Updates, State]:
    """Updates and a state of trees, each in its boxes, from `update_leaf((path, i), g, state)` for each leaf.

    Args:
      update_leaf: Gives the update and the new state of the leaf number `i` from its gradient `g`. A leaf with a
        gradient of None keeps its state, and its update is None.
      updates: The gradients.
      state: A state of trees, as `init_leaves` gives it.
      leaf_treedef: The structure of the state of one leaf.

    Raises:
      ValueError: If the gradients have another structure than the state, with the paths that differ.
    """
    bare, old = unboxed(updates), unboxed(state)
    first = next(iter(leaf_treedef.flatten_up_to(old)), bare)
    paths, treedef = flatten_with_path(first)
    gradients = _matched(bare, treedef)
    if gradients is None:
        _raise_mismatch(first, bare)
    states = to_leaf_states(old, treedef, leaf_treedef)
    out: list[jax.Array | None] = [None] * len(states)
    for i, ((path, _), g, leaf_state) in enumerate(zip(paths, gradients, states, strict=True)):
        if g is not None:
            out[i], states[i] = update_leaf((path, i), g, leaf_state)
    return reboxed(treedef.unflatten(out), updates), reboxed(to_trees(states, treedef, leaf_treedef), state)


def to_trees(leaf_states: Sequence[State], treedef: TreeDef, leaf_treedef: TreeDef) -> State:
    """One state of trees from one state of arrays for each leaf.

    Args:
      leaf_states: For each leaf of `treedef` a state of the structure `leaf_treedef`; an entry may be in a box.
      treedef: The structure of the parameters, where None and masked leaves are structure.
      leaf_treedef: The structure of the state of one leaf.
    """
    # Not `jax.tree.transpose`, which takes no tree without leaves and no boxes.
    rows = map(leaf_treedef.flatten_up_to, leaf_states)
    columns = zip(*rows, strict=True) if leaf_states else [()] * leaf_treedef.num_leaves
    return cast(State, leaf_treedef.unflatten([treedef.unflatten(column) for column in columns]))


def to_leaf_states(state: State, treedef: TreeDef, leaf_treedef: TreeDef) -> list[State]:
    """The inverse of `to_trees`, for a bare state: one state of arrays for each leaf."""
    columns = [treedef.flatten_up_to(tree) for tree in leaf_treedef.flatten_up_to(state)]
    if not columns:
        return [leaf_treedef.unflatten(())] * treedef.num_leaves
    return [leaf_treedef.unflatten(row) for row in zip(*columns, strict=True)]


def leaves_at(treedef: TreeDef, tree: PyTree) -> list[PyTree]:
    """What a tree, boxed or not, has at the leaves of `treedef`; None for each if it has another structure."""
    return _matched(unboxed(tree), treedef) or [None] * treedef.num_leaves


def _matched(tree: PyTree, treedef: TreeDef) -> list[Leaf | None] | None:
    """For each leaf of `treedef` the array in the bare `tree`, or None; None instead of a list if the trees differ."""
    try:
        leaves: list[Leaf | None] = treedef.flatten_up_to(tree)
    except (KeyError, TypeError, ValueError):
        return None
    return leaves if jax.tree_util.all_leaves([x for x in leaves if x is not None]) else None


def leaf_treedef_of(state: NamedTuple) -> TreeDef:
    """The structure of the stored form of one leaf, from that of a whole tree: a NamedTuple of tuples."""
    return jax.tree.structure(type(state)._make((0,) * len(field) for field in state))


def map_numbered(function: Callable[..., Leaf], tree: PyTree, *rest: PyTree) -> PyTree:
    """The tree of `function(i, leaf, *others)` for each leaf, where None is a leaf; `i` counts them."""
    leaves, treedef = flatten(tree, is_leaf=lambda x: x is None)
    others = map(treedef.flatten_up_to, rest)
    return treedef.unflatten(map(function, range(len(leaves)), leaves, *others))


def _raise_mismatch(expected: PyTree, got: PyTree) -> NoReturn:
    """Say which paths are missing from the gradients, or are too many."""
    there, here = (
        {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)}
        for tree in (expected, got)
    )
    missing, extra = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
    if missing:
        raise ValueError(f"the gradients lack {', '.join(missing)}, present at init (None keeps a velocity unchanged)")
    if extra:
        raise ValueError(f"the gradients have {', '.join(extra)}, absent at init")
    for path, x in there.items():
        if x is None and here[path] is not None:
            raise ValueError(f"a gradient for {path}, which was None at init")
    raise ValueError("the gradients must have the containers of the parameters at init, got others for the same paths")


# Boxes.


def _cached(function: Function) -> Function:
    """`functools.cache` for functions of a class, which type checkers do not take for hashable."""
    return cast(Function, functools.cache(function))


class _Kind(enum.Enum):
    """The role of a class in a tree."""

    LINEN = enum.auto()
    NNX = enum.auto()
    OTHER = enum.auto()


@_cached
def _kind(cls: type) -> _Kind:
    """Whether instances of a class are boxes, and whose."""
    for module, name, kind in (("flax.nnx", "Variable", _Kind.NNX), ("flax.core.meta", "AxisMetadata", _Kind.LINEN)):
        base = getattr(sys.modules.get(module), name, None)
        if base is not None and issubclass(cls, base):
            return kind
    return _Kind.OTHER


def is_box(x: object) -> bool:
    """Whether `x` is a box of Flax around one leaf. One around a tree is a node like others.

    So is a box of Linen around nothing, which Optax's masks make: its other transformations compare with it. Variables
    of NNX go whatever is in them, as with `nnx.as_pure`.
    """
    kind = _kind(type(x))
    if kind is _Kind.OTHER:
        return False
    child = content(x)
    return jax.tree_util.all_leaves([child]) or (kind is _Kind.NNX and absent(child))


def content(x: PyTree) -> PyTree:
    """The leaf in the box `x`; `x` itself if it is not a box."""
    if _kind(type(x)) is _Kind.OTHER:
        return x
    (child,) = jax.tree.leaves(x, is_leaf=lambda node: node is not x)
    return child


def empty(x: object) -> bool:
    """Whether a leaf is left out, in a box of Linen perhaps."""
    return absent(content(x))


def unboxed(tree: PyTree) -> PyTree:
    """The bare tree; the same object if there is no box."""
    leaves, treedef = flatten(tree, is_leaf=is_box)
    return treedef.unflatten(map(content, leaves)) if any(map(is_box, leaves)) else tree


def plain(tree: PyTree) -> PyTree:
    """The live state of an `nnx.Optimizer` as arrays, in what boxes of Linen there are."""
    leaves, treedef = flatten(tree, is_leaf=is_box)
    return treedef.unflatten([content(x) if _kind(type(x)) is _Kind.NNX else x for x in leaves])


def reboxed(bare: PyTree, like: PyTree) -> PyTree:
    """The arrays of a bare tree in the boxes of `like`, a tree of the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(bare))


def boxes_of(tree: PyTree) -> list[PyTree]:
    """For each leaf of the bare tree its box, or the leaf itself."""
    return [x for x in jax.tree.leaves(tree, is_leaf=is_box) if not absent(content(x))]


def in_box(box: PyTree, leaf_state: State) -> State:
    """The arrays of `leaf_state`, the state of the leaf in `box`, in boxes that fit; unchanged without a box."""
    return jax.tree.map(functools.partial(_fitted, box), leaf_state) if is_box(box) else leaf_state


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
    return jax.tree.unflatten(jax.tree.structure(box, is_leaf=lambda node: node is not box), [x])


def _where(kept: list[bool], names: AxisNames) -> AxisNames:
    """The names of axes, None for those that are not kept."""
    return type(names)(*_pad(names, kept)) if isinstance(names, PartitionSpec) else tuple(_pad(names, kept))


def _pad(names: AxisNames, kept: list[bool]) -> list[str | None]:
    return [name if keep else None for name, keep in zip(names, kept, strict=False)]


def _renamed(box: PyTree, rename: Callable[[AxisNames], AxisNames]) -> PyTree:
    """The box with other names of axes; None if it has none, or none is left."""
    if _kind(type(box)) is _Kind.LINEN:
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


def is_live(tree: PyTree) -> bool:
    """Whether `tree` is the state of an `nnx.Optimizer`, with every array in a variable."""
    leaves = jax.tree.leaves(tree, is_leaf=is_box)
    return bool(leaves) and all(_kind(type(x)) is _Kind.NNX for x in leaves)


def live(tree: PyTree) -> PyTree:
    """`tree` as the state of an `nnx.Optimizer`."""
    array = sys.modules["flax.nnx"].OptArray
    return jax.tree.map(lambda x: x if is_box(x) else array(x), tree, is_leaf=is_box)
