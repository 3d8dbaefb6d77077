"""Stored velocities and fields times a number, in whatever storage; and the factors that are allowed."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._tree import flatten_with_path, to_leaf_states, to_trees
from .._typing import Number, PyTree
from ..storage.mixed import codes_of, form_of, stored_velocity
from ..storage.protocol import times
from ..wrappers.fields import CompressedField, is_uncompressed, leaf_states
from ..wrappers.selection import SECOND_MOMENTS
from .selection import Selection, listed
from .stored import holds_squares, is_momentum_or_field, name_of, owner_of


def rescaled_velocity(velocity: PyTree, factor: Number, selection: Selection) -> PyTree:
    """The stored velocities of a `MomentumState` times a number."""
    codes = codes_of(velocity)
    if not codes:
        return velocity
    layout = jax.tree.structure(form_of(velocity))
    pairs, treedef = flatten_with_path(codes[0], None)
    slots = to_leaf_states(velocity, treedef, layout)
    for i, (path, _) in enumerate(pairs):
        by = selection.factor(path, factor)
        slots[i] = slots[i] if by is None else _rescale_of(slots[i])(slots[i], by)
    return to_trees(slots, treedef, layout)


def rescaled_field(field: CompressedField, factor: Number, selection: Selection) -> PyTree:
    """A field of `compress` times a number."""
    slots, layout, treedef = leaf_states(field)
    paths = [path for path, _ in flatten_with_path(field.plain, None)[0]]
    for i, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        by = selection.factor(path, factor)
        if by is None:
            continue
        if not is_uncompressed(slot):
            slots[i] = slot._replace(parts=_rescale_of(slot.parts)(slot.parts, by))
        elif jnp.issubdtype(slot.plain.dtype, jnp.inexact):
            slots[i] = slot._replace(plain=times(slot.plain, by))
    return to_trees(slots, treedef, layout)


def factors_of(opt_state: PyTree, factor: "Number | Mapping[str, Number]") -> dict[str, Number]:
    """The factor of each field, checked."""
    pairs, _ = flatten_with_path(opt_state, is_momentum_or_field)
    names = {name_of(path, x) for path, x in pairs if is_momentum_or_field(x)}
    squares = {name for name in names & SECOND_MOMENTS if _is_squares(opt_state, name)}
    if squares and not isinstance(factor, Mapping):
        raise ValueError(
            f"factor must be a mapping with one number for each of {listed(names)}, since {listed(squares)} holds "
            f"squares, got {_checks.shown(factor)}"
        )
    factors = dict(factor) if isinstance(factor, Mapping) else dict.fromkeys(sorted(names), factor)
    for name, number in factors.items():
        if not _checks.is_scalar_array(number):
            _checks.number(f"factor for {name!r}", number, "[0, inf)" if name in squares else "(-inf, inf)")
            _check_normal(name, float(number))
    return factors


def _is_squares(opt_state: PyTree, name: str) -> bool:
    """Whether a compressed field of this name holds squares."""
    return any(
        isinstance(x, CompressedField) and holds_squares(owner_of(path), name, SECOND_MOMENTS)
        for path, x in optax.tree.get_all_with_path(opt_state, name)
    )


def _check_normal(name: str, factor: float) -> None:
    """Raise where float32 would make infinity or zero of the factor: XLA flushes subnormal numbers on some backends."""
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if factor != 0 and not least <= abs(factor) <= most:
        raise ValueError(
            f"factor for {name!r} must be 0 or of a size in [{least:.3g}, {most:.3g}], the range of float32, got "
            f"{factor!r}: multiply in two calls"
        )


def _rescale_of(parts: PyTree) -> Callable[[PyTree, Number], PyTree]:
    stored = stored_velocity(parts)
    if not hasattr(type(stored), "rescale"):
        raise TypeError(f"the storage must have parts with rescale, got {type(stored).__name__}, which has none")
    rescale: Callable[[PyTree, Number], PyTree] = type(parts).rescale
    return rescale
