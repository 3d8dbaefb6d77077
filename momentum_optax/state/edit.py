"""`reset` and `rescale`: surgery on the velocities in a running optimizer's state."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._tree import leaf_treedef_of, reboxed, to_leaf_states, to_trees, unboxed
from ..storage.protocol import times
from ..transform import MomentumState
from ..wrappers.compress import SECOND_MOMENTS, SIGNED, CompressedState, Kept, field_name, flattened, is_plain, slots_of
from .checkpoint import CheckpointError, check, describe

Select = Callable[[str], Any]


# What a mapping calls the velocities of `scale_by_momentum`, as in `convert`.
_VELOCITY = "velocity"


def reset(opt_state: Any, fresh: Any, select: Select | None = None) -> Any:
    """Begin velocities anew, and with them their ages, gains and steps; what else is in the state goes on.

        state = mo.reset(state, tx.init(params))                                        # every velocity
        state = mo.reset(state, tx.init(params), lambda path: path.startswith("head/"))

    A new state would also begin the counters of learning-rate schedules, of Optax's other transformations and of
    wrappers anew. The states of `scale_by_momentum` and, as wholes, of `compress` are replaced, in any chain, mask,
    wrapper or outer state; the anchor of `outer` stays.

    Args:
      opt_state: The optimizer's state.
      fresh: What `init` of the same optimizer gives.
      select: Which parameters, a function of a path such as "dense/kernel" that returns True or False, or a traced
        bool. Then steps, which all parameters share, go on.

    Returns:
      A state of the structure, shapes and dtypes of `opt_state`.

    Raises:
      ValueError: If `fresh` is not the state of the same optimizer, naming the first field that differs; if there is
        no velocity; if `select` is False for every path.
    """
    _checks.state("opt_state", opt_state)
    old, new = unboxed(opt_state), unboxed(fresh)
    try:
        check(describe(jax.eval_shape(lambda: new)), jax.eval_shape(lambda: old))
    except CheckpointError as problem:
        raise ValueError(f"fresh must be what init of the same optimizer gives: {problem}") from None
    choice = _Choice(select)

    def renew(old: Any, new: Any) -> Any:
        if not isinstance(old, MomentumState | CompressedState):
            return old
        choice.note(old)
        return new if select is None else _renewed(old, new, choice)

    result = jax.tree.map(renew, old, new, is_leaf=_is_ours)
    choice.check_found("a state of scale_by_momentum or compress")
    return reboxed(result, opt_state)


def rescale(opt_state: Any, factor: Any, select: Select | None = None) -> Any:
    r"""Multiply velocities by a number, $v \leftarrow c\,v$: after a change of the loss scale, or of a convention.

        state = mo.rescale(state, 1 / 1024)                            # gradients are no longer multiplied by 1024
        state = mo.rescale(state, {"mu": 0.5, "nu": 0.25})             # Adam's squares go with the square

    A power of two is exact in every storage, within its range: the run goes on as that of the multiplied gradients
    would. Another number is rounded to nearest where velocities are floats; in int8 and int4 it goes into the scales,
    not into the codes, and is off by no more than a few units in the last place of a float32; in uint8 the squares are
    rounded at random once more, without bias. Ages, steps and the gains of debiasing stay.

    Args:
      opt_state: The optimizer's state.
      factor: A number or scalar array, for all velocities of `scale_by_momentum` and all fields that `compress` keeps;
        or a mapping from fields to one each, of which "velocity" means those of `scale_by_momentum`. It may name fields
        of Optax's own states, such as "trace".
      select: Which parameters, a function of a path such as "dense/kernel" that returns True or False.

    Returns:
      A state of the structure, shapes and dtypes of `opt_state`.

    Raises:
      TypeError: If a factor is no number or scalar array.
      ValueError: If there is no such field, or a number is given where `compress` keeps squares, which need their own;
        if a number is neither 0 nor a normal float32, is not finite, or is negative for squares; if `select` is False
        for every path.
    """
    _checks.state("opt_state", opt_state)
    choice, bare = _Choice(select), unboxed(opt_state)
    factors = _factors(bare, factor)
    found: set[str] = set()

    def scaled(path: Any, x: Any) -> Any:
        if isinstance(x, MomentumState) and _VELOCITY in factors:
            found.add(_VELOCITY)
            return choice.note(x._replace(velocity=_rescaled(x.velocity, factors[_VELOCITY], choice)))
        name = field_name(path) or ""
        if isinstance(x, MomentumState) or name not in factors:
            return x
        found.add(name)
        if isinstance(x, Kept):
            return choice.note(_rescaled_field(x, factors[name], choice))
        by = _times(choice, _below_field(path), factors[name])
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ValueError(f"factor must name fields of floats, got {name!r} of {x.dtype}")
        return choice.note(x if by is None else times(x, by))

    pairs, treedef = flattened(bare, _is_kept)
    result = treedef.unflatten([scaled(path, x) for path, x in pairs])
    if set(factors) - found:
        raise ValueError(f"factor must name fields of floats in opt_state, got {_listed(set(factors) - found)}")
    choice.check_found("velocities of scale_by_momentum or compress, or factor name a field of floats,")
    return reboxed(result, opt_state)


class _Choice:
    """Which parameters `select` is true of, and whether there was any."""

    def __init__(self, select: Select | None) -> None:
        self._select = select
        self._paths: dict[str, Any] = {}
        self._states = 0

    def note(self, state: Any) -> Any:
        """Count a state that was found."""
        self._states += 1
        return state

    def of(self, path: Any) -> Any:
        """True, False or a traced bool, for a key path in a tree like the parameters."""
        if self._select is None:
            return True
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in self._paths:
            answer = self._select(name)
            is_known = isinstance(answer, bool | np.bool_)
            if not is_known and jnp.result_type(answer) != jnp.bool_:
                raise TypeError(f"select must return True or False, got {_checks.shown(answer)} for {name!r}")
            self._paths[name] = bool(answer) if is_known else answer
        return self._paths[name]

    def check_found(self, what: str) -> None:
        """Raise if there was nothing to do."""
        if not self._states:
            raise ValueError(f"opt_state must hold {what}, got none")
        if self._select is not None and all(answer is False for answer in self._paths.values()):
            raise ValueError(f"select must be true of a parameter, and is false of all: {_listed(self._paths)}")


def _is_ours(x: Any) -> bool:
    return isinstance(x, MomentumState | CompressedState)


def _is_kept(x: Any) -> bool:
    return isinstance(x, MomentumState | Kept)


def _one(choice: _Choice, path: Any, old: Any, new: Any) -> Any:
    """`new` where the parameter at `path` is chosen, else `old`."""
    chosen = choice.of(path)
    return (new if chosen else old) if isinstance(chosen, bool) else jnp.where(chosen, new, old)


def _pick(choice: _Choice, old: Any, new: Any, depth: int) -> Any:
    """`_one` of each leaf of a tree in which the paths of parameters begin at `depth`."""
    return jax.tree_util.tree_map_with_path(lambda path, a, b: _one(choice, path[depth:], a, b), old, new)


def _renewed(old: Any, new: Any, choice: _Choice) -> Any:
    """One of our states with the chosen parameters' parts of `new`."""
    if isinstance(old, MomentumState):
        # A storage's parts are fields of tuples of trees, gains a tuple of trees.
        return MomentumState(
            _pick(choice, old.velocity, new.velocity, 2),
            old.step,
            _pick(choice, old.age, new.age, 0),
            _pick(choice, old.gain, new.gain, 1),
        )
    fields = [x for x in jax.tree.leaves(old.inner, is_leaf=_is_kept) if isinstance(x, Kept)]
    known = {path for x in fields for path, _ in jax.tree_util.tree_leaves_with_path(x.plain)}

    def renew(path: Any, a: Any, b: Any) -> Any:
        if isinstance(a, Kept):
            return Kept(_pick(choice, a.parts, b.parts, 2), _pick(choice, a.plain, b.plain, 0))
        if isinstance(a, MomentumState):
            return _renewed(a, b, choice)
        # What a field has under the name of a parameter belongs to it; counters belong to all.
        below = _below_field(path)
        return _one(choice, below, a, b) if below in known else a

    return CompressedState(old.step, jax.tree_util.tree_map_with_path(renew, old.inner, new.inner, is_leaf=_is_kept))


def _below_field(path: Any) -> Any:
    """What follows the field of a NamedTuple that `path` passed last."""
    last = max((i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)), default=-1)
    return tuple(path[last + 1 :])


def _times(choice: _Choice, path: Any, factor: Any) -> Any:
    """The factor for a parameter; None if it stays as it is."""
    chosen = choice.of(path)
    if isinstance(chosen, bool):
        return factor if chosen else None
    return jnp.where(chosen, jnp.asarray(factor, jnp.float32), 1)


def _rescaled(parts: Any, factor: Any, choice: _Choice) -> Any:
    """Velocities of trees times a number."""
    layout = leaf_treedef_of(parts)
    if not layout.num_leaves:
        return parts
    pairs, treedef = flattened(parts[0][0], None)
    slots = to_leaf_states(parts, treedef, layout)
    for i, (path, _) in enumerate(pairs):
        by = _times(choice, path, factor)
        slots[i] = slots[i] if by is None else _scaler(parts)(slots[i], by)
    return to_trees(slots, treedef, layout)


def _rescaled_field(kept: Kept, factor: Any, choice: _Choice) -> Kept:
    """A field of `compress` times a number."""
    slots, layout, treedef = slots_of(kept)
    paths = [path for path, _ in flattened(kept.plain, None)[0]]
    for i, (path, slot) in enumerate(zip(paths, slots, strict=True)):
        by = _times(choice, path, factor)
        if by is None:
            continue
        if not is_plain(slot):
            slots[i] = slot._replace(parts=_scaler(slot.parts)(slot.parts, by))
        elif jnp.issubdtype(slot.plain.dtype, jnp.inexact):
            slots[i] = slot._replace(plain=times(slot.plain, by))
    scaled: Kept = to_trees(slots, treedef, layout)
    return scaled


def _scaler(parts: Any) -> Any:
    if not hasattr(type(parts), "rescale"):
        raise TypeError(f"the storage must have parts with rescale, got {type(parts).__name__}, which has none")
    return type(parts).rescale


def _factors(opt_state: Any, factor: Any) -> dict[str, Any]:
    """A factor for each field."""
    names: set[str] = set()
    squares: set[str] = set()
    for path, x in flattened(opt_state, _is_kept)[0]:
        if isinstance(x, MomentumState):
            names.add(_VELOCITY)
        elif isinstance(x, Kept):
            names.add(field_name(path) or "")
    for name in names & SECOND_MOMENTS:
        for path, x in optax.tree.get_all_with_path(opt_state, name):
            if isinstance(x, Kept) and (getattr(path[-1], "tuple_name", ""), name) not in SIGNED:
                squares.add(name)
    if squares and not isinstance(factor, Mapping):
        raise ValueError(
            f"factor must be a mapping with one number for each of {_listed(names)}, since {_listed(squares)} holds "
            f"squares, got {_checks.shown(factor)}"
        )
    factors = dict(factor) if isinstance(factor, Mapping) else dict.fromkeys(sorted(names), factor)
    for name, number in factors.items():
        if not _checks.is_scalar_array(number):
            _checks.number(f"factor for {name!r}", number, "[0, inf)" if name in squares else "(-inf, inf)")
            _check_normal(name, number)
    return factors


def _check_normal(name: str, factor: float) -> None:
    """Raise where float32 would make infinity or zero of the factor: XLA flushes subnormal numbers on some backends."""
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if factor != 0 and not least <= abs(factor) <= most:
        raise ValueError(
            f"factor for {name!r} must be 0 or of a size in [{least:.3g}, {most:.3g}], the range of float32, got "
            f"{factor!r}: multiply in two calls"
        )


def _listed(names: Any) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
