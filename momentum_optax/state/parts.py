"""The parts of a state: the NamedTuples of its transformations, wherever they sit in it."""

from collections import defaultdict

import jax
import jax.numpy as jnp

from .._checks import is_named_tuple
from .._tree import children
from .._typing import PyTree
from ..transform import MomentumState
from ..wrappers.fields import is_compressed
from .casting import STRUCTURE
from .stored import is_momentum_or_compressed

# Fields that hold the states of transformations inside. A field with a state of ours in it does too.
_INNER = {"inner", "inner_state", "inner_states", "inner_opt_state", "momentum", "rest"}


# Wrappers whose counts and figures restart where these have another form.
RESTARTING = {"GuardedState", "RestartState", "MonitorState"}


# The name of an array that is in no part.
ARRAY = "array"


def parts_of(state: PyTree) -> defaultdict[str, list[PyTree]]:
    """The parts of a state by the names of their classes, outer ones first; arrays among them are parts too."""
    parts: defaultdict[str, list[PyTree]] = defaultdict(list)
    _collect(state, parts)
    return parts


def part_name(node: PyTree) -> str:
    """The name that a part is matched by; "" for containers and for parts without fields."""
    if is_named_tuple(node):
        return type(node).__name__ if node._fields else ""
    return ARRAY if jax.tree_util.all_leaves([node]) else ""


def is_inner(name: str, value: PyTree) -> bool:
    """Whether a field of a part holds other parts."""
    if is_compressed(value):
        return False
    named = name in _INNER and not jax.tree_util.all_leaves([value])
    leaves = jax.tree.leaves(value, is_leaf=is_momentum_or_compressed)
    return named or any(map(is_momentum_or_compressed, leaves))


def check_counts(parts: defaultdict[str, list[PyTree]], wanted: defaultdict[str, list[PyTree]]) -> None:
    """Raise unless each part has a counterpart, or is one that can be added or left out."""
    for name in sorted(parts.keys() | wanted.keys()):
        old, new = parts[name], wanted[name]
        if len(old) == len(new):
            continue
        one_sided = not old or not new
        if one_sided and name != ARRAY and all(isinstance(x, MomentumState) or _is_light(x) for x in (*old, *new)):
            continue
        raise ValueError(f"{STRUCTURE}, which has {len(old)} {name}, got {len(new)}")


def _is_light(part: PyTree) -> bool:
    """Whether a part holds nothing but counts, figures that may restart, and other parts."""
    if type(part).__name__ in RESTARTING:
        return True
    own = [value for name, value in zip(part._fields, part, strict=True) if not is_inner(name, value)]
    return all(jnp.ndim(x) == 0 for x in jax.tree.leaves(own))


def _collect(node: PyTree, parts: dict[str, list[PyTree]]) -> None:
    name = part_name(node)
    if name:
        parts[name].append(node)
    if not is_named_tuple(node):
        for _, child in children(node):
            _collect(child, parts)
    elif not isinstance(node, MomentumState):
        for field, value in zip(node._fields, node, strict=True):
            if is_inner(field, value):
                _collect(value, parts)
