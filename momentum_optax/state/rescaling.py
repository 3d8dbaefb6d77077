"""Stored velocities and fields times a number, in whatever storage; and the factors that are allowed."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._tree import Place, find_all, map_states
from .._typing import Number, PyTree
from ..storage.mixed import leaf_treedef_of, stored_velocity
from ..storage.protocol import times
from ..transform import MomentumState
from ..wrappers.fields import CompressedField, is_uncompressed, map_field
from ..wrappers.selection import SECOND_MOMENTS
from .selection import Selection, listed
from .stored import holds_squares, name_of, owner_of


def rescaled_velocity(velocity: PyTree, factor: Number, selection: Selection) -> PyTree:
    """The stored velocities of a `MomentumState` times a number."""

    def scaled(place: Place, parts: PyTree) -> PyTree:
        by = selection.factor(place[0], factor)
        return parts if by is None else _rescale_of(parts)(parts, by)

    return map_states(scaled, velocity, leaf_treedef_of(velocity))


def rescaled_field(field: CompressedField, factor: Number, selection: Selection) -> PyTree:
    """A field of `compress` times a number."""

    def scaled(place: Place, leaf: CompressedField) -> CompressedField:
        by = selection.factor(place[0], factor)
        if by is None:
            return leaf
        if not is_uncompressed(leaf):
            return leaf._replace(parts=_rescale_of(leaf.parts)(leaf.parts, by))
        return leaf._replace(plain=times(leaf.plain, by)) if jnp.issubdtype(leaf.plain.dtype, jnp.inexact) else leaf

    return map_field(scaled, field)


def factors_of(opt_state: PyTree, factor: "Number | Mapping[str, Number]") -> dict[str, Number]:
    """The factor of each field, checked."""
    names = {name_of(path, x) for path, x in find_all(opt_state, MomentumState, CompressedField)}
    squares = {name for name in names & SECOND_MOMENTS if _is_squares(opt_state, name)}
    if squares and not isinstance(factor, Mapping):
        raise ValueError(
            f"factor must be a mapping with one number for each of {listed(names)}, since {listed(squares)} holds "
            f"squares, got {_checks.shown(factor)}"
        )
    factors = dict(factor) if isinstance(factor, Mapping) else dict.fromkeys(sorted(names), factor)
    for name, number in factors.items():
        if not isinstance(name, str):
            raise TypeError(f"factor must have names of fields as keys, got {_checks.shown(name)}")
        _checks.constant(f"factor for {name!r}", number, "[0, inf)" if name in squares else "(-inf, inf)")
        if _checks.is_number(number):
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
