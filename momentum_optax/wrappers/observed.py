"""The velocities that `monitor` observes, in any optimizer state: stored, decoded, and in full precision."""

import dataclasses
from collections.abc import Iterator
from typing import TypeGuard

import jax
import optax

from .._tree import absent, find_all, flatten_with_path, reboxed, to_leaf_states, to_trees, unboxed
from .._typing import Entry, KeyPath, PyTree, TreeDef
from ..filters import Filter
from ..state.velocity import velocity
from ..storage.mixed import codes_of, form_of, order_of, stored_velocity, with_stored
from ..transform import MomentumState
from .compress import CompressedState
from .fields import CompressedField, field_name, is_uncompressed, leaf_states


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
            leaves, _, treedef = leaf_states(node)
            codes = [None if is_uncompressed(leaf) else stored_velocity(leaf.parts)[0][0] for leaf in leaves]
            found.append(Codes(treedef.unflatten(codes), field_name(path)))
    return found


def decoded_velocities(state: optax.OptState) -> list[PyTree]:
    """The values of `stored_velocities`."""
    found: list[PyTree] = []
    for _, node in _observed(state):
        if isinstance(node, MomentumState):
            found += velocity(node)
        else:
            leaves, _, treedef = leaf_states(node)
            values = [None if is_uncompressed(leaf) else leaf.parts.decode(leaf.parts)[0] for leaf in leaves]
            found.append(treedef.unflatten(values))
    return found


def in_full_precision(state: optax.OptState) -> optax.OptState:
    """`state` with decoded values in the first part of each storage, so that a step of it rounds nothing."""
    pairs, treedef = flatten_with_path(state, _is_observed)
    return treedef.unflatten([_decoded(node) if _is_observed(node) else node for _, node in pairs])


def only_momentum(state: optax.OptState) -> MomentumState:
    """The only state of `scale_by_momentum`."""
    (found,) = [node for _, node in _observed(state) if isinstance(node, MomentumState)]
    return found


def flat(tree: PyTree) -> tuple[list[Entry], TreeDef]:
    """The leaves, None and masked ones among them, and the structure; without boxes."""
    return jax.tree.flatten(unboxed(tree), is_leaf=absent)


def check_observable(state: optax.OptState, params: optax.Params, rule: Filter | None) -> None:
    """Raise unless there is something to observe, and it belongs to `params` and `rule`."""
    ours = [x for _, x in find_all(state, MomentumState, CompressedState)]
    if not ours:
        raise ValueError("tx must hold a state of scale_by_momentum or compress, got one without")
    structure = flat(params)[1]
    for codes in stored_velocities(state):
        got = flat(codes.tree)[1]
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


def _observed(state: optax.OptState) -> Iterator[tuple[KeyPath, "MomentumState | CompressedField"]]:
    return ((path, node) for path, node in flatten_with_path(state, _is_observed)[0] if _is_observed(node))


def _decoded(node: "MomentumState | CompressedField") -> PyTree:
    """A state of `scale_by_momentum`, or a field of `compress`, in full precision."""
    if isinstance(node, MomentumState):
        return node._replace(velocity=_in_full(node.velocity))
    states = leaf_states(node)
    for i, leaf in enumerate(states.leaves):
        if not is_uncompressed(leaf):
            states.leaves[i] = leaf._replace(parts=_with_values(leaf.parts))
    return reboxed(states.joined(), node)


def _in_full(velocity: PyTree) -> PyTree:
    """Stored velocities of a tree with their values as the first part of each."""
    codes, bare = codes_of(velocity), unboxed(velocity)
    if not codes:
        return velocity
    treedef, layout = jax.tree.structure(unboxed(codes[0])), jax.tree.structure(form_of(velocity))
    leaves = map(_with_values, to_leaf_states(bare, treedef, layout))
    return reboxed(to_trees(list(leaves), treedef, layout), velocity)


def _with_values(parts: PyTree) -> PyTree:
    """The stored velocities of one leaf with their values as the first part."""
    stored = stored_velocity(parts)
    return with_stored(parts, stored._replace(**{stored._fields[0]: tuple(stored.decode(stored))}))
