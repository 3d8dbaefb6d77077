"""The velocities in a live optimizer state by the path of their parameter: read, checked, and written back."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._paths import slash_path
from .._tree import absent, find_all, map_children, reboxed, unboxed
from .._typing import KeyPath, PyTree
from ..state.velocity import velocity
from ..storage._float32 import Float32Velocity
from ..transform import MomentumState
from ..wrappers.accumulated import AccumulatedState, ages_between_cycles, momentum_between_cycles
from .entries import listed

# Fields of states that count steps. In states of this package `count` counts something else, such as skipped steps.
_COUNTERS = ("count", "step", "gradient_step")
_OUR_COUNTERS = ("step", "gradient_step")


class ParameterVelocity(NamedTuple):
    """The velocities of one parameter, and the number of gradients that it has received if the state knows.

    `velocities` is None for a parameter that has none (masked), or whose first gradient is still to come.
    """

    velocities: "tuple[jax.Array | np.ndarray, ...] | None"
    age: int | None


def only_state(opt_state: optax.OptState) -> MomentumState:
    """The one state of `scale_by_momentum` in `opt_state`."""
    found = _momentum_states(opt_state)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one state of scale_by_momentum, got {len(found)}")
    return found[0]


def has_velocity(opt_state: optax.OptState) -> bool:
    """Whether `opt_state` holds a state of `scale_by_momentum`; an optimizer without momentum has none."""
    return bool(_momentum_states(opt_state))


def debiases(opt_state: optax.OptState) -> bool:
    """Whether the one state of `scale_by_momentum` debiases; if there are several, none may."""
    states = _momentum_states(opt_state)
    if len(states) > 1 and any(state.gain is not None for state in states):
        raise ValueError(f"opt_state must hold one state of scale_by_momentum where it debiases, got {len(states)}")
    return any(state.gain is not None for state in states)


def steps_counted(opt_state: optax.OptState) -> int | None:
    """The number of updates that a state of `scale_by_momentum` has counted; None if none counts them."""
    counts = [int(state.step) for state in _momentum_states(opt_state) if state.step is not None]
    return counts[0] if counts else None


def order_of(state: MomentumState) -> int:
    """The number of velocities per parameter."""
    return len(velocity(state))


def read(state: MomentumState) -> dict[str, ParameterVelocity]:
    """The velocities of a state by path, decoded; a masked parameter has none."""
    trees = [by_path(tree) for tree in velocity(state)]
    if not trees:
        raise ValueError("opt_state must hold velocities, got a rule without any")
    ages = {} if state.age is None else by_path(state.age)
    return {
        path: ParameterVelocity(None, None)
        if absent(first)
        else ParameterVelocity(tuple(tree[path] for tree in trees), int(np.max(ages[path])) if ages else None)
        for path, first in trees[0].items()
    }


def read_one(opt_state: optax.OptState) -> dict[str, ParameterVelocity]:
    """The velocity of each parameter, which has one.

    There may be several states of `scale_by_momentum`, as of the groups of `optax.partition`: all but one of them mask
    the parameter. A parameter in a group without momentum is masked in all.
    """
    states = _momentum_states(opt_state)
    if not states:
        raise ValueError("opt_state must hold a state of scale_by_momentum, got none")
    found: dict[str, ParameterVelocity] = {}
    for state in states:
        if order_of(state) != 1:
            raise ValueError(f"opt_state must hold one velocity per parameter, got {order_of(state)}")
        for path, new in read(state).items():
            old = found.get(path, ParameterVelocity(None, None))
            if new.velocities is not None and old.velocities is not None:
                raise ValueError(f"opt_state must hold one velocity per parameter, got two for {path!r}")
            found[path] = old if new.velocities is None else new
    return found


def write(
    opt_state: optax.OptState,
    velocities: Mapping[str, ParameterVelocity],
    steps: int | None,
    unit_response: tuple[float, ...] | None = None,
) -> optax.OptState:
    """`opt_state` with other velocities, ages and counters.

    Args:
      opt_state: Holds states of `scale_by_momentum`, in float32, as `read_one` wants them.
      velocities: One entry for each path. A parameter without velocities starts anew.
      steps: The number of updates made; needed where something counts them.
      unit_response: The velocities that a gradient of 1 at every step has given, by which a debiasing state divides.
    """
    bare = unboxed(opt_state)
    states, cycles = _momentum_states(bare), _cycles(bare)
    present = {path for state in states for path, old in read(state).items() if old.velocities is not None}
    for path, new in velocities.items():
        if new.velocities is not None and path not in present:
            raise ValueError(f"{path} is masked in opt_state, and its entry has a velocity")

    def put(x: PyTree) -> PyTree:
        if not isinstance(x, MomentumState):
            return x
        new = _written(x, velocities, unit_response)
        return new._replace(age=ages_between_cycles(new.age)) if id(x) in cycles else new

    written = jax.tree.map(put, bare, is_leaf=lambda x: isinstance(x, MomentumState))
    return reboxed(counted(written, steps), opt_state)


def _written(
    state: MomentumState, velocities: Mapping[str, ParameterVelocity], unit_response: tuple[float, ...] | None
) -> MomentumState:
    """One state with the velocities of the parameters that it does not mask."""
    if not isinstance(state.velocity, Float32Velocity):
        storage = type(state.velocity).__name__
        raise ValueError(f"opt_state must keep its velocities in float32, got {storage}: convert(...) it afterwards")
    if state.gain is not None and unit_response is None:
        raise ValueError("opt_state must not debias here: what it divides by is not in the other state")

    def fitted(k: int) -> Callable[[str, jax.Array], jax.Array]:
        return lambda path, old: _fitted(path, velocities[path], k, old)

    def seen(response: float) -> Callable[[str, jax.Array], jax.Array]:
        return lambda path, old: jnp.full_like(old, 0 if velocities[path].velocities is None else response)

    new = Float32Velocity(tuple(_mapped(tree, fitted(k)) for k, tree in enumerate(state.velocity.values)))
    age, gain = state.age, state.gain
    if age is not None:
        age = _mapped(age, lambda path, old: jnp.full_like(old, velocities[path].age or 0))
    if gain is not None and unit_response is not None:
        gain = tuple(_mapped(tree, seen(response)) for tree, response in zip(gain, unit_response, strict=True))
    return state._replace(velocity=new, age=age, gain=gain)


def counted(opt_state: optax.OptState, steps: int | None) -> optax.OptState:
    """`opt_state` with its counters at `steps`."""

    def visited(node: PyTree, path: KeyPath) -> PyTree:
        ours = type(node).__module__.partition(".")[0] == __name__.partition(".")[0]
        names = (_OUR_COUNTERS if ours else _COUNTERS) if _checks.is_named_tuple(node) else ()

        def child(key: KeyPath, x: PyTree) -> PyTree:
            here = (*path, *key)
            if getattr(key[-1], "name", None) not in names or not _is_count(x):
                return visited(x, here)
            if steps is None:
                raise ValueError(f"steps must be given, since opt_state counts them in {slash_path(here)}; got None")
            return jnp.asarray(steps, x.dtype)

        return map_children(child, node)

    return reboxed(visited(unboxed(opt_state), ()), opt_state)


def _is_count(x: PyTree) -> bool:
    """Whether a node is a whole number."""
    is_leaf = jax.tree_util.all_leaves([x]) and hasattr(x, "dtype")
    return is_leaf and not jnp.ndim(x) and bool(jnp.issubdtype(x.dtype, jnp.integer))


def by_path(tree: PyTree) -> dict[str, PyTree]:
    """The leaves by paths such as "dense/kernel"; None and a masked leaf count."""
    pairs = jax.tree_util.tree_leaves_with_path(unboxed(tree), is_leaf=absent)
    paths = [slash_path(path) for path, _ in pairs]
    if len(set(paths)) < len(paths):
        raise ValueError(f"opt_state must have a different path for each parameter, got {listed(paths)}")
    return {path: leaf for path, (_, leaf) in zip(paths, pairs, strict=True)}


def _mapped(tree: PyTree, function: Callable[[str, jax.Array], jax.Array]) -> PyTree:
    """`function(path, leaf)` of each leaf that is there."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if absent(x) else function(slash_path(path), x), tree, is_leaf=absent
    )


def _fitted(path: str, new: ParameterVelocity, k: int, like: jax.Array) -> jax.Array:
    """Velocity k of a parameter in the shape and dtype of `like`; zero for a parameter that starts anew."""
    if new.velocities is None:
        return jnp.zeros_like(like)
    value = new.velocities[k]
    if value.shape != like.shape:
        raise ValueError(f"the velocity for {path!r} must have shape {like.shape}, got {value.shape}")
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(like):
        raise TypeError(f"the velocity for {path!r} must be real as its parameter, got {value.dtype}")
    # An array of NumPy has no sharding.
    return cast("jax.Array", jax.device_put(jnp.array(value, like.dtype), getattr(like, "sharding", None)))


def _momentum_states(opt_state: optax.OptState) -> list[MomentumState]:
    """The states of `scale_by_momentum`; those of `accumulated` as if each gradient made a step."""
    _checks.state("opt_state", opt_state)
    bare = unboxed(opt_state)
    cycles = _cycles(bare)
    states = [state for _, state in find_all(bare, MomentumState)]
    return [momentum_between_cycles(cycles[id(state)]) if id(state) in cycles else state for state in states]


def _cycles(bare: optax.OptState) -> dict[int, AccumulatedState]:
    """The states of `accumulated` by the identity of the momentum in them."""
    return {id(x.momentum): x for _, x in find_all(bare, AccumulatedState)}
