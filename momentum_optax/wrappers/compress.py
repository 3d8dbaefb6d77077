"""`compress`: any Optax optimizer, with chosen fields of its state kept in a storage."""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import LEAF, Place, absent, children, find_all, map_children, map_numbered, unboxed
from .._typing import KeyPath, PyTree
from ..state.mismatch import ANYTHING, check_state
from ..storage import resolve
from ..storage._by_leaf import AnyStorage, chooser_of
from ..storage.directions import OrthogonalizeState
from ..storage.zeros import made_of_zeros
from .fields import (
    CompressedField,
    FieldUse,
    compress_field,
    decompress_field,
    field_name,
    in_dtype_of,
    is_compressed,
    recompress_field,
    without_weak_type,
)
from .selection import SECOND_MOMENTS, Candidate, Select, Selection, can_be_compressed, is_float, selection

# Fields that are added to the weights. Others are divided elementwise by their size, as in Adam, or only their signs
# count.
_ADDED = ("trace", "ema")


@serializable
class CompressedState(NamedTuple):
    """State of `compress`.

    Attributes:
      step: int32 scalar, the number of updates made; None if no storage reads it.
      inner: The state of the optimizer, with a `CompressedField` in place of each chosen field.
    """

    step: jax.Array | None
    inner: optax.OptState


def compress(
    tx: optax.GradientTransformation,
    select: Select,
    storage: AnyStorage = "int8",
    *,
    second_moments: Collection[str] = SECOND_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Keep chosen fields of an optimizer's state in a storage: read before each update of `tx`, written after it.

        mo.compress(optax.adamw(1e-3), {"mu"})                          # Adam's momentum in one byte
        mo.compress(optax.adamw(1e-3), {"mu": "int8", "nu": "uint8"})   # and its squares in another
        mo.compress(optax.adamw(1e-3), {"mu": {"head/.*": "float32", ".*": "int8"}})    # by leaf, see storage.by_leaf

    A field is an attribute of a NamedTuple in the state of `tx` with the parameters' structure, at any depth in chains,
    masks, partitions and injected hyperparameters. Its float and complex leaves of more than one element are kept in
    the storage, other leaves without compression. `tx` sees them in the dtypes that they had at `init`. Fields that are
    not named "trace" or "ema" are taken to be divided elementwise by their size, as in Adam: in int8 none of their
    values is rounded to far above itself.

    Types: the state keeps the structure and dtypes of `init` even where that of `tx` alone would not. A leaf of the
    state that `tx` replaces by None, as `optax.ema` does where the gradient is None, keeps its value.

    Memory: `init` makes the state of `tx` and then compresses it. Under `jax.jit` the compiler removes the former where
    fields start at zero.

    Args:
      tx: Any optimizer.
      select: Names of fields; or a mapping from names to storages, one for each field or for each leaf of it, see
        `storage.by_leaf`; or a predicate `(path, leaf)`, asked at `init` of each leaf that can be kept, with its key
        path in the state of `tx`.
      storage: The storage of the chosen fields, as for `scale_by_momentum`; ignored if `select` is a mapping.
      second_moments: The names of fields that hold squares. They need relative accuracy, so that a storage must be
        fit for them (its `nonnegative` is true). Adan's `v`, which has either sign, is not among them.

    Returns:
      A transformation whose state is a `CompressedState`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If there is no such storage; at `init` if a name matches no field or the predicate no leaf, if
        a field is to be kept in a storage that is not fit for it (of momentum that is orthogonalised, as in Muon, int4
        is not, and int8 gets a warning), or if `tx` has a compressed state already; at
        `update` if the state was kept in another storage (see `convert`).

    Reference:
      Eight-bit states of stateful optimizers: Dettmers et al., ICLR 2022, arXiv:2110.02861.
    """
    _checks.transformation("tx", tx)
    chosen = selection(select, chooser_of(resolve(storage)), second_moments)
    run = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> CompressedState:
        state = jax.tree.map(without_weak_type, tx.init(params))
        leaves = zip(jax.tree.leaves(state), made_of_zeros(tx.init, params), strict=False)
        inner = _compressed(state, params, chosen, {id(x) for x, is_zeros in leaves if is_zeros})
        return CompressedState(jnp.zeros([], jnp.int32) if chosen.reads_step else None, inner)

    def update(
        updates: optax.Updates, state: CompressedState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, CompressedState]:
        check_state(state, CompressedState(ANYTHING if chosen.reads_step else None, ANYTHING))
        fields = find_all(state.inner, CompressedField)
        chosen.check_state(fields)
        out, inner = run.update(updates, _decompressed(state.inner), params, **extra)

        def recompress(place: Place, old: PyTree, new: PyTree) -> PyTree:
            path, i = place
            if not is_compressed(old):
                return in_dtype_of(old, new)
            use = _use_of(field_name(path), is_alone=len(fields) == 1)
            return recompress_field(chosen.storages_at(path), old, new, state.step, i, gradients=updates, use=use)

        step = None if state.step is None else optax.safe_increment(state.step)
        return out, CompressedState(step, map_numbered(recompress, state.inner, inner, is_leaf=is_compressed))

    return optax.GradientTransformationExtraArgs(init, update)


def _use_of(name: str | None, is_alone: bool) -> FieldUse:
    """How an optimizer uses its field of this name; a sum takes all of a gradient, an average a part."""
    return FieldUse(1.0 if name == "trace" else 1 / 16, name not in _ADDED, is_alone)


def _decompressed(inner: optax.OptState) -> optax.OptState:
    """The state of an optimizer as it knows it."""
    return jax.tree.map(lambda x: decompress_field(x) if is_compressed(x) else x, inner, is_leaf=is_compressed)


def _compressed(state: optax.OptState, params: optax.Params, chosen: Selection, zeros: Collection[int]) -> PyTree:
    """`state` with each chosen field compressed; `zeros` as for `compress_field`."""
    found: list[str] = []
    compressed: list[str] = []
    asked: list[bool] = []

    def compress_chosen(field: Candidate) -> PyTree:
        name = field_name(field.path) or ""
        leaves = jax.tree.leaves(field.tree)
        if name and (not leaves or any(map(is_float, leaves))):
            found.append(name)
        selected = chosen.leaves(field.path, field.tree)
        # With a predicate every field has the same form, chosen or not: its leaves may be unknown (tree.map_params).
        if selected is None:
            return field.tree
        storages = chosen.storages_at(field.path)
        if chosen.predicate is None or any(selected):
            chosen.check_fit(storages, field)
        compressed.append(name)
        asked.extend(ok for ok, x in zip(selected, leaves, strict=True) if can_be_compressed(x))
        return compress_field(storages, field.tree, selected, len(compressed), zeros)

    new = _map_fields(compress_chosen, Candidate((), "", state), unboxed(params))
    _check_found(chosen, found, compressed, asked, state)
    return new


def _map_fields(function: Callable[[Candidate], PyTree], node: Candidate, params: PyTree) -> PyTree:
    """The state with `function` of each outermost tree in it that is like the bare `params`."""
    if isinstance(node.tree, CompressedState):
        raise ValueError("tx must not be compressed already: give select a mapping for fields in several storages")
    if _is_like(node.tree, params):
        return function(node)
    owner = type(node.tree).__name__ if _checks.is_named_tuple(node.tree) else node.owner
    orthogonalized = _orthogonalized(node.tree)

    def map_child(key: KeyPath, child: PyTree) -> PyTree:
        below = node.is_orthogonalized or key in orthogonalized
        return _map_fields(function, Candidate((*node.path, *key), owner, child, below), params)

    return map_children(map_child, node.tree)


def _orthogonalized(node: PyTree) -> list[KeyPath]:
    """The keys of the members of a chain's state that an `orthogonalize` follows."""
    if not isinstance(node, tuple) or _checks.is_named_tuple(node):
        return []
    members = children(node)
    last = max((i for i, (_, x) in enumerate(members) if find_all(x, OrthogonalizeState)), default=0)
    return [key for key, _ in members[:last]]


def _is_like(node: PyTree, params: PyTree) -> bool:
    """Whether `node` has the structure of the bare `params`, where leaves and subtrees may be masked."""
    bare = unboxed(node)
    if jax.tree.structure(bare, is_leaf=absent) == LEAF:
        # A lone leaf fits any tree.
        return not absent(node) and bool(jax.tree.structure(params, is_leaf=absent) == LEAF)
    try:
        jax.tree.map(lambda *_: 0, bare, params, is_leaf=absent)
    except (ValueError, TypeError):
        return False
    return True


def _check_found(
    chosen: Selection, found: list[str], compressed: list[str], asked: list[bool], state: optax.OptState
) -> None:
    """Raise unless every name of the selection was met, or its predicate true of a leaf.

    Args:
      chosen: The selection.
      found: The names of fields that could be compressed.
      compressed: Those of fields that were.
      asked: Whether the selection includes each leaf that can be compressed.
      state: The state of the optimizer.
    """
    fields = ", ".join(repr(name) for name in dict.fromkeys(found)) or "none"
    names = chosen.by_field or {}
    missing = ", ".join(repr(name) for name in names if name not in compressed)
    if missing:
        hint = ". A rule keeps its velocity itself: give storage= to scale_by_momentum or mo.sgd instead"
        is_ours = "velocity" in names and "velocity" in _field_names(state)
        raise ValueError(
            f"select must name fields of floats that are like the parameters ({fields}), got {missing}"
            f"{hint if is_ours else ''}"
        )
    if chosen.predicate is not None and asked and not any(asked):
        raise ValueError(f"select must be true of a leaf in one of the fields {fields}, and is false of all")


def _field_names(state: optax.OptState) -> Iterator[str]:
    """The names of all fields of NamedTuples on the way to leaves."""
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        yield from (key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey))
