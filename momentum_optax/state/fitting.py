"""A running state in the form of another optimizer's: common parts are kept, the others are added or left out.

Parts are the NamedTuples of transformations. They are matched by their class, in order, wherever they sit: chains,
masks and wrappers around them may differ.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from .._checks import is_named_tuple
from .._tree import map_children
from .._typing import Count, Leaf, PyTree
from ..storage.mixed import class_names, order_of
from ..transform import MomentumState
from ..wrappers.accumulated import ages_between_cycles, momentum_between_cycles
from ..wrappers.fields import is_compressed
from .casting import STRUCTURE, cast, forms
from .parts import ARRAY, RESTARTING, check_counts, is_inner, part_name, parts_of
from .velocity import velocity

# `field(owner, name, old, new)` gives the field `old` of the state of class `owner` in the form of `new`.
Field: TypeAlias = Callable[[str, str, PyTree, PyTree], PyTree]


def fitted(state: PyTree, like: PyTree, field: Field) -> PyTree:
    """The parts of `state` in the form of `like`; see `convert` for what is added.

    Args:
      state: A state whose velocities are in their new storage already.
      like: The state that `init` of the new optimizer returns.
      field: For fields of which the old or the new one is compressed.

    Raises:
      ValueError: Naming the part that has no counterpart, or the leaf that has another shape.
    """
    parts, wanted = parts_of(state), parts_of(like)
    if "AccumulatedState" in parts and "AccumulatedState" not in wanted:
        cycles = {id(x.momentum): x for x in parts["AccumulatedState"]}
        momenta = parts["MomentumState"]
        parts["MomentumState"] = [momentum_between_cycles(cycles[id(x)]) if id(x) in cycles else x for x in momenta]
    check_counts(parts, wanted)
    new = _Fit(parts, field).of(like)
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(new)):
        raise ValueError("like must hold arrays, as init gives, where the state lacks something, got ShapeDtypeStruct")
    return new


class _Fit:
    """The parts that have not been used yet, in order."""

    def __init__(self, parts: dict[str, list[PyTree]], field: Field) -> None:
        self._parts = {name: iter(found) for name, found in parts.items()}
        self._steps = [x.step for x in parts["MomentumState"] if x.step is not None]
        self._field = field

    def of(self, like: PyTree) -> PyTree:
        """A state of the form of `like`."""
        name = part_name(like)
        old = next(self._parts.get(name, iter(())), None)
        if name == ARRAY:
            return cast(old, like, "an array")
        if not is_named_tuple(like):
            return map_children(lambda _, child: self.of(child), like)
        if isinstance(like, MomentumState):
            return like if old is None else _momentum(old, like)
        pairs = zip(like._fields, like, strict=True)
        found = type(like)(*(self._field_of(name, old, field, new) for field, new in pairs))
        if old is None and name == "AccumulatedState":
            return _begin_cycles(found, self._steps[0] if self._steps else found.gradient_step)
        return found

    def _field_of(self, owner: str, old: PyTree, name: str, new: PyTree) -> PyTree:
        """One field of the part `old` of class `owner` in the form of `new`."""
        if is_inner(name, new):
            return self.of(new)
        return self._own(owner, name, None if old is None else getattr(old, name, None), new)

    def _own(self, owner: str, name: str, old: PyTree, new: PyTree) -> PyTree:
        """A field that holds no other parts."""
        if old is None or new is None:
            return new
        if is_compressed(old) or is_compressed(new):
            return self._field(owner, name, old, new)
        if owner in RESTARTING and forms(old) != forms(new):
            return new
        if owner == "AverageState" and name == "codes" and forms(old) != forms(new):
            raise ValueError(
                "like must keep averages of weights in the same storage and for the same weights: without the weights "
                "their codes cannot be read. Give average_params its old storage, or begin a new average with start="
            )
        return cast(old, new, f"{owner}.{name}")


def _momentum(old: MomentumState, like: MomentumState) -> MomentumState:
    """The velocities of `old`, with step, ages, gains and look-ahead as `like` has them."""
    names, wanted_names = class_names(old.velocity), class_names(like.velocity)
    if names != wanted_names:
        stored, wanted = " and ".join(names), " and ".join(wanted_names)
        raise ValueError(f"storage must be that of like, which keeps velocities as {wanted}, got one for {stored}")
    order, wanted_order = order_of(old.velocity), order_of(like.velocity)
    if order != wanted_order:
        raise ValueError(
            f"{STRUCTURE}, with {order} velocities of each leaf, got {wanted_order}: those of another rule have "
            "another meaning, so it must begin with tx.init(params)"
        )
    if like.gain is not None and old.gain is None:
        raise ValueError(
            "like must not debias a running state without debiasing: its gains depend on the rule and on every step so "
            "far. Continue with debias=False and rule.scale(1 / rule.dc_gain()), to which debiasing tends"
        )
    ages = old.age if old.age is not None or like.age is None else _ages(old, like.age)
    found = {
        "velocity": old.velocity,
        "step": like.step if old.step is None else old.step,
        "age": ages,
        "gain": old.gain,
        "lookahead": _lookahead(old, like),
    }
    pairs = {name: (x, getattr(like, name)) for name, x in found.items()}
    return MomentumState(**{name: None if new is None else cast(x, new, name) for name, (x, new) in pairs.items()})


def _lookahead(old: MomentumState, like: MomentumState) -> PyTree:
    """The old one: the rule that made the last step says where the point to evaluate is. Without one it is stored."""
    if old.lookahead is not None or like.lookahead is None:
        return old.lookahead
    return tuple(jnp.zeros(x.shape, x.dtype) for x in like.lookahead)


def _ages(state: MomentumState, like: PyTree) -> PyTree:
    """Ages for a state that has none: 0 for a leaf whose velocities are zero, else the number of steps, at least 1."""
    trees = velocity(state)
    if not trees:
        return like
    count = 1 if state.step is None else jnp.maximum(state.step, 1)

    def age(x: Leaf, *velocities: jax.Array) -> jax.Array:
        begun = jnp.stack([jnp.any(v != 0) for v in velocities]).any()
        return jnp.where(begun, count, 0).astype(x.dtype).reshape(x.shape)

    return jax.tree.map(age, like, *trees)


def _begin_cycles(state: PyTree, steps: Count) -> PyTree:
    """A state of `accumulated` at the beginning of a cycle, after a number of steps."""
    age = ages_between_cycles(state.momentum.age)
    return state._replace(gradient_step=jnp.asarray(steps, jnp.int32), momentum=state.momentum._replace(age=age))
