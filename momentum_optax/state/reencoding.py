"""Velocities and fields of a state in other storages."""

from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import optax

from .._tree import Place, boxes_of, find_all, in_box, leaf_treedef_of, map_numbered, map_states, unboxed
from .._typing import PyTree
from ..storage import Storage, resolve
from ..transform import MomentumState
from ..wrappers.compress import CompressedState
from ..wrappers.fields import (
    CompressedField,
    compress_field,
    compressed_leaves,
    decompress_field,
    is_compressed,
)
from ..wrappers.initial import encode_initial
from ..wrappers.selection import check_fit
from .casting import cast, forms
from .stored import VELOCITY, holds_squares, name_of, owner_of

# What is kept in a storage, or holds something that is.
_CONVERTIBLE = (MomentumState, CompressedState, CompressedField)


class Targets:
    """The storages that `convert` was asked for, by field, and the fields that it found.

    Attributes:
      found: The names of fields that were found so far.
    """

    def __init__(self, storage: str | Storage | Mapping[str, str | Storage], second_moments: Collection[str]) -> None:
        self._by_name = {k: resolve(s) for k, s in storage.items()} if isinstance(storage, Mapping) else None
        self._for_all = None if isinstance(storage, Mapping) else resolve(storage)
        self._second_moments = second_moments
        self.found: set[str] = set()

    def of(self, name: str) -> Storage | None:
        """The storage of a field; None if it keeps its own."""
        return self._for_all if self._by_name is None else self._by_name.get(name)

    def checked(self, owner: str, name: str) -> Storage | None:
        """The storage of the field `name` of the state of class `owner`, once it is fit for it."""
        storage = self.of(name)
        if storage is not None:
            check_fit(storage, name, holds_squares(owner, name, self._second_moments))
        return storage

    def covers(self, names: Collection[str]) -> bool:
        """Whether there is a storage for each of these fields."""
        return all(self.of(name) is not None for name in names)

    def reads_step(self) -> bool:
        """Whether any storage reads the step."""
        several = [self._for_all] if self._by_name is None else self._by_name.values()
        return any(storage is not None and storage.reads_step for storage in several)

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
            check_fit(velocities, name, squares=False)
        for path, x in optax.tree.get_all_with_path(state, name):
            if is_compressed(x):
                targets.checked(owner_of(path), name)


def reencoded(state: PyTree, targets: Targets) -> PyTree:
    """`state` with every velocity in its storage of `targets`, which notes what was found."""

    def reencode(place: Place, x: PyTree) -> PyTree:
        path, i = place
        if isinstance(x, CompressedState):
            return _compressed(x, targets)
        storage = targets.of(name_of(path, x)) if isinstance(x, _CONVERTIBLE) else None
        if storage is None:
            return x
        targets.found.add(name_of(path, x))
        return _momentum(x, storage, i) if isinstance(x, MomentumState) else _field(x, storage, i)

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
    storage = targets.checked(owner, name)
    if storage is None:
        raise ValueError(f"storage must say how to keep {name!r}, which like compresses, got none for it")
    # Fields differ in their noise.
    return cast(compress_field(storage, tree, chosen, len(targets.found)), new, name)


def _momentum(state: MomentumState, storage: Storage, number: int) -> MomentumState:
    """The state of `scale_by_momentum` with its velocities in `storage`."""
    step = jnp.zeros([], jnp.int32) if state.step is None and storage.reads_step else state.step
    old = unboxed(state.velocity)
    order = len(old[0])
    if not order:
        return state._replace(velocity=storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), 0), step=step)
    if forms(state.velocity) == forms(jax.eval_shape(lambda: _written(storage, state.velocity, number))):
        # Nothing to write; velocities that are in this storage already are not rounded again.
        return state._replace(step=step)
    return state._replace(velocity=_written(storage, state.velocity, number), step=step)


def _written(storage: Storage, velocity: PyTree, number: int) -> PyTree:
    """The velocities in `storage`, for the first time."""
    boxes = boxes_of(velocity[0][0])
    some = jax.eval_shape(lambda: storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), len(velocity[0])))

    def written(place: Place, parts: PyTree) -> PyTree:
        _, i = place
        return in_box(boxes[i], encode_initial(storage, type(velocity).decode(parts), number, i))

    return map_states(written, velocity, leaf_treedef_of(velocity), to=jax.tree.structure(some))


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


def _field(field: CompressedField, storage: Storage, number: int) -> CompressedField:
    """A field of `compress` in `storage`."""
    chosen = compressed_leaves(field)
    tree = decompress_field(field)
    if forms(field) == forms(jax.eval_shape(lambda: compress_field(storage, tree, chosen, number))):
        return field
    return compress_field(storage, tree, chosen, number)
