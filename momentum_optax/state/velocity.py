"""`velocity`: the velocities in any optimizer state."""

import jax
import optax

from .. import _checks
from .._tree import find_all, plain, reboxed, to_leaf_states, unboxed
from .._typing import PyTree, TreeDef
from ..storage.mixed import codes_of, form_of
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


def decoded(state: MomentumState) -> list[PyTree]:
    """The velocities of one bare state as trees."""
    codes = codes_of(state.velocity)
    if not codes:
        return []
    layout: TreeDef = jax.tree.structure(form_of(state.velocity))
    treedef: TreeDef = jax.tree.structure(codes[0])
    decoded = map(type(state.velocity).decode, to_leaf_states(state.velocity, treedef, layout))
    columns = zip(*decoded, strict=True) if treedef.num_leaves else [()] * len(codes)
    return [treedef.unflatten(column) for column in columns]


def read_velocity(state: MomentumState) -> list[PyTree]:
    """The velocities of one state as trees, in boxes where the state has them."""
    trees = decoded(unboxed(state))
    return [reboxed(tree, codes) for tree, codes in zip(trees, codes_of(state.velocity), strict=True)]
