"""Fields of an optimizer's state in compressed form: `CompressedField`, and the ways into it and out of it."""

from collections.abc import Collection
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp

from .._export import serializable
from .._tree import boxes_of, content, in_box, leaves_at, reboxed, to_leaf_states, to_trees, unboxed
from .._typing import Count, Entry, KeyPath, PyTree, TreeDef
from ..state.mismatch import StateMismatchError
from ..storage import Storage
from ..storage.protocol import EncodeContext, encode_context, new_state
from ..storage.slopes import marked, unmarked
from .initial import encode_initial


@serializable
class CompressedField(NamedTuple):
    """A field of an optimizer's state, kept in a storage.

    Attributes:
      parts: The storage's parts, each a tuple with one tree of the field's structure. Where a leaf is not compressed
        its entries are bool, of the leaf's rank and shape (1, ..., 1).
      plain: A tree of the field's structure: each leaf that is not compressed; for one that is compressed an array of
        its dtype, of its rank and shape (1, ..., 1).
    """

    parts: PyTree
    plain: PyTree


class _LeafStates(NamedTuple):
    """The leaves of a `CompressedField`, each a `CompressedField` of arrays, and the structures that join them.

    Attributes:
      leaves: One `CompressedField` of arrays for each leaf.
      leaf_treedef: The structure of each of them.
      treedef: The structure of the field.
    """

    leaves: list[CompressedField]
    leaf_treedef: TreeDef
    treedef: TreeDef

    def joined(self) -> CompressedField:
        """The inverse of `leaf_states`, without boxes."""
        field: CompressedField = to_trees(self.leaves, self.treedef, self.leaf_treedef)
        return field


def leaf_states(field: CompressedField) -> _LeafStates:
    """The leaves of a field, boxed or not; without boxes."""
    field = unboxed(field)
    one = CompressedField(type(field.parts)(*((0,) * len(part) for part in field.parts)), 0)
    leaf_treedef: TreeDef = jax.tree.structure(one)
    treedef: TreeDef = jax.tree.structure(field.plain)
    return _LeafStates(to_leaf_states(field, treedef, leaf_treedef), leaf_treedef, treedef)


def is_compressed(x: object) -> TypeGuard[CompressedField]:
    """Whether `x` is a field in compressed form."""
    return isinstance(x, CompressedField)


def is_uncompressed(leaf: CompressedField) -> bool:
    """Whether a leaf of a field, one of `leaf_states`, is not compressed."""
    return bool(jax.tree.leaves(leaf.parts)[0].dtype == jnp.bool_)


def field_name(path: KeyPath) -> str | None:
    """The last field of a NamedTuple on `path`."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def compress_field(
    storage: Storage, tree: PyTree, chosen: list[bool], number: int, zeros: Collection[int] = frozenset()
) -> CompressedField:
    """The compressed form of the field `tree`.

    Args:
      storage: How its leaves are kept.
      tree: The field.
      chosen: For each leaf whether it is compressed.
      number: Tells the fields of a state apart, for the noise of stochastic rounding.
      zeros: The ids of leaves that are known to be zeros; no program is compiled to encode these.
    """
    parts: PyTree = jax.eval_shape(lambda: storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), 1))
    treedef: TreeDef = jax.tree.structure(unboxed(tree))
    leaves = []
    for i, (box, keep) in enumerate(zip(boxes_of(tree), chosen, strict=True)):
        leaf = content(box)
        one = (1,) * jnp.ndim(leaf)
        # Each array is made separately: two that shared a buffer could not be donated.
        if keep:
            encoded = (
                new_state(storage, leaf, 1, number, i)
                if id(leaf) in zeros
                else encode_initial(storage, (leaf,), number, i)
            )
            state = CompressedField(encoded, jnp.zeros(one, leaf.dtype))
        else:
            state = CompressedField(jax.tree.map(lambda _, one=one: jnp.zeros(one, bool), parts), leaf)
        leaves.append(in_box(box, state))
    return _LeafStates(leaves, jax.tree.structure(CompressedField(parts, 0)), treedef).joined()


def decompress_field(field: CompressedField) -> PyTree:
    """The field as its optimizer knows it."""
    leaves, _, treedef = leaf_states(field)
    boxes = zip(boxes_of(field.plain), boxes_of(field.parts[0][0]), strict=True)
    return treedef.unflatten(
        [
            in_box(plain, leaf.plain) if is_uncompressed(leaf) else in_box(codes, _decoded(leaf))
            for leaf, (plain, codes) in zip(leaves, boxes, strict=True)
        ]
    )


def recompress_field(
    storage: Storage,
    old: CompressedField,
    tree: PyTree,
    step: Count | None,
    number: int,
    *,
    gradients: PyTree,
    share: float,
) -> CompressedField:
    """The compressed form of the field `tree`, which replaces `old`; `number` as for `compress_field`.

    Args:
      storage: How its leaves are kept.
      old: The field before this step.
      tree: Its new values.
      step: The number of the step, if a storage reads it.
      number: As for `compress_field`.
      gradients: What the optimizer was given, for a storage that looks at what enters.
      share: About how much of these enters, if nothing else is done to them.
    """
    if not isinstance(old.parts, storage.state_type):
        got, expected = type(old.parts).__name__, storage.state_type.__name__
        raise StateMismatchError(
            f"the state must be kept as {expected}, got {got}: mo.convert(opt_state, storage, like=tx.init(params)) "
            "changes that"
        )
    states = leaf_states(old)
    leaves = states.leaves
    entering = leaves_at(states.treedef, gradients)
    for i, (leaf, new) in enumerate(zip(leaves, states.treedef.flatten_up_to(unboxed(tree)), strict=True)):
        if new is None:
            continue
        if is_uncompressed(leaf):
            leaves[i] = leaf._replace(plain=in_dtype_of(leaf.plain, new))
            continue
        write = encode_context(storage, new, (step, number, i), (1.0,))
        g = entering[i]
        if g is not None and jnp.shape(g) == new.shape:
            write = write._replace(entering=(jnp.asarray(g), share, False))
        leaves[i] = _encoded(storage, leaf, new, write)
    field: CompressedField = reboxed(states.joined(), old)
    return field


def in_dtype_of(old: Entry, new: Entry) -> Entry:
    """`new` in the dtype of `old`; `old` where there is nothing new."""
    if new is None:
        return old
    if hasattr(old, "dtype") and hasattr(new, "dtype") and new.dtype != old.dtype:
        return jnp.asarray(new, old.dtype)
    return without_weak_type(new)


def without_weak_type(x: Entry) -> Entry:
    """`x` with a strong dtype: a weak one, which `jnp.full` for example gives, would change with the first step."""
    return jnp.asarray(x, x.dtype) if getattr(x, "weak_type", False) else x


def _decoded(leaf: CompressedField) -> jax.Array:
    """The value of a leaf that is compressed."""
    dtype = leaf.plain.dtype if _has_floats(leaf.parts) else unmarked(leaf.plain).dtype
    values: tuple[jax.Array, ...] = leaf.parts.decode(leaf.parts)
    return values[0].astype(dtype)


def _encoded(storage: Storage, leaf: CompressedField, new: jax.Array, write: EncodeContext) -> CompressedField:
    """The leaf with another value."""
    parts = storage.encode((new,), leaf.parts, write)
    # Codes that have floats beside them carry the mark of `marked` there.
    return CompressedField(parts, leaf.plain if _has_floats(parts) else marked(leaf.plain, new))


def _has_floats(parts: PyTree) -> bool:
    return any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(parts))
