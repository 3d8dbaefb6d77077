"""`CompressedField`: fields of an optimizer's state in compressed form, their encoding and decoding."""

import dataclasses
from collections.abc import Callable, Collection
from typing import NamedTuple, TypeGuard, TypeVar

import jax
import jax.numpy as jnp

from .._boxes import in_box
from .._export import serializable
from .._tree import LEAF, Place, boxes_of, init_leaves, leaves_at, map_states, path_name, reboxed, unboxed
from .._typing import Count, Entry, KeyPath, PyTree, TreeDef
from ..state.mismatch import StateMismatchError, check_leaf
from ..storage import Storage
from ..storage._by_leaf import ByLeaf
from ..storage.mixed import class_names, codes_of, form_of, places, stored_velocity, with_stored
from ..storage.noise import stamp_of_step
from ..storage.protocol import EncodeContext, encode_context, new_state
from ..storage.slopes import marked, unmarked
from .initial import encode_initial

New = TypeVar("New")


@serializable
class CompressedField(NamedTuple):
    """A field of an optimizer's state, kept in a storage.

    Attributes:
      parts: The storage's parts, each a tuple with one tree of the field's structure; or a `VelocityByLeaf`. Where a
        leaf is not compressed its entries are bool, of the leaf's rank and shape (1, ..., 1).
      plain: A tree of the field's structure: each leaf that is not compressed; for one that is compressed an array of
        its dtype, of its rank and shape (1, ..., 1).
    """

    parts: PyTree
    plain: PyTree


@dataclasses.dataclass(frozen=True)
class FieldUse:
    """What an optimizer does with a field.

    Attributes:
      share: About how much of a gradient enters it, if nothing else is done to that.
      is_divided: Whether it is divided by sizes of its elements.
      is_alone: Whether no other field is kept in compressed form.
    """

    share: float
    is_divided: bool
    is_alone: bool


def map_field(function: Callable[..., New], field: CompressedField, *rest: PyTree, to: TreeDef | None = None) -> New:
    """`_tree.map_states` of a field: its leaves are `CompressedField`s of arrays."""
    return map_states(function, field, _leaf_treedef(field.parts), *rest, to=to)


def _leaf_treedef(parts: PyTree) -> TreeDef:
    """The structure of one leaf of a field with these parts."""
    return jax.tree.structure(CompressedField(form_of(parts), 0))


def is_compressed(x: object) -> TypeGuard[CompressedField]:
    """Whether `x` is a field in compressed form."""
    return isinstance(x, CompressedField)


def is_uncompressed(leaf: CompressedField) -> bool:
    """Whether a leaf of a field, as `map_field` gives it, is not compressed."""
    return not any(places(leaf.parts))


def compressed_leaves(field: CompressedField) -> list[bool]:
    """For each leaf of a field whether it is compressed."""
    return jax.tree.leaves(map_field(lambda _, leaf: not is_uncompressed(leaf), field, to=LEAF))


def field_name(path: KeyPath) -> str | None:
    """The last field of a NamedTuple on `path`."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def compress_field(
    storages: ByLeaf, tree: PyTree, chosen: list[bool], number: int, zeros: Collection[int] = frozenset()
) -> CompressedField:
    """The compressed form of the field `tree`.

    Args:
      storages: The storages of its leaves.
      tree: The field.
      chosen: For each leaf whether it is compressed.
      number: Tells the fields of a state apart, for the noise of stochastic rounding.
      zeros: The ids of leaves that are known to be zeros; no program is compiled to encode these.
    """
    layout = storages.layout(tree, 1)

    def init_leaf(place: Place, leaf: jax.Array) -> CompressedField:
        path, i = place
        one = (1,) * jnp.ndim(leaf)
        # Each array is made separately: two that shared a buffer could not be donated.
        if not chosen[i]:
            return CompressedField(layout.holding(None, len(one)), leaf)
        storage = storages.at(path, leaf)
        if id(leaf) in zeros:
            encoded = new_state(storage, leaf, 1, number, i)
        else:
            encoded = encode_initial(storage, (leaf,), number, i)
        return CompressedField(layout.holding(encoded, len(one)), jnp.zeros(one, leaf.dtype))

    return init_leaves(init_leaf, tree, _leaf_treedef(layout.form))


def decompress_field(field: CompressedField) -> PyTree:
    """The field as its optimizer knows it."""
    # Where the leaf is in full, so are the names of its box.
    plain, codes = boxes_of(field.plain), boxes_of(codes_of(field.parts)[0])

    def decompress(place: Place, leaf: CompressedField) -> PyTree:
        _, i = place
        return in_box(plain[i], leaf.plain) if is_uncompressed(leaf) else in_box(codes[i], _decoded(leaf))

    return map_field(decompress, field, to=LEAF)


def recompress_field(
    storages: ByLeaf,
    old: CompressedField,
    tree: PyTree,
    step: Count | None,
    number: int,
    *,
    gradients: PyTree,
    use: FieldUse,
) -> CompressedField:
    """The compressed form of the field `tree`, which replaces `old`; `number` as for `compress_field`.

    Args:
      storages: How its leaves are kept.
      old: The field before this step.
      tree: Its new values.
      step: The number of the step, if a storage reads it.
      number: As for `compress_field`.
      gradients: What the optimizer was given, for a storage that looks at what enters.
      use: What the optimizer does with the field.
    """
    _check_classes(storages, old)
    entering = leaves_at(jax.tree.structure(unboxed(old.plain)), gradients)
    stamp = None if step is None else stamp_of_step(step)

    def recompress(place: Place, leaf: CompressedField, new: Entry) -> CompressedField:
        path, i = place
        if new is None:
            return leaf
        if is_uncompressed(leaf):
            return leaf._replace(plain=in_dtype_of(leaf.plain, new))
        storage = storages.at(path, new)
        check_leaf(path_name(path), stored_velocity(leaf.parts), storage.state_type)
        write, g = encode_context(storage, new, (stamp, number, i), (1.0,)), entering[i]
        write = write._replace(is_divided=use.is_divided, is_alone=use.is_alone)
        if g is not None and jnp.shape(g) == new.shape:
            write = write._replace(entering=(jnp.asarray(g), use.share, False))
        return _encoded(storage, leaf, new, write)

    field: CompressedField = reboxed(map_field(recompress, old, tree), old)
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


def _check_classes(storages: ByLeaf, field: CompressedField) -> None:
    """Raise unless a field is kept in the classes of these storages, as far as they are known."""
    if storages.known is None:
        return
    got, expected = class_names(field.parts), sorted({storage.state_type.__name__ for storage in storages.known})
    if got != expected:
        raise StateMismatchError(
            f"the state must be kept as {' and '.join(expected)}, got {' and '.join(got)}: mo.convert(opt_state, "
            "storage, like=tx.init(params)) changes that"
        )


def _decoded(leaf: CompressedField) -> jax.Array:
    """The value of a leaf that is compressed."""
    dtype = leaf.plain.dtype if _has_floats(leaf.parts) else unmarked(leaf.plain).dtype
    values: tuple[jax.Array, ...] = leaf.parts.decode(leaf.parts)
    return values[0].astype(dtype)


def _encoded(storage: Storage, leaf: CompressedField, new: jax.Array, write: EncodeContext) -> CompressedField:
    """The leaf with another value."""
    parts = with_stored(leaf.parts, storage.encode((new,), stored_velocity(leaf.parts), write))
    # Codes that have floats beside them carry the mark of `marked` there.
    return CompressedField(parts, leaf.plain if _has_floats(parts) else marked(leaf.plain, new))


def _has_floats(parts: PyTree) -> bool:
    return any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(parts))
