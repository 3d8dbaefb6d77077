"""The velocities that `monitor` observes, in any optimizer state: stored, decoded, and in full precision."""

import dataclasses
from typing import TypeGuard

import jax
import optax

from .._tree import LEAF, Leaves, Place, find_all, map_states, reboxed
from .._typing import KeyPath, PyTree
from ..filters import Filter
from ..state.velocity import velocity
from ..storage.mixed import codes_of, leaf_treedef_of, order_of, stored_velocity, with_stored
from ..transform import MomentumState
from .compress import CompressedState
from .fields import CompressedField, field_name, is_uncompressed, map_field


@dataclasses.dataclass(frozen=True)
class Codes:
    """A stored velocity.

    Attributes:
      tree: Its codes, None for what `compress` does not compress.
      field: The name of the field of `compress` that it is; None for a velocity of `scale_by_momentum`.
    """

    tree: PyTree
    field: str | None


def stored_velocities(state: optax.OptState) -> list[Codes]:
    """The velocities in a state, and the fields that `compress` keeps."""
    found = []
    for path, node in _observed(state):
        if isinstance(node, MomentumState):
            found += [Codes(tree, None) for tree in codes_of(node.velocity)]
        else:
            codes = map_field(lambda _, leaf: None if is_uncompressed(leaf) else _codes(leaf.parts), node, to=LEAF)
            found.append(Codes(codes, field_name(path)))
    return found


def decoded_velocities(state: optax.OptState) -> list[PyTree]:
    """The values of `stored_velocities`."""
    found: list[PyTree] = []
    for _, node in _observed(state):
        if isinstance(node, MomentumState):
            found += velocity(node)
        else:
            found.append(
                map_field(
                    lambda _, leaf: None if is_uncompressed(leaf) else leaf.parts.decode(leaf.parts)[0], node, to=LEAF
                )
            )
    return found


def in_full_precision(state: optax.OptState) -> optax.OptState:
    """`state` with decoded values in the first part of each storage, so that a step of it rounds nothing."""
    return jax.tree.map(lambda x: _decoded(x) if _is_observed(x) else x, state, is_leaf=_is_observed)


def only_momentum(state: optax.OptState) -> MomentumState:
    """The only state of `scale_by_momentum`."""
    (found,) = [node for _, node in _observed(state) if isinstance(node, MomentumState)]
    return found


def check_observable(state: optax.OptState, params: optax.Params, rule: Filter | None) -> None:
    """Raise unless there is something to observe, and it belongs to `params` and `rule`."""
    ours = [x for _, x in find_all(state, MomentumState, CompressedState)]
    if not ours:
        raise ValueError("tx must hold a state of scale_by_momentum or compress, got one without")
    structure = Leaves(params).treedef
    for codes in stored_velocities(state):
        got = Leaves(codes.tree).treedef
        if got != structure:
            raise ValueError(f"tx must keep its velocities in trees like the parameters, {structure}, got {got}")
    orders = [order_of(x.velocity) for x in ours if isinstance(x, MomentumState)]
    if rule is not None and orders != [rule.order]:
        raise ValueError(
            f"rule must be that of the only scale_by_momentum in tx, got order {rule.order} for states with {orders} "
            "velocities"
        )


def _is_observed(x: object) -> "TypeGuard[MomentumState | CompressedField]":
    return isinstance(x, MomentumState | CompressedField)


def _observed(state: optax.OptState) -> "list[tuple[KeyPath, MomentumState | CompressedField]]":
    return find_all(state, MomentumState, CompressedField)


def _decoded(node: "MomentumState | CompressedField") -> PyTree:
    """A state of `scale_by_momentum`, or a field of `compress`, in full precision."""
    if isinstance(node, MomentumState):
        stored = node.velocity
        full = map_states(lambda _, parts: _with_values(parts), stored, leaf_treedef_of(stored))
        return node._replace(velocity=reboxed(full, stored))

    def decode(_: Place, leaf: CompressedField) -> CompressedField:
        return leaf if is_uncompressed(leaf) else leaf._replace(parts=_with_values(leaf.parts))

    return reboxed(map_field(decode, node), node)


def _codes(parts: PyTree) -> PyTree:
    """The codes of one leaf of a field."""
    return stored_velocity(parts)[0][0]


def _with_values(parts: PyTree) -> PyTree:
    """The stored velocities of one leaf with their values as the first part."""
    stored = stored_velocity(parts)
    return with_stored(parts, stored._replace(**{stored._fields[0]: tuple(stored.decode(stored))}))
