"""`velocity`: the velocities in any optimizer state."""

import jax
import optax

from .. import _checks
from .._tree import find_all, leaf_treedef_of, map_states, plain, reboxed
from .._typing import PyTree
from ..transform import MomentumState


def velocity(opt_state: optax.OptState) -> tuple[PyTree, ...]:
    """The decoded velocities in any optimizer state: chained, masked, injected, accumulated, ...

    Args:
      opt_state: A state, or any tree, that holds states of `scale_by_momentum`; the live one of an `nnx.Optimizer` too.

    Returns:
      One tree of the parameters' structure per velocity, in float32 (wider where stored so), rule by rule and velocity
      by velocity; empty if there are no velocities, as for plain gradient descent. A velocity that its rule never reads
      is not stored and not returned.

    Raises:
      TypeError: If `opt_state` is not a state but a transformation, a rule or a function.
    """
    _checks.state("opt_state", opt_state)
    return tuple(tree for _, state in find_all(plain(opt_state), MomentumState) for tree in read_velocity(state))


def decoded(state: MomentumState) -> tuple[PyTree, ...]:
    """The velocities of one state as bare trees."""
    parts = state.velocity
    each_velocity = jax.tree.structure((0,) * len(parts[0]))
    return map_states(lambda _, leaf: type(parts).decode(leaf), parts, leaf_treedef_of(parts), to=each_velocity)


def read_velocity(state: MomentumState) -> list[PyTree]:
    """The velocities of one state as trees, in boxes where the state has them."""
    return [reboxed(tree, state.velocity[0][0]) for tree in decoded(state)]
