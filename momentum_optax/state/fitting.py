"""A running state in the form of another optimizer's: what both have goes on, what one of them lacks is added or left.

A state is a tree of parts, each the NamedTuple of one transformation. Parts are matched by their class, in order,
wherever they sit: chains, masks and wrappers around them may differ.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..transform import MomentumState
from ..wrappers.compress import CompressedState
from ..wrappers.fields import is_compressed
from .velocity import velocity

# Fields that hold the states of transformations inside. A field with a state of ours in it does too.
_INNER = {"inner", "inner_state", "inner_states", "inner_opt_state", "momentum", "rest"}


# What these note for themselves begins anew where it has another form: counts per leaf, figures of other velocities.
_NOTES = {"GuardedState", "RestartState", "MonitorState"}


_ARRAY = "array"


_STRUCTURE = "like must have the structure of the new state"


Field = Callable[[str, str, Any, Any], Any]


def fitted(state: Any, like: Any, field: Field) -> Any:
    """The parts of `state` in the form of `like`; see `convert` for what is added.

    Args:
      state: A state whose velocities are in their new storage already.
      like: What `init` of the new optimizer gives.
      field: `field(owner, name, old, new)` gives the field `old` of the state of class `owner` in the form of `new`,
        where one of them is compressed.

    Raises:
      ValueError: Naming the part that has no counterpart, or the leaf that has another shape.
    """
    parts: dict[str, list[Any]] = defaultdict(list)
    _collect(state, parts)
    wanted: dict[str, list[Any]] = defaultdict(list)
    _collect(like, wanted)
    if "AccumulatedState" in parts and "AccumulatedState" not in wanted:
        cycles = {id(x.momentum): x for x in parts["AccumulatedState"]}
        momenta = parts["MomentumState"]
        parts["MomentumState"] = [_after_cycles(cycles[id(x)]) if id(x) in cycles else x for x in momenta]
    for name in sorted(parts.keys() | wanted.keys()):
        _check_counts(name, parts[name], wanted[name])
    new = _Fit(parts, field).of(like)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(new)):
        raise ValueError("like must hold arrays, as init gives, where the state lacks something, got ShapeDtypeStruct")
    return new


class _Fit:
    """The parts that are left to be taken, in order."""

    def __init__(self, parts: dict[str, list[Any]], field: Field) -> None:
        self._parts = {name: iter(found) for name, found in parts.items()}
        self._steps = [x.step for x in parts["MomentumState"] if x.step is not None]
        self._field = field

    def of(self, like: Any) -> Any:
        """A state of the form of `like`."""
        old = next(self._parts.get(_name(like), iter(())), None)
        if _name(like) == _ARRAY:
            return cast(old, like, "an array")
        if not _is_part(like):
            children, treedef = _children(like)
            return treedef.unflatten([self.of(child) for child in children])
        if isinstance(like, MomentumState):
            return like if old is None else _momentum(old, like)
        fields = {}
        for name, new in zip(like._fields, like, strict=True):
            mine = None if old is None else getattr(old, name, None)
            if _is_inner(name, new):
                fields[name] = self.of(new)
            else:
                fields[name] = self._own(_name(like), name, mine, new)
        found = type(like)(**fields)
        if old is None and _name(like) == "AccumulatedState":
            return _begin_cycles(found, self._steps[0] if self._steps else found.gradient_step)
        return found

    def _own(self, owner: str, name: str, old: Any, new: Any) -> Any:
        """What a part keeps for itself."""
        if old is None or new is None:
            return new
        if is_compressed(old) or is_compressed(new):
            return self._field(owner, name, old, new)
        if owner in _NOTES and forms(old) != forms(new):
            return new
        return cast(old, new, f"{owner}.{name}")


def _momentum(old: MomentumState, like: MomentumState) -> MomentumState:
    """The velocities of `old`, with what else `like` has."""
    if type(old.velocity) is not type(like.velocity):
        kept, wanted = type(old.velocity).__name__, type(like.velocity).__name__
        raise ValueError(f"storage must be that of like, which keeps velocities as {wanted}, got one for {kept}")
    order, wanted_order = len(old.velocity[0]), len(like.velocity[0])
    if order != wanted_order:
        raise ValueError(
            f"{_STRUCTURE}, with {order} velocities of each leaf, got {wanted_order}: those of another rule have "
            "another meaning, so that it must begin with tx.init(params)"
        )
    if like.gain is not None and old.gain is None:
        raise ValueError(
            "like must not debias a running state without debiasing: its gains depend on the rule and on every step so "
            "far. Go on with debias=False and rule.scale(1 / rule.dc_gain()), to which debiasing tends"
        )
    ages = old.age if old.age is not None or like.age is None else _ages(old, like.age)
    found = {
        "velocity": old.velocity,
        "step": like.step if old.step is None else old.step,
        "age": ages,
        "gain": old.gain,
    }
    pairs = {name: (x, getattr(like, name)) for name, x in found.items()}
    return MomentumState(**{name: None if new is None else cast(x, new, name) for name, (x, new) in pairs.items()})


def _ages(state: MomentumState, like: Any) -> Any:
    """Ages for a state without: a leaf whose velocities are zero has its first step before it, any other behind it."""
    trees = velocity(state)
    if not trees:
        return like
    treedef: Any = jax.tree.structure(trees[0])
    begun = [
        jnp.stack([jnp.any(v != 0) for v in row]).any() for row in zip(*map(treedef.flatten_up_to, trees), strict=True)
    ]
    count = 1 if state.step is None else jnp.maximum(state.step, 1)
    places = treedef.flatten_up_to(like)
    ages = [jnp.where(some, count, 0).astype(x.dtype).reshape(x.shape) for some, x in zip(begun, places, strict=True)]
    return treedef.unflatten(ages)


def _begin_cycles(state: Any, steps: Any) -> Any:
    """A state of `accumulated` that goes on, at the beginning of a cycle, from one that took so many steps."""
    # Even ages: no leaf holds gradients of a cycle that has not finished.
    age = jax.tree.map(lambda x: 2 * x, state.momentum.age)
    return state._replace(gradient_step=jnp.asarray(steps, jnp.int32), momentum=state.momentum._replace(age=age))


def _after_cycles(state: Any) -> MomentumState:
    """The momentum of a state of `accumulated` for an optimizer that takes each gradient for a step."""
    if not isinstance(state.mini_step, jax.core.Tracer | jax.ShapeDtypeStruct) and int(state.mini_step):
        raise ValueError(
            f"opt_state must be at the end of a cycle of micro-batches, got {int(state.mini_step)} of them"
        )
    momentum: MomentumState = state.momentum
    return momentum._replace(step=state.gradient_step, age=jax.tree.map(lambda x: x >> 1, momentum.age))


def _collect(node: Any, parts: dict[str, list[Any]]) -> None:
    """The parts in a state by the names of their classes, outer ones first; an array among them is one too."""
    name = _name(node)
    if name:
        parts[name].append(node)
    if not _is_part(node):
        for child in _children(node)[0]:
            _collect(child, parts)
    elif not isinstance(node, MomentumState):
        for field, value in zip(node._fields, node, strict=True):
            if _is_inner(field, value):
                _collect(value, parts)


def _name(node: Any) -> str:
    """What a part is matched by; "" for containers and for parts that hold nothing."""
    if _is_part(node):
        return type(node).__name__ if node._fields else ""
    return _ARRAY if jax.tree_util.all_leaves([node]) else ""


def _check_counts(name: str, old: list[Any], new: list[Any]) -> None:
    """Raise unless each part has a counterpart, or is one that can be added and left out."""
    if len(old) == len(new):
        return
    one_sided = not old or not new
    if one_sided and name != _ARRAY and all(isinstance(x, MomentumState) or _is_light(x) for x in (*old, *new)):
        return
    raise ValueError(f"{_STRUCTURE}, which has {len(old)} {name}, got {len(new)}")


def _is_light(part: Any) -> bool:
    """Whether a part holds nothing of its own but counts, notes, and what belongs to a state inside."""
    if type(part).__name__ in _NOTES:
        return True
    own = [value for name, value in zip(part._fields, part, strict=True) if not _is_inner(name, value)]
    return all(jnp.ndim(x) == 0 for x in jax.tree.leaves(own))


def _is_part(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_inner(name: str, value: Any) -> bool:
    if is_compressed(value):
        return False

    def is_ours(x: Any) -> bool:
        return isinstance(x, MomentumState | CompressedState)

    named = name in _INNER and not jax.tree_util.all_leaves([value])
    return named or any(map(is_ours, jax.tree.leaves(value, is_leaf=is_ours)))


def _children(node: Any) -> tuple[list[Any], Any]:
    """The nodes right below; none below a leaf."""
    treedef: Any
    children, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    return ([], treedef) if jax.tree_util.treedef_is_leaf(treedef) else (children, treedef)


def forms(tree: Any) -> Any:
    """Structure, shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(x), jnp.result_type(x)) for x in leaves]


def cast(old: Any, like: Any, where: str) -> Any:
    """`old` in the dtypes of `like`, whose structure and shapes it must have."""
    treedef: Any
    structure: Any
    pairs, treedef = jax.tree_util.tree_flatten_with_path(old)
    target, structure = jax.tree.flatten(like)
    if treedef != structure:
        raise ValueError(f"{_STRUCTURE} in {where}, which has {treedef.num_leaves} leaves, got {structure.num_leaves}")
    for (path, x), y in zip(pairs, target, strict=True):
        if jnp.shape(x) != jnp.shape(y):
            place = where + jax.tree_util.keystr(path)
            raise ValueError(
                f"like must have the shapes of the new state, {jnp.shape(x)} at {place}, got {jnp.shape(y)}"
            )
    # What comes from `like` may be a `ShapeDtypeStruct`.
    return treedef.unflatten(
        [x if x is y else jnp.asarray(x, y.dtype) for (_, x), y in zip(pairs, target, strict=True)]
    )
