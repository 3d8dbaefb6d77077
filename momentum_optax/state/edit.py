"""`reset` and `rescale`: change the velocities in a running optimizer's state."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import reboxed, unboxed
from .._typing import KeyPath, Number, PyTree
from ..storage.mixed import depth_of
from ..storage.protocol import times
from ..transform import MomentumState
from ..wrappers.compress import CompressedState
from ..wrappers.fields import CompressedField
from .checkpoint import CheckpointError, check, describe
from .rescaling import factors_of, rescaled_field, rescaled_velocity
from .selection import Select, Selection, listed
from .stored import VELOCITY, FieldPath, is_momentum_or_compressed, is_momentum_or_field, map_with_fields


def reset(opt_state: optax.OptState, fresh: optax.OptState, select: "Select | None" = None) -> optax.OptState:
    """Restart velocities, with their ages, gains and steps; everything else in the state stays.

        state = mo.reset(state, tx.init(params))                                        # every velocity
        state = mo.reset(state, tx.init(params), lambda path: path.startswith("head/"))

    A new state would also restart the counters of learning-rate schedules, of Optax's other transformations and of
    wrappers. The states of `scale_by_momentum` and, as a whole, of `compress` are replaced, in any chain, mask, wrapper
    or outer state; the anchor of `outer` stays.

    Args:
      opt_state: The optimizer's state.
      fresh: The state that `init` of the same optimizer returns.
      select: Which parameters, a function of a path such as "dense/kernel" that returns True or False, or a traced
        bool. Then steps, which all parameters share, stay.

    Returns:
      A state of the structure, shapes and dtypes of `opt_state`.

    Raises:
      ValueError: If `fresh` is not the state of the same optimizer, naming the first field that differs; if there are
        no velocities; if `select` is False for every path.
    """
    _checks.state("opt_state", opt_state)
    _checks.state("fresh", fresh)
    old, new = unboxed(opt_state), unboxed(fresh)
    try:
        check(describe(jax.eval_shape(lambda: new)), jax.eval_shape(lambda: old))
    except CheckpointError as problem:
        raise ValueError(f"fresh must be what init of the same optimizer gives: {problem}") from None
    selection = Selection(select)

    def renew(old: PyTree, new: PyTree) -> PyTree:
        if not is_momentum_or_compressed(old):
            return old
        selection.count()
        return new if select is None else _renewed(old, new, selection)

    result = jax.tree.map(renew, old, new, is_leaf=is_momentum_or_compressed)
    selection.check_found("a state of scale_by_momentum or compress")
    return reboxed(result, opt_state)


def rescale(
    opt_state: optax.OptState, factor: "Number | Mapping[str, Number]", select: "Select | None" = None
) -> optax.OptState:
    r"""Multiply velocities by a number, $v \leftarrow c\,v$: after a change of the loss scale, or of a convention.

        state = mo.rescale(state, 1 / 1024)                            # gradients are no longer multiplied by 1024
        state = mo.rescale(state, {"mu": 0.5, "nu": 0.25})             # Adam's squares go with the square

    A power of two is exact in every storage, within its range: the run continues as if all gradients had been
    multiplied. Another number is rounded to nearest where velocities are floats; in int8 and int4 it goes into the
    scales, not into the codes, with an error of a few units in the last place of a float32; in uint8 the squares are
    rounded stochastically once more, without bias. Ages, steps and the gains of debiasing stay.

    Args:
      opt_state: The optimizer's state.
      factor: A number or scalar array, for all velocities of `scale_by_momentum` and all fields of `compress`;
        or a mapping from fields to one each, where "velocity" means those of `scale_by_momentum`. It may name fields
        of Optax's own states, such as "trace".
      select: Which parameters, a function of a path such as "dense/kernel" that returns True or False.

    Returns:
      A state of the structure, shapes and dtypes of `opt_state`.

    Raises:
      TypeError: If a factor is not a number or a scalar array.
      ValueError: If there is no such field, or a single number is given where `compress` keeps squares; if a number is
        neither 0 nor a normal float32, is not finite, or is negative for squares; if `select` is False for every path.
    """
    _checks.state("opt_state", opt_state)
    selection, bare = Selection(select), unboxed(opt_state)
    factors = factors_of(bare, factor)
    missing = set(factors)

    def scale(path: FieldPath, x: PyTree) -> PyTree:
        name, below = (VELOCITY, ()) if isinstance(x, MomentumState) else path.last_field()
        missing.discard(name)
        return _rescaled(name, below, x, factors[name], selection) if name in factors else x

    result = map_with_fields(scale, bare, is_momentum_or_field)
    if missing:
        raise ValueError(f"factor must name fields of floats in opt_state, got {listed(missing)}")
    selection.check_found("velocities of scale_by_momentum or compress, or factor name a field of floats,")
    return reboxed(result, opt_state)


def _rescaled(name: str, below: KeyPath, x: PyTree, factor: Number, selection: Selection) -> PyTree:
    """A state of `scale_by_momentum`, the field `name` of `compress`, or a leaf `below` another one, times `factor`."""
    selection.count()
    if isinstance(x, MomentumState):
        return x._replace(velocity=rescaled_velocity(x.velocity, factor, selection))
    if isinstance(x, CompressedField):
        return rescaled_field(x, factor, selection)
    by = selection.factor(below, factor)
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"factor must name fields of floats, got {name!r} of {x.dtype}")
    return x if by is None else times(x, by)


def _renewed(old: PyTree, new: PyTree, selection: Selection) -> PyTree:
    """The state of `scale_by_momentum` or `compress` with the selected parameters' parts of `new`."""
    if isinstance(old, MomentumState):
        # Gains are a tuple of trees.
        return MomentumState(
            selection.pick_leaves(old.velocity, new.velocity, depth_of(old.velocity)),
            old.step,
            selection.pick_leaves(old.age, new.age, 0),
            selection.pick_leaves(old.gain, new.gain, 1),
            old.lookahead,
        )
    fields = [x for x in jax.tree.leaves(old.inner, is_leaf=is_momentum_or_field) if isinstance(x, CompressedField)]
    parameters = {path for x in fields for path, _ in jax.tree_util.tree_leaves_with_path(x.plain)}

    def renew(path: FieldPath, a: PyTree) -> PyTree:
        b = next(fresh)
        if isinstance(a, CompressedField):
            parts = selection.pick_leaves(a.parts, b.parts, depth_of(a.parts))
            return CompressedField(parts, selection.pick_leaves(a.plain, b.plain, 0))
        if isinstance(a, MomentumState):
            return _renewed(a, b, selection)
        # What a field has under the name of a parameter belongs to it; counters belong to all.
        below = next((below for below in path.below_fields() if below in parameters), None)
        return a if below is None else selection.pick(below, a, b)

    fresh = iter(jax.tree.leaves(new.inner, is_leaf=is_momentum_or_field))
    return CompressedState(old.step, map_with_fields(renew, old.inner, is_momentum_or_field))
