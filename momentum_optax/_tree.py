"""Trees like the parameters: taken apart leaf by leaf, put together again, and found in the state of any optimizer.

Besides arrays such a tree may hold None (no parameter, or no gradient), `optax.MaskedNode` (masked by Optax) and Flax's
boxes, see `_boxes`. A tree without its boxes is called bare. Transformations compute with bare trees and return them in
the boxes of what they were given, so that boxed and bare gradients and states go together.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn, TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import optax

from ._boxes import BoxKind, box_kind, content, in_box, in_variable
from ._typing import Entry, KeyPath, Leaf, PyTree, TreeDef

State = TypeVar("State")
NewState = TypeVar("NewState")
# The path of a leaf and its number, in the order of the tree.
Place: TypeAlias = tuple[KeyPath, int]
IsLeaf: TypeAlias = Callable[[PyTree], bool]

# The structure of a tree that is one leaf.
LEAF: TreeDef = jax.tree.structure(0)


def absent(x: object) -> bool:
    """Whether a leaf is left out: None, or masked by Optax."""
    return x is None or isinstance(x, optax.MaskedNode)


def as_array(x: Entry) -> Entry:
    """`x` as an array if it is a Python number; anything else unchanged."""
    return jnp.asarray(x) if isinstance(x, bool | int | float | complex) else x


def path_name(path: KeyPath) -> str:
    """A key path as errors name it: `params['dense']['kernel']`."""
    return "params" + jax.tree_util.keystr(path)


def find_all(tree: PyTree, *kinds: type[State]) -> list[tuple[KeyPath, State]]:
    """Path and node for each outermost node of these classes, in any chain, mask, wrapper or NNX state."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, kinds))
    return [(path, x) for path, x in pairs if isinstance(x, kinds)]


# Any tree, node by node and leaf by leaf.


def children(node: PyTree) -> list[tuple[KeyPath, PyTree]]:
    """The nodes right below, with the keys that lead there; none below a leaf."""
    return [] if jax.tree_util.all_leaves([node]) else flatten_with_path(node, lambda x: x is not node)[0]


def map_children(function: Callable[[KeyPath, PyTree], PyTree], node: PyTree) -> PyTree:
    """`node` with `function(key, child)` in place of each child; a leaf is returned unchanged."""
    if jax.tree_util.all_leaves([node]):
        return node
    return jax.tree_util.tree_map_with_path(function, node, is_leaf=lambda x: x is not node)


def map_numbered(function: Callable[..., PyTree], tree: PyTree, *rest: PyTree, is_leaf: IsLeaf | None = None) -> PyTree:
    """`jax.tree.map` of `function((path, i), leaf, *others)`, where `i` counts the leaves."""
    count = itertools.count()
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function((path, next(count)), *leaves), tree, *rest, is_leaf=is_leaf
    )


def flatten(tree: PyTree, is_leaf: IsLeaf | None = None) -> tuple[list[PyTree], TreeDef]:
    """`jax.tree.flatten`, with a structure whose methods type checkers know."""
    return jax.tree.flatten(tree, is_leaf)


def flatten_with_path(tree: PyTree, is_leaf: IsLeaf | None = None) -> tuple[list[tuple[KeyPath, PyTree]], TreeDef]:
    """The same, with the path of each leaf."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf)


# Trees of leaves, and one state for each leaf.


def init_leaves(init_leaf: Callable[[Place, Entry], State], params: optax.Params, leaf_treedef: TreeDef) -> State:
    """A state of trees, in the boxes of the parameters, from `init_leaf((path, i), leaf)` for each of them.

    Args:
      init_leaf: Gives a state of arrays of the structure `leaf_treedef`.
      params: The parameters, arrays or shapes; None and masked leaves have no state.
      leaf_treedef: The structure of the state of one leaf.
    """
    # Boxes around nothing stay, as in Optax's states.
    pairs, treedef = flatten_with_path(params, _is_full_box)
    states = [in_box(box, init_leaf((path, i), content(box))) for i, (path, box) in enumerate(pairs)]
    return to_trees(states, treedef, leaf_treedef)


def update_leaves(
    update_leaf: Callable[[Place, Entry, State], tuple[jax.Array, State]],
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
        raise_mismatch(first, bare)
    states = to_leaf_states(old, treedef, leaf_treedef)
    out: list[jax.Array | None] = [None] * len(states)
    for i, ((path, _), g, leaf_state) in enumerate(zip(paths, gradients, states, strict=True)):
        if g is not None:
            out[i], states[i] = update_leaf((path, i), g, leaf_state)
    return reboxed(treedef.unflatten(out), updates), reboxed(to_trees(states, treedef, leaf_treedef), state)


def map_states(
    function: Callable[..., NewState], state: State, leaf_treedef: TreeDef, *rest: PyTree, to: TreeDef | None = None
) -> NewState:
    """A bare state of trees from `function((path, i), leaf_state, *others)` for each leaf.

    Args:
      function: Gives the new state of the leaf number `i` from its state and its entries in `rest`.
      state: A state of trees, as `init_leaves` gives it.
      leaf_treedef: The structure of the state of one leaf.
      *rest: Trees of the structure of the parameters, in boxes or not.
      to: The structure of the new state of one leaf; `leaf_treedef` if None.
    """
    bare = unboxed(state)
    paths, treedef = flatten_with_path(next(iter(leaf_treedef.flatten_up_to(bare)), None))
    entries = (treedef.flatten_up_to(unboxed(tree)) for tree in rest)
    rows = zip(paths, to_leaf_states(bare, treedef, leaf_treedef), *entries, strict=True)
    new = [function((path, i), leaf_state, *others) for i, ((path, _), leaf_state, *others) in enumerate(rows)]
    return to_trees(new, treedef, leaf_treedef if to is None else to)


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


def flatten_up_to(treedef: TreeDef, tree: PyTree) -> list[PyTree] | None:
    """What is in the bare `tree` at the leaves of `treedef`, subtrees perhaps; None if it has another structure."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return list(treedef.flatten_up_to(tree))
    return None


def leaves_at(treedef: TreeDef, tree: PyTree) -> list[PyTree]:
    """The entries of a tree, boxed or not, at the leaves of `treedef`; None for each if it has another structure."""
    return _matched(unboxed(tree), treedef) or [None] * treedef.num_leaves


def _matched(tree: PyTree, treedef: TreeDef) -> list[Leaf | None] | None:
    """For each leaf of `treedef` the array in the bare `tree`, or None; None instead of a list if the trees differ."""
    try:
        leaves: list[Leaf | None] = treedef.flatten_up_to(tree)
    except (KeyError, TypeError, ValueError):
        return None
    return leaves if jax.tree_util.all_leaves([x for x in leaves if x is not None]) else None


class Leaves:
    """The leaves of a tree of gradients, None and masked ones among them, and the parts of states that belong to them.

    Attributes:
      values: The leaves, without boxes; Python numbers as arrays.
      treedef: The structure of the bare tree.
    """

    def __init__(self, updates: optax.Updates) -> None:
        values, self.treedef = flatten(unboxed(updates), is_leaf=absent)
        self.values: list[Entry] = list(map(as_array, values))

    def fit(self, node: PyTree) -> bool:
        """Whether the bare `node` is a tree of the same structure."""
        return bool(jax.tree.structure(node, is_leaf=absent) == self.treedef)

    def of(self, tree: PyTree) -> list[Entry]:
        """The leaves of a tree of the same structure, boxed or not; Python numbers as arrays."""
        return list(map(as_array, self.treedef.flatten_up_to(unboxed(tree))))

    def bare(self, each: list[Entry]) -> PyTree:
        """The bare tree with these leaves."""
        return self.treedef.unflatten(each)

    def to_tree(self, each: list[Entry], like: PyTree) -> PyTree:
        """The tree with these leaves, in the boxes of `like`."""
        return reboxed(self.bare(each), like)


def map_onto(function: Callable[..., jax.Array], params: PyTree, trees: Sequence[PyTree]) -> PyTree:
    """The parameters with `function(path, p, *leaves)` for each leaf that the trees hold; others are unchanged.

    Args:
      function: Takes a parameter as an array, and the leaf of each tree.
      params: In boxes or not; the result is in the same.
      trees: At least one, bare, all of the same structure: that of the bare parameters, in which leaves and subtrees
        may be left out.

    Raises:
      ValueError: If the parameters have another structure, naming a path that differs.
    """
    bare = unboxed(params)
    pairs, treedef = flatten_with_path(trees[0], absent)
    try:
        leaves = treedef.flatten_up_to(bare)
    except (KeyError, TypeError, ValueError):
        leaves = None
    if leaves is None or not all(absent(x) or _is_array(p) for (_, x), p in zip(pairs, leaves, strict=True)):
        _raise_unlike(trees[0], bare)
    columns = zip(*map(treedef.flatten_up_to, trees), strict=True)
    rows = zip(pairs, leaves, columns, strict=True)
    new = [p if absent(x) else function(path, p, *row) for (path, x), p, row in rows]
    return reboxed(treedef.unflatten(new), params)


def _is_array(x: object) -> bool:
    return x is not None and jax.tree_util.all_leaves([x])


def _raise_unlike(expected: PyTree, params: PyTree) -> NoReturn:
    """Say which parameter the state or the tree lacks."""
    there, here = ([path_name(path) for path, _ in flatten_with_path(tree)[0]] for tree in (expected, params))
    missing, extra = (sorted(set(a) - set(b)) for a, b in ((there, here), (here, there)))
    what = f"lack {missing[0]}" if missing else f"have {extra[0]} too" if extra else "have other containers"
    raise ValueError(f"params must be the tree that the state was made for: they {what}")


def map_together(function: Callable[[list[PyTree]], Sequence[PyTree]], tree: PyTree) -> PyTree:
    """The tree of `function(leaves)`, a new leaf for each of all leaves of the bare tree; in the boxes of `tree`."""
    return jax.tree.unflatten(jax.tree.structure(tree), function(jax.tree.leaves(unboxed(tree))))


def paired(updates: optax.Updates, params: optax.Params) -> list[tuple[KeyPath, Leaf | None, Leaf]]:
    """Path, gradient or None, and parameter of each leaf, from trees in boxes or not.

    Raises:
      ValueError: If the gradients have another structure than the parameters, with the paths that differ, or a gradient
        has another shape.
    """
    bare, like = unboxed(updates), unboxed(params)
    pairs, treedef = flatten_with_path(like)
    gradients = _matched(bare, treedef)
    if gradients is None:
        raise_mismatch(like, bare, "in params")
    for (path, p), g in zip(pairs, gradients, strict=True):
        # They would be broadcast.
        if g is not None and jnp.shape(g) != jnp.shape(p):
            raise ValueError(f"the gradient for {path_name(path)} must have shape {jnp.shape(p)}, got {jnp.shape(g)}")
    return [(path, g, p) for (path, p), g in zip(pairs, gradients, strict=True)]


def raise_mismatch(expected: PyTree, got: PyTree, where: str = "at init") -> NoReturn:
    """Say which paths are missing from the gradients, or are too many; `where` says what they are compared with."""
    there, here = (
        {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)}
        for tree in (expected, got)
    )
    missing, extra = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
    if missing:
        raise ValueError(f"the gradients lack {_listed(missing)}, present {where} (None keeps a velocity unchanged)")
    if extra:
        raise ValueError(f"the gradients have {_listed(extra)}, absent {where}")
    for path, x in there.items():
        if x is None and here[path] is not None:
            raise ValueError(f"a gradient for {path}, which was None {where}")
    raise ValueError(f"the gradients must have the containers of the parameters {where}, got others for the same paths")


def _listed(paths: list[str]) -> str:
    """The first of some paths, and how many there are beside them."""
    return ", ".join(paths[:2]) + (f" and {len(paths) - 2} more" if len(paths) > 2 else "")


# Trees with boxes of Flax.


def is_box(x: object) -> bool:
    """Whether `x` is a box of Flax around one leaf, or around None. One around a tree is a node like others.

    So is a box of Linen around a `MaskedNode`, which Optax's masks make: its other transformations compare with it.
    Variables of NNX go whatever is in them, as with `nnx.as_pure`.
    """
    kind = box_kind(type(x))
    if kind is BoxKind.NONE:
        return False
    child = content(x)
    return jax.tree_util.all_leaves([child]) or child is None or (kind is BoxKind.NNX and absent(child))


def empty(x: object) -> bool:
    """Whether a leaf is left out, in a box of Linen perhaps."""
    return absent(content(x))


def _is_full_box(x: object) -> bool:
    return is_box(x) and not empty(x)


def unboxed(tree: PyTree) -> PyTree:
    """The bare tree; the same object if there is no box."""
    leaves, treedef = flatten(tree, is_leaf=is_box)
    return treedef.unflatten(map(content, leaves)) if any(map(is_box, leaves)) else tree


def plain(tree: PyTree) -> PyTree:
    """The live state of an `nnx.Optimizer` as arrays, in what boxes of Linen there are."""
    leaves, treedef = flatten(tree, is_leaf=is_box)
    return treedef.unflatten([content(x) if box_kind(type(x)) is BoxKind.NNX else x for x in leaves])


def reboxed(bare: PyTree, like: PyTree) -> PyTree:
    """The arrays of a bare tree in the boxes of `like`, a tree of the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(bare))


def entries(tree: PyTree) -> list[Entry]:
    """The leaves, those that are left out among them, without boxes."""
    return list(flatten(tree, absent)[0])


def with_entries(like: PyTree, new: Iterable[Entry]) -> PyTree:
    """`like` with others in place of its `entries`, in its boxes."""
    return flatten(like, absent)[1].unflatten(new)


def boxes_of(tree: PyTree) -> list[PyTree]:
    """For each leaf of the bare tree its box, or the leaf itself."""
    return list(jax.tree.leaves(tree, is_leaf=_is_full_box))


def merged(trees: Sequence[PyTree], is_there: Callable[[Leaf], bool]) -> PyTree:
    """For each leaf that of the first tree in which it `is_there`, in its box; of the first tree if it is in none."""
    rows = zip(*map(boxes_of, trees), strict=True)
    treedef: TreeDef = jax.tree.structure(trees[0], is_leaf=_is_full_box)
    return treedef.unflatten([next((x for x in row if is_there(content(x))), row[0]) for row in rows])


def is_live(tree: PyTree) -> bool:
    """Whether `tree` is the state of an `nnx.Optimizer`, with every array in a variable."""
    leaves = jax.tree.leaves(tree, is_leaf=is_box)
    return bool(leaves) and all(box_kind(type(x)) is BoxKind.NNX for x in leaves)


def live(tree: PyTree) -> PyTree:
    """`tree` as the state of an `nnx.Optimizer`."""
    return jax.tree.map(lambda x: x if is_box(x) else in_variable(x), tree, is_leaf=is_box)
