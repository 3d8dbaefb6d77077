"""The velocities in a live optimizer state by the path of their parameter: taken out, checked, and put back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._tree import absent, find_all, reboxed, unboxed
from ..state.velocity import velocity
from ..storage._float32 import Float32Velocity
from ..transform import MomentumState

Layouts = Mapping[str, str | tuple[int, ...]]

# Axes of ours from axes of PyTorch's: `ours = theirs.transpose(axes)`.
LAYOUTS = {"linear": (1, 0), "conv1d": (2, 1, 0), "conv2d": (2, 3, 1, 0), "conv3d": (2, 3, 4, 1, 0)}

# Fields of Optax' states and of ours that count steps.
_COUNTERS = ("count", "step")


class Slot(NamedTuple):
    """One parameter: its velocities, and the number of gradients that it has received if the state knows.

    `velocities` is None for a parameter that has none (masked), or whose first gradient is still to come.
    """

    velocities: tuple[Any, ...] | None
    age: int | None


def only_state(opt_state: Any) -> MomentumState:
    """The one state of `scale_by_momentum` in `opt_state`."""
    found = _states(opt_state)
    if len(found) != 1:
        raise ValueError(f"opt_state must hold one state of scale_by_momentum, got {len(found)}")
    return found[0]


def has_velocity(opt_state: Any) -> bool:
    """Whether `opt_state` holds a state of `scale_by_momentum`; an optimizer without momentum has none."""
    return bool(_states(opt_state))


def order_of(state: MomentumState) -> int:
    """The number of velocities per parameter."""
    return len(velocity(state))


def read(state: MomentumState) -> dict[str, Slot]:
    """The velocities of a state by path, decoded; a masked parameter has none."""
    trees = velocity(state)
    if not trees:
        raise ValueError("opt_state must hold velocities, got a rule without any")
    paths, first = by_path(trees[0])
    if len(set(paths)) < len(paths):
        raise ValueError(f"opt_state must have a path of its own for each parameter, got {_listed(paths)}")
    columns = [first, *(by_path(tree)[1] for tree in trees[1:])]
    ages = by_path(state.age)[1] if state.age is not None else [None] * len(paths)
    return {
        path: Slot(None, None) if absent(row[0]) else Slot(row, None if age is None else int(np.max(age)))
        for path, row, age in zip(paths, zip(*columns, strict=True), ages, strict=True)
    }


def read_one(opt_state: Any) -> dict[str, Slot]:
    """The velocity of each parameter, which has one.

    There may be several states of `scale_by_momentum`, as of the groups of `optax.partition`: all but one of them mask
    the parameter. One that has none, whose group is without momentum, is masked in all.
    """
    states = _states(opt_state)
    if not states:
        raise ValueError("opt_state must hold a state of scale_by_momentum, got none")
    found: dict[str, Slot] = {}
    for state in states:
        if order_of(state) != 1:
            raise ValueError(f"opt_state must hold one velocity per parameter, got {order_of(state)}")
        for path, slot in read(state).items():
            if slot.velocities is not None and found.get(path, slot) is not slot and found[path].velocities is not None:
                raise ValueError(f"opt_state must hold one velocity per parameter, got two for {path!r}")
            found[path] = slot if slot.velocities is not None else found.get(path, slot)
    return found


def write(opt_state: Any, slots: Mapping[str, Slot], steps: int | None, gains: tuple[float, ...] | None = None) -> Any:
    """`opt_state` with other velocities, ages and counters.

    Args:
      opt_state: Holds states of `scale_by_momentum`, in float32, as `read_one` wants them.
      slots: One for each path. Without velocities, the parameter starts anew.
      steps: The number of updates made; needed where something counts them.
      gains: What a debiasing state has seen of a constant 1, one per velocity.
    """
    bare = unboxed(opt_state)
    states = _states(bare)
    kept = {path for state in states for path, slot in read(state).items() if slot.velocities is not None}
    for path, slot in slots.items():
        if slot.velocities is not None and path not in kept:
            raise ValueError(f"{path} is masked in opt_state, and its entry has a velocity")
    rest = iter([_written(state, slots, gains) for state in states])
    written = jax.tree.map(lambda x: next(rest) if _is_momentum(x) else x, bare, is_leaf=_is_momentum)
    return reboxed(counted(written, steps), opt_state)


def _written(state: MomentumState, slots: Mapping[str, Slot], gains: tuple[float, ...] | None) -> MomentumState:
    """One state with the velocities of the parameters that it does not mask."""
    if not isinstance(state.velocity, Float32Velocity):
        kept = type(state.velocity).__name__
        raise ValueError(f"opt_state must keep its velocities in float32, got {kept}: convert(...) it afterwards")
    if state.gain is not None and gains is None:
        raise ValueError("opt_state must not debias here: what it divides by is not in the other state")
    values = [
        _mapped(tree, lambda path, x, k=k: _fitted(path, slots[path], k, x))
        for k, tree in enumerate(state.velocity.values)
    ]
    age = state.age
    if age is not None:
        age = _mapped(age, lambda path, x: jnp.full_like(x, slots[path].age or 0))
    gain = state.gain
    if gain is not None and gains is not None:
        gain = tuple(
            _mapped(tree, lambda path, x, g=g: jnp.full_like(x, g if slots[path].velocities is not None else 0))
            for tree, g in zip(gain, gains, strict=True)
        )
    return state._replace(velocity=Float32Velocity(tuple(values)), age=age, gain=gain)


def counted(opt_state: Any, steps: int | None) -> Any:
    """`opt_state` with its counters at `steps`."""

    def count(path: Any, x: Any) -> Any:
        name = getattr(path[-1], "name", None) if path else None
        if name not in _COUNTERS or jnp.ndim(x) or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            return x
        if steps is None:
            raise ValueError(f"steps must be given, since opt_state counts them in {path_name(path)}; got None")
        return jnp.asarray(steps, x.dtype)

    return reboxed(jax.tree_util.tree_map_with_path(count, unboxed(opt_state)), opt_state)


def checked_names(names: Any, ours: Mapping[str, Any], theirs: Any, what: str) -> dict[str, Any]:
    """`names` as a dictionary, if it pairs every path of ours with an entry of theirs, and the reverse."""
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names must be a mapping from paths such as 'dense/kernel' to {what}s, got {_checks.shown(names)}"
        )
    known = _listed(theirs)
    problems = (
        ("lacks the path {} of opt_state", [p for p in ours if p not in names]),
        (f"has the path {{}}, which is not in opt_state ({_listed(ours)})", [p for p in names if p not in ours]),
        (f"lacks the {what} {{}}", [t for t in theirs if t not in names.values()]),
        (f"has the {what} {{}}, which is not there ({known})", [t for t in names.values() if t not in theirs]),
    )
    for problem, found in problems:
        if found:
            raise ValueError(f"names {problem.format(repr(found[0]))}")
    if len(set(names.values())) < len(names):
        raise ValueError(f"names must give each {what} once, got {_checks.shown(dict(names))}")
    return dict(names)


def check_same_paths(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise unless two states have the same parameters."""
    for missing in [p for p in ours if p not in theirs]:
        raise ValueError(f"the other state lacks the entry {missing!r}")
    for extra in [p for p in theirs if p not in ours]:
        raise ValueError(f"the other state has the entry {extra!r}, which is not in opt_state")


def checked_layouts(layouts: Any, ours: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The permutation of axes for each path that has one."""
    if layouts is not None and not isinstance(layouts, Mapping):
        raise TypeError(f"layouts must be a mapping from paths to layouts, got {_checks.shown(layouts)}")
    out = {}
    for path, layout in (layouts or {}).items():
        if path not in ours:
            raise ValueError(f"layouts has the path {path!r}, which is not in opt_state; that has {_listed(ours)}")
        axes = LAYOUTS.get(layout) if isinstance(layout, str) else layout
        if not isinstance(axes, tuple) or sorted(axes, key=str) != list(range(len(axes))):
            named = ", ".join(map(repr, LAYOUTS))
            raise ValueError(
                f"layouts[{path!r}] must be {named} or a permutation such as (1, 0), got {_checks.shown(layout)}"
            )
        out[path] = axes
    return out


def permuted(path: str, entry: Any, array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """`array` with its axes in another order."""
    if axes is None:
        return array
    if array.ndim != len(axes):
        raise ValueError(f"entry {entry!r} for {path!r} must have {len(axes)} axes as its layout, got {array.shape}")
    return array.transpose(axes)


def as_array(entry: Any, value: Any) -> np.ndarray:
    """A NumPy array of a number, an array, or a tensor of PyTorch or Keras, without importing either."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy has no bfloat16 of its own, so PyTorch gives none.
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.complexfloating)):
        raise TypeError(f"entry {entry!r} must be an array of floats, got {array.dtype}")
    return array


def checked_steps(steps: Any) -> int | None:
    """`steps` as an int or None."""
    if steps is not None:
        _checks.integer("steps", steps, 0)
    return None if steps is None else int(steps)


def by_path(tree: Any) -> tuple[list[str], list[Any]]:
    """Paths such as "dense/kernel", and leaves; None and a masked leaf count."""
    pairs = jax.tree_util.tree_leaves_with_path(unboxed(tree), is_leaf=absent)
    return [path_name(path) for path, _ in pairs], [leaf for _, leaf in pairs]


def path_name(path: Any) -> str:
    """The keys of a path, joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _mapped(tree: Any, function: Any) -> Any:
    """`function(path, leaf)` of each leaf that is there."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x if absent(x) else function(path_name(path), x), tree, is_leaf=absent
    )


def _fitted(path: str, slot: Slot, k: int, like: Any) -> jax.Array:
    """Velocity k of a slot in the shape and dtype of `like`; zero for a parameter that starts anew."""
    if slot.velocities is None:
        return jnp.zeros_like(like)
    value = slot.velocities[k]
    if value.shape != like.shape:
        raise ValueError(f"the velocity for {path!r} must have shape {like.shape}, got {value.shape}")
    if jnp.iscomplexobj(value) and not jnp.iscomplexobj(like):
        raise TypeError(f"the velocity for {path!r} must be real as its parameter, got {value.dtype}")
    placed: jax.Array = jax.device_put(jnp.array(value, like.dtype), like.sharding)
    return placed


def _states(opt_state: Any) -> list[MomentumState]:
    return [state for _, state in find_all(unboxed(opt_state), MomentumState)]


def _is_momentum(x: Any) -> bool:
    return isinstance(x, MomentumState)


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names)) or "none"
