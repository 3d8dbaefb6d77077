"""Live velocities to and from the states of Optax' own transformations."""

__all__ = ["from_optax", "to_optax"]

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._paths import slash_path
from .._tree import reboxed, unboxed
from .._typing import KeyPath, PyTree
from ..filters import Filter
from ..transform import MomentumState
from .entries import as_array, check_same_paths, checked_steps
from .velocities import ParameterVelocity, by_path, only_state, read_one, write

# Optax's states with a velocity, and its field.
VelocityState: TypeAlias = optax.TraceState | optax.EmaState | optax.ScaleByLionState | optax.ScaleByAdamState
_FIELDS: dict[type, str] = {
    optax.TraceState: "trace",
    optax.EmaState: "ema",
    optax.ScaleByLionState: "mu",
    optax.ScaleByAdamState: "mu",
}


def from_optax(
    opt_state: optax.OptState, optax_state: optax.OptState, *, rule: Filter | None = None, steps: int | None = None
) -> optax.OptState:
    """The velocity of `optax.trace`, `ema`, `scale_by_lion` or `scale_by_adam` put into the state of our optimizer.

    In the basis of `heavy_ball` (also `sgd` and `torch_sgd`, without dampening) for `TraceState.trace`, of `ema` for
    `EmaState.ema` and `ScaleByAdamState.mu`, and of `lion_mix` for `ScaleByLionState.mu`.

    Args:
      opt_state: The result of our optimizer's `init`, with velocities in float32.
      optax_state: Any state that holds exactly one of these.
      rule: The rule of `opt_state`; needed only where it debiases.
      steps: The number of updates made, if `optax_state` does not count them and something here does.

    Returns:
      A state like `opt_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if there is not exactly one state
        with a velocity; if `steps` or `rule` is needed, or `steps` is not the count.
      TypeError: If an argument or entry is of the wrong type.

    Reference:
      Optax 0.2.8, `optax/transforms/_accumulation.py` and `optax/_src/transform.py`.
    """
    _checks.state("opt_state", opt_state)
    if rule is not None and not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as ema(0.9) or None, got {_checks.shown(rule)}")
    ours = read_one(opt_state)
    source = _velocity_state(unboxed(optax_state))
    count = checked_steps(steps)
    if "count" in source._fields:
        known = int(source.count)
        if count is not None and count != known:
            raise ValueError(f"steps must be the count of optax_state, {known}, or None, got {steps!r}")
        count = known
    there = by_path(getattr(source, _FIELDS[type(source)]))
    check_same_paths(ours, there)
    unit_response = None
    if only_state(opt_state).gain is not None:
        if rule is None or count is None:
            raise ValueError(
                f"rule and the number of steps must be given, since opt_state debiases; got {_checks.shown(rule)}"
            )
        unit_response = _unit_response(rule, count)
    age = 1 if count is None else count
    velocities = {
        path: ParameterVelocity((as_array(path, x),), age) if hasattr(x, "shape") else ParameterVelocity(None, 0)
        for path, x in there.items()
    }
    return write(opt_state, velocities, count, unit_response)


def to_optax(opt_state: optax.OptState, optax_state: optax.OptState, *, steps: int | None = None) -> optax.OptState:
    """The inverse of `from_optax`: `optax_state` with our velocity in place of Optax's, in its dtypes.

    Everything else in it, such as Adam's second moment, stays.

    Args:
      opt_state: Of our optimizer, velocities in any storage, in the basis that `from_optax` says.
      optax_state: The result of the Optax optimizer's `init`; holds exactly one state with a velocity.
      steps: The number of updates made; needed if that state counts them and ours does not.

    Returns:
      A state like `optax_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if there is not exactly one state
        with a velocity; if `steps` is needed, or is not what our state has counted.
      TypeError: If an argument is of the wrong type.

    Reference:
      As for `from_optax`.
    """
    _checks.state("opt_state", opt_state)
    ours, bare, state = read_one(opt_state), unboxed(optax_state), only_state(opt_state)
    target = _velocity_state(bare)
    field = _FIELDS[type(target)]
    check_same_paths(ours, by_path(getattr(target, field)))

    def put(path: KeyPath, old: PyTree) -> PyTree:
        velocities = ours[slash_path(path)].velocities
        if velocities is None or not hasattr(old, "shape"):
            return old
        if velocities[0].shape != old.shape:
            raise ValueError(
                f"the velocity for {slash_path(path)!r} must have shape {old.shape}, got {velocities[0].shape}"
            )
        return jnp.array(velocities[0], old.dtype)

    new = target._replace(**{field: jax.tree_util.tree_map_with_path(put, getattr(target, field))})
    if "count" in target._fields:
        new = new._replace(count=jnp.asarray(_steps_made(steps, state), jnp.int32))
    return reboxed(jax.tree.map(lambda x: new if x is target else x, bare, is_leaf=_has_velocity), optax_state)


def _steps_made(steps: int | None, state: MomentumState) -> int:
    """The number of updates made, by the caller or by our state."""
    count = checked_steps(steps)
    known = None if state.step is None else int(state.step)
    if count is None:
        if known is None:
            raise ValueError("steps must be given, since optax_state counts them and opt_state does not; got None")
        return known
    if known is not None and count != known:
        raise ValueError(f"steps must be what opt_state has counted, {known}, or None, got {steps!r}")
    return count


def _has_velocity(x: PyTree) -> bool:
    return type(x) in _FIELDS


def _velocity_state(optax_state: optax.OptState) -> VelocityState:
    """The one state with a velocity in `optax_state`."""
    found = [x for x in jax.tree.leaves(optax_state, is_leaf=_has_velocity) if _has_velocity(x)]
    if len(found) != 1:
        kinds = ", ".join(kind.__name__ for kind in _FIELDS)
        raise ValueError(f"optax_state must hold one state of {kinds}, got {len(found)}")
    return found[0]


def _unit_response(rule: Filter, steps: int) -> tuple[float, ...]:
    """The velocities after `steps` steps with a gradient of 1."""
    rule = rule.pruned()
    v = np.zeros(rule.order)
    for t in range(steps):
        A, B, _, _ = rule.at(t).matrices()
        v = A @ v + B
    return tuple(v.tolist())
