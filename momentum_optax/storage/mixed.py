"""Velocities in several storages: where each leaf is in a state, and what the state of a tree of them looks like.

A state of one storage is one NamedTuple of its class, for all leaves. Where leaves differ there is one such NamedTuple
for each class, and each of them has an array for every leaf of the parameters, of the leaf's rank: that is what
`optax.tree.map_params` and the partition specifications of Flax find their way through, as they would not through trees
with leaves left out. The arrays for leaves that are in another class are bools with one element, as those of `compress`
are for leaves that it does not compress. So a state says by itself where each leaf is, whatever optimizer it meets:
velocities are read without one, and a leaf that is in another storage than an optimizer wants is found by its path.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .. import _tree
from .._export import serializable
from .._typing import Leaf, Number, PyTree, TreeDef
from .protocol import Storage


@serializable
class VelocityByLeaf(NamedTuple):
    """Velocities in several storages.

    Attributes:
      stored: For each class of stored velocities, by its name, one of it: its parts, each a tuple with one tree per
        velocity. Where a leaf is in another class the entries are bool, of the leaf's rank and shape (1, ..., 1).
    """

    stored: dict[str, PyTree]

    @staticmethod
    def decode(state: "VelocityByLeaf") -> tuple[jax.Array, ...]:
        """The velocities of one leaf, by the class that holds it."""
        stored = stored_velocity(state)
        decoded: tuple[jax.Array, ...] = type(stored).decode(stored)
        return decoded

    @staticmethod
    def rescale(state: "VelocityByLeaf", factor: Number) -> "VelocityByLeaf":
        """The velocities of one leaf times a number."""
        stored = stored_velocity(state)
        replaced: VelocityByLeaf = with_stored(state, type(stored).rescale(stored, factor))
        return replaced


class Layout(NamedTuple):
    """The form of the stored velocities of a tree.

    Attributes:
      classes: For each class of stored velocities, by its name, one of it with 0 in place of arrays.
    """

    classes: dict[str, PyTree]

    @classmethod
    def of(cls, storages: Collection[Storage], order: int) -> "Layout":
        """The form of `order` velocities where these storages are used.

        Raises:
          ValueError: If two of their classes have one name.
        """
        one_of: dict[str, Storage] = {}
        for storage in storages:
            name = storage.state_type.__name__
            if one_of.setdefault(name, storage).state_type is not storage.state_type:
                raise ValueError(f"storages must have state_types of different names, got two of {name!r}")
        some = jax.ShapeDtypeStruct((1,), jnp.float32)
        forms = jax.eval_shape(lambda: {name: storage.init(some, order) for name, storage in one_of.items()})
        return cls(jax.tree.map(lambda _: 0, forms))

    @property
    def form(self) -> PyTree:
        """The form of one leaf."""
        forms = self.classes
        return VelocityByLeaf(forms) if len(forms) > 1 else next(iter(forms.values()))

    def holding(self, stored: PyTree, rank: int) -> PyTree:
        """The stored velocity of one leaf of that rank in this form; nowhere if it is None."""
        if len(self.classes) == 1 and stored is not None:
            return stored
        # Each array is made separately: two that shared a buffer could not be donated.
        empty = jax.tree.map(lambda _: jnp.zeros((1,) * rank, bool), self.form)
        return empty if stored is None else with_stored(empty, stored)


def stored_velocity(velocity: PyTree) -> PyTree:
    """The stored velocity of one leaf, of its own class."""
    if not isinstance(velocity, VelocityByLeaf):
        return velocity
    return next(x for x in velocity.stored.values() if any(map(_is_there, jax.tree.leaves(x))))


def with_stored(velocity: PyTree, stored: PyTree) -> PyTree:
    """The stored velocity of one leaf with another in the place of its class."""
    if not isinstance(velocity, VelocityByLeaf):
        return stored
    return VelocityByLeaf({**velocity.stored, type(stored).__name__: stored})


def order_of(velocity: PyTree) -> int:
    """The number of stored velocities of each leaf."""
    one = next(iter(velocity.stored.values())) if isinstance(velocity, VelocityByLeaf) else velocity
    return len(one[0])


def codes_of(velocity: PyTree) -> tuple[PyTree, ...]:
    """The first part of the stored velocities of a tree: one tree for each velocity, in boxes where they have them."""
    if not isinstance(velocity, VelocityByLeaf):
        codes: tuple[PyTree, ...] = velocity[0]
        return codes
    columns = zip(*(stored[0] for stored in velocity.stored.values()), strict=True)
    return tuple(_tree.merged(trees, _is_there) for trees in columns)


def form_of(velocity: PyTree) -> PyTree:
    """The form of one leaf of the stored velocities of a tree, with 0 in place of arrays."""
    if isinstance(velocity, VelocityByLeaf):
        return VelocityByLeaf({name: form_of(stored) for name, stored in velocity.stored.items()})
    return type(velocity)._make((0,) * len(part) for part in velocity)


def leaf_treedef_of(velocity: PyTree) -> TreeDef:
    """The structure of one leaf of the stored velocities of a tree."""
    return jax.tree.structure(form_of(velocity))


def depth_of(velocity: PyTree) -> int:
    """The number of keys before those of a parameter, in the path of an array of stored velocities."""
    return 4 if isinstance(velocity, VelocityByLeaf) else 2


def class_names(velocity: PyTree) -> list[str]:
    """The names of the classes of stored velocities."""
    return sorted(velocity.stored) if isinstance(velocity, VelocityByLeaf) else [type(velocity).__name__]


def places(velocity: PyTree) -> list[bool]:
    """For each array whether it holds something, or stands for a leaf that is in another class."""
    return [_is_there(x) for x in jax.tree.leaves(velocity)]


def _is_there(x: Leaf) -> bool:
    return bool(x.dtype != jnp.bool_)
