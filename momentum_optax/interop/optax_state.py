"""Live velocities to and from the states of Optax's own transformations."""

__all__ = ["from_optax", "to_optax"]

from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._paths import slash_path
from .._tree import absent, children, find_all, reboxed, unboxed
from .._typing import KeyPath, PyTree, TreeDef
from ..filters import Filter
from ..state.mismatch import OPTAX_VELOCITIES, is_optax_velocity
from ..wrappers.fields import CompressedField, is_compressed
from .entries import as_array, check_same_paths, checked_steps, listed
from .velocities import ParameterVelocity, by_path, debiases, has_velocity, read_one, steps_counted, write

VelocityState: TypeAlias = (
    optax.TraceState | optax.EmaState | optax.ScaleByLionState | optax.ScaleByAdamState | optax.contrib.MuonState
)


def from_optax(
    opt_state: optax.OptState, optax_state: optax.OptState, *, rule: Filter | None = None, steps: int | None = None
) -> optax.OptState:
    """The velocity of Optax's `trace`, `ema`, `scale_by_lion`, `adam` or `muon` put into the state of our optimizer.

    In the basis of `heavy_ball` (also `sgd` and `torch_sgd`, without dampening) for `TraceState.trace`, of `lion_mix`
    for `ScaleByLionState.mu`, and of `ema` for `EmaState.ema`, `ScaleByAdamState.mu` and `MuonState.mu`.

        ours = mo.muon(rate, mo.nadam_mix(0.95, psi=1e6))                      # the steps of optax.contrib.muon(rate)
        state = mo.interop.from_optax(ours.init(params), state)

    Optax's states that `opt_state` holds too are copied unchanged, such as that of Adam in `muon`. Groups of
    `optax.partition` may differ between the two: each parameter has one velocity in either.

    `compress` keeps the states of Optax themselves: `mo.convert(optax_state, storages, like=opt_state)` is the way.
    States of schedule-free optimizers hold another point in place of a velocity, and cannot be taken. Of
    `optax.lookahead` the velocity is taken, and its slow weights are not.

    Args:
      opt_state: The result of our optimizer's `init`, with velocities in float32.
      optax_state: Any state with one velocity for each parameter that has one in `opt_state`, masked elsewhere.
      rule: The rule of `opt_state`; needed only where it debiases.
      steps: The number of updates made, if `optax_state` does not count them and something here does.

    Returns:
      A state like `opt_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if there is no state with a
        velocity, or several for one parameter; if `steps` or `rule` is needed, or `steps` is not the count.
      TypeError: If an argument or entry is of the wrong type.

    Reference:
      Optax 0.2.8, `optax/transforms/_accumulation.py`, `optax/_src/transform.py` and `optax/contrib/_muon.py`.
    """
    _checks.state("opt_state", opt_state)
    _checks.state("optax_state", optax_state)
    if rule is not None and not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as ema(0.9) or None, got {_checks.shown(rule)}")
    ours = _our_velocities(opt_state)
    sources, shared = _split(optax_state, opt_state)
    there = _their_velocities(sources, optax_state)
    check_same_paths(ours, there)
    count = _count_of(sources, checked_steps(steps))
    unit_response = None
    if debiases(opt_state):
        if rule is None or count is None:
            raise ValueError(
                f"rule and the number of steps must be given, since opt_state debiases; got {_checks.shown(rule)}"
            )
        unit_response = _unit_response(rule, count)
    age = 1 if count is None else count
    velocities = {
        path: ParameterVelocity(None, 0) if absent(x) else ParameterVelocity((as_array(path, x),), age)
        for path, x in there.items()
    }
    return write(_with_states(opt_state, shared), velocities, count, unit_response)


def to_optax(opt_state: optax.OptState, optax_state: optax.OptState, *, steps: int | None = None) -> optax.OptState:
    """The inverse of `from_optax`: `optax_state` with our velocity in place of Optax's, in its dtypes.

    Optax's states that both hold, such as that of Adam in `muon`, are taken over; everything else in it, such as Adam's
    second moment beside our velocity, stays.

    Args:
      opt_state: Of our optimizer, velocities in any storage, in the basis that `from_optax` says.
      optax_state: The result of the Optax optimizer's `init`, with one velocity for each parameter that has one here.
      steps: The number of updates made; needed if that state counts them and ours does not.

    Returns:
      A state like `optax_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if there is no state with a
        velocity, or several for one parameter; if `steps` is needed, or is not what our state has counted.
      TypeError: If an argument is of the wrong type.

    Reference:
      As for `from_optax`.
    """
    _checks.state("opt_state", opt_state)
    _checks.state("optax_state", optax_state)
    ours, known = _our_velocities(opt_state), steps_counted(opt_state)
    targets, _ = _split(optax_state, opt_state)
    check_same_paths(ours, _their_velocities(targets, optax_state))

    def put(path: KeyPath, old: PyTree) -> PyTree:
        velocities = ours[slash_path(path)].velocities
        if velocities is None or not hasattr(old, "shape"):
            return old
        if velocities[0].shape != old.shape:
            raise ValueError(
                f"the velocity for {slash_path(path)!r} must have shape {old.shape}, got {velocities[0].shape}"
            )
        return jnp.array(velocities[0], old.dtype)

    def filled(target: VelocityState) -> VelocityState:
        field = OPTAX_VELOCITIES[type(target)]
        new = target._replace(**{field: jax.tree_util.tree_map_with_path(put, getattr(target, field))})
        if isinstance(new, optax.TraceState):
            return new
        return new._replace(count=jnp.asarray(_steps_made(steps, known), jnp.int32))

    _, shared = _split(opt_state, optax_state)
    return _with_states(optax_state, [*map(filled, targets), *shared])


def _our_velocities(opt_state: optax.OptState) -> dict[str, ParameterVelocity]:
    """The velocity of each parameter of our optimizer."""
    if not has_velocity(opt_state) and find_all(opt_state, CompressedField):
        raise ValueError(
            "opt_state must hold a state of scale_by_momentum, got one of compress alone: "
            "mo.convert(optax_state, storages, like=opt_state) is the way there"
        )
    return read_one(opt_state)


def _split(state: optax.OptState, other: optax.OptState) -> tuple[list[VelocityState], list[VelocityState]]:
    """The states of Optax's with a velocity in `state`: those that are not in `other` too, and those that are."""
    found, there = (_velocity_states(tree) for tree in (state, other))
    here, counts = (Counter(map(type, each)) for each in (found, there))
    apart = [x for x in found if here[type(x)] != counts[type(x)]]
    return apart, [x for x in found if here[type(x)] == counts[type(x)]]


def _velocity_states(state: optax.OptState) -> list[VelocityState]:
    """The states of Optax's with a velocity in a state."""
    return [x for x in jax.tree.leaves(unboxed(state), is_leaf=is_optax_velocity) if is_optax_velocity(x)]


def _with_states(state: optax.OptState, new: Iterable[VelocityState]) -> optax.OptState:
    """`state` with others in place of its states of these classes, class by class in their order."""
    rest = {kind: iter([x for x in new if type(x) is kind]) for kind in OPTAX_VELOCITIES}

    def put(old: PyTree) -> PyTree:
        found = next(rest[type(old)], None) if is_optax_velocity(old) else None
        if found is None:
            return old
        new_form: TreeDef = jax.tree.structure(found)
        if new_form != jax.tree.structure(old):
            raise ValueError(
                f"optax_state and opt_state must have {type(old).__name__} for the same parameters, got "
                f"{len(jax.tree.leaves(found))} and {len(jax.tree.leaves(old))} arrays in it"
            )
        return jax.tree.map(lambda x, y: jnp.array(x, y.dtype), found, old)

    return reboxed(jax.tree.map(put, unboxed(state), is_leaf=is_optax_velocity), state)


def _their_velocities(states: Iterable[VelocityState], optax_state: optax.OptState) -> dict[str, PyTree]:
    """The velocity of each parameter by its path; a masked one where it has none."""
    merged: dict[str, PyTree] = {}
    for state in states:
        tree = getattr(state, OPTAX_VELOCITIES[type(state)])
        if is_compressed(tree):
            raise ValueError(
                "optax_state must keep its velocity in full, got one of compress: mo.convert(optax_state, 'float32', "
                "like=tx.init(params)) gives the state of the optimizer without it"
            )
        for path, new in by_path(tree).items():
            old = merged.get(path)
            if not absent(old) and not absent(new):
                raise ValueError(f"optax_state must hold one velocity per parameter, got two for {path!r}")
            merged[path] = new if absent(old) else old
    if not merged:
        kinds = ", ".join(kind.__name__ for kind in OPTAX_VELOCITIES)
        there = listed(sorted(_class_names(optax_state))[:6])
        raise ValueError(f"optax_state must hold a state with a velocity, {kinds}, got {there}")
    return merged


def _class_names(node: PyTree) -> set[str]:
    """The names of the NamedTuples with fields in a state."""
    own = {type(node).__name__} if _checks.is_named_tuple(node) and node._fields else set()
    return own.union(*(_class_names(child) for _, child in children(node)))


def _count_of(states: Iterable[VelocityState], steps: int | None) -> int | None:
    """The number of steps that states have counted, or else the one given."""
    for state in states:
        if isinstance(state, optax.TraceState):
            continue
        known = int(state.count)
        if steps is not None and steps != known:
            raise ValueError(f"steps must be the count of optax_state, {known}, or None, got {steps!r}")
        steps = known
    return steps


def _steps_made(steps: int | None, known: int | None) -> int:
    """The number of updates made, by the caller or by our state."""
    count = checked_steps(steps)
    if count is None:
        if known is None:
            raise ValueError("steps must be given, since optax_state counts them and opt_state does not; got None")
        return known
    if known is not None and count != known:
        raise ValueError(f"steps must be what opt_state has counted, {known}, or None, got {steps!r}")
    return count


def _unit_response(rule: Filter, steps: int) -> tuple[float, ...]:
    """The velocities after `steps` steps with a gradient of 1."""
    rule = rule.pruned()
    v = np.zeros(rule.order)
    for t in range(steps):
        A, B, _, _ = rule.at(t).matrices()
        v = A @ v + B
    return tuple(v.tolist())
