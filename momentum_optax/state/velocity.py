"""`velocity`: the velocities in any optimizer state."""

import jax
import optax

from .. import _checks
from .._tree import find_all, map_states, plain, reboxed
from .._typing import PyTree
from ..storage.mixed import codes_of, leaf_treedef_of, order_of
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


def decoded(stored: PyTree) -> tuple[PyTree, ...]:
    """Stored velocities as bare trees."""
    each = jax.tree.structure((0,) * order_of(stored))
    return map_states(lambda _, leaf: type(stored).decode(leaf), stored, leaf_treedef_of(stored), to=each)


def read_velocity(state: MomentumState) -> list[PyTree]:
    """The velocities of one state as trees, in boxes where the state has them."""
    trees = decoded(state.velocity)
    return [reboxed(tree, codes) for tree, codes in zip(trees, codes_of(state.velocity), strict=True)]
