"""Velocities and fields of a state in other storages."""

from collections.abc import Collection, Mapping
from typing import TypeGuard
from typing import cast as cast_type

import jax
import jax.numpy as jnp
import optax

from .._tree import LEAF, Place, find_all, init_leaves, leaves_at, map_numbered, reboxed, to_leaf_states, unboxed
from .._typing import Leaf, PyTree, TreeDef
from ..storage import resolve
from ..storage._by_leaf import AnyStorage, ByLeaf, chooser_of
from ..storage.mixed import codes_of, leaf_treedef_of, order_of, stored_velocity, with_stored
from ..transform import MomentumState
from ..wrappers.compress import CompressedState
from ..wrappers.fields import (
    CompressedField,
    compress_field,
    compressed_leaves,
    decompress_field,
    is_compressed,
    map_field,
)
from ..wrappers.initial import encode_initial
from ..wrappers.selection import check_fit, checked_second_moments
from .casting import cast, forms
from .stored import VELOCITY, holds_squares, name_of, owner_of
from .velocity import decoded

# What is kept in a storage, or holds something that is.
_CONVERTIBLE = (MomentumState, CompressedState, CompressedField)


class Targets:
    """The storages that `convert` was asked for, by field, and the fields that it found.

    Attributes:
      found: The names of fields that were found so far.
    """

    def __init__(self, storage: AnyStorage | Mapping[str, AnyStorage], second_moments: Collection[str]) -> None:
        self._by_name: dict[str, ByLeaf] | None = None
        self._for_all: ByLeaf | None = None
        if _is_by_field(storage):
            self._by_name = {name: chooser_of(resolve(value)) for name, value in storage.items()}
        else:
            self._for_all = chooser_of(resolve(cast_type(AnyStorage, storage)))
        self._second_moments = checked_second_moments(second_moments)
        self.found: set[str] = set()

    def of(self, name: str) -> ByLeaf | None:
        """The storages of a field; None if it keeps its own."""
        return self._for_all if self._by_name is None else self._by_name.get(name)

    def checked(self, owner: str, name: str, tree: PyTree) -> ByLeaf | None:
        """The storages of the field `name` of the state of class `owner`, once they are fit for it."""
        storages = self.of(name)
        if storages is not None:
            check_fit(storages, name, holds_squares(owner, name, self._second_moments), tree)
        return storages

    def covers(self, names: Collection[str]) -> bool:
        """Whether there is a storage for each of these fields."""
        return all(self.of(name) is not None for name in names)

    def reads_step(self) -> bool:
        """Whether any storage reads the step."""
        several = [self._for_all] if self._by_name is None else self._by_name.values()
        return any(storages is not None and storages.reads_step for storages in several)

    def missing(self) -> list[str]:
        """The names of a mapping that were not found."""
        return sorted((self._by_name or {}).keys() - self.found)


def fields_of(state: PyTree) -> set[str]:
    """The names of what could be converted."""
    names: set[str] = set()
    for path, x in find_all(state, *_CONVERTIBLE):
        names |= fields_of(x.inner) if isinstance(x, CompressedState) else {name_of(path, x)}
    return names


def check_storages(state: PyTree, targets: Targets) -> None:
    """Raise unless every field goes to a storage that is fit for it."""
    for name in sorted(fields_of(state)):
        velocities = targets.of(name) if name == VELOCITY else None
        if velocities is not None:
            for _, x in find_all(state, MomentumState):
                check_fit(velocities, name, False, codes_of(x.velocity)[:1])
        for path, x in optax.tree.get_all_with_path(state, name):
            if is_compressed(x):
                targets.checked(owner_of(path), name, jax.eval_shape(decompress_field, x))


def reencoded(state: PyTree, targets: Targets) -> PyTree:
    """`state` with every velocity in its storage of `targets`, which notes what was found."""

    def reencode(place: Place, x: PyTree) -> PyTree:
        path, i = place
        if isinstance(x, CompressedState):
            return _compressed(x, targets)
        storages = targets.of(name_of(path, x)) if isinstance(x, _CONVERTIBLE) else None
        if storages is None:
            return x
        targets.found.add(name_of(path, x))
        return _momentum(x, storages, i) if isinstance(x, MomentumState) else _field(x, storages, i)

    return map_numbered(reencode, state, is_leaf=lambda x: isinstance(x, _CONVERTIBLE))


def refitted(targets: Targets, owner: str, name: str, old: PyTree, new: PyTree) -> PyTree:
    """The field `old` of a state of class `owner` in the form of `new`; at least one of them is compressed."""
    tree = decompress_field(old) if is_compressed(old) else old
    if not is_compressed(new):
        return cast(tree, new, name)
    if is_compressed(old) and forms(old) == forms(new):
        return old
    chosen = compressed_leaves(new)
    targets.found.add(name)
    if not any(chosen):
        return CompressedField(new.parts, cast(tree, new.plain, name))
    storages = targets.checked(owner, name, tree)
    if storages is None:
        raise ValueError(f"storage must say how to keep {name!r}, which like compresses, got none for it")
    # Fields differ in their noise.
    return cast(compress_field(storages, tree, chosen, len(targets.found)), new, name)


def _momentum(state: MomentumState, storages: ByLeaf, number: int) -> MomentumState:
    """The state of `scale_by_momentum` with its velocities in `storages`."""
    order = order_of(state.velocity)
    storages = storages.of_order(order)
    step = jnp.zeros([], jnp.int32) if state.step is None and storages.reads_step else state.step
    velocity = _written(storages, state.velocity, number) if order else storages.layout((), 0).form
    return state._replace(velocity=velocity, step=step)


def _written(storages: ByLeaf, velocity: PyTree, number: int) -> PyTree:
    """The velocities in `storages`. Those that are in their storage already are not rounded again."""
    like, trees, bare = codes_of(velocity)[0], decoded(velocity), unboxed(velocity)
    treedef: TreeDef = jax.tree.structure(unboxed(like))
    layout = storages.layout(trees[0], len(trees))
    slots = to_leaf_states(bare, treedef, leaf_treedef_of(velocity))
    rows = list(zip(*(leaves_at(treedef, tree) for tree in trees), strict=True))

    def written(place: Place, _: Leaf) -> PyTree:
        path, i = place
        values, old = rows[i], stored_velocity(slots[i])
        storage = storages.at(path, values[0])
        fresh = jax.eval_shape(lambda: storage.init(values[0], len(values)))
        new = old if forms(old) == forms(fresh) else encode_initial(storage, values, number, i)
        return layout.holding(new, jnp.ndim(values[0]))

    new = init_leaves(written, like, jax.tree.structure(layout.form))
    # Where nothing was written the boxes are unchanged too.
    return velocity if forms(unboxed(new)) == forms(bare) else new


def _compressed(state: CompressedState, targets: Targets) -> CompressedState:
    """The state of `compress` with its fields in other storages."""
    inner = reencoded(state.inner, targets)
    step = state.step
    if targets.reads_step():
        step = jnp.zeros([], jnp.int32) if step is None else step
    elif targets.covers(fields_of(state.inner) - {VELOCITY}):
        # A field that keeps its storage may still need the step.
        step = None
    return CompressedState(step, inner)


def _field(field: CompressedField, storages: ByLeaf, number: int) -> CompressedField:
    """A field of `compress` in `storages`. Leaves that are in their storage already are not rounded again."""
    chosen = compressed_leaves(field)
    new = compress_field(storages, decompress_field(field), chosen, number)

    def kept(place: Place, fresh: CompressedField, old: CompressedField) -> CompressedField:
        _, i = place
        if not chosen[i] or forms(stored_velocity(old.parts)) != forms(stored_velocity(fresh.parts)):
            return fresh
        return old._replace(parts=with_stored(fresh.parts, stored_velocity(old.parts)))

    each: PyTree = map_field(lambda _, leaf: leaf, field, to=LEAF)
    same: CompressedField = reboxed(map_field(kept, new, each), new)
    return same


def _is_by_field(storage: object) -> TypeGuard[Mapping[str, AnyStorage]]:
    """Whether a mapping is from fields: their names are identifiers, and patterns of paths together are not."""
    return (
        isinstance(storage, Mapping)
        and bool(storage)
        and all(isinstance(name, str) and name.isidentifier() for name in storage)
    )
