"""Live velocities of one rule as those of another with the same updates."""

__all__ = ["change_basis"]

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from ..filters import Filter, equivalent
from .entries import check_same_paths, checked_steps
from .velocities import ParameterVelocity, only_state, order_of, read, write

# The ages at which a rule with a special first step must have settled.
_AGES = (2, 3, 10, 100, 1000, 100_000)


def change_basis(
    opt_state: optax.OptState, source: Filter, target: Filter, *, into: optax.OptState, steps: int | None = None
) -> optax.OptState:
    r"""The velocities of one rule as those of another with the same updates: $w = T^{-1} v$.

    Two rules of equal order with the same input-output map, neither of which has a velocity to spare, differ by exactly
    one change of basis. With $\mathcal{C} = [B, AB, \ldots]$ it is $T^{-1} = \mathcal{C}_w \mathcal{C}_v^{-1}$.

        source = mo.interop.Recipe("torch_sgd", lr=0.1, momentum=0.9).filter()
        target = mo.interop.Recipe("keras_sgd", learning_rate=0.1, momentum=0.9).filter()
        state = mo.interop.change_basis(state, source, target, into=keras_optimizer.init(params))

    Args:
      opt_state: Of the optimizer to leave, velocities in any storage.
      source: Its rule, times its learning rate: of `scale_by_momentum(rule)` followed by a rate eta,
        `rule.scale(-eta)`; of a dialect, `Recipe(...).filter()`. Constant coefficients; for scheduled ones those of the
        step, `rule.at(step)`. A special first step may differ.
      target: The same of the optimizer to continue with.
      into: The result of that optimizer's `init`, with velocities in float32.
      steps: The number of updates made; needed where something in `into` counts them and `opt_state` does not.

    Returns:
      A state like `into`.

    Raises:
      ValueError: If the rules differ in order or updates, change after the first gradient, or have a velocity to spare;
        if a state is not of its rule, or debiases; naming the entry, if one is missing or too many, of another
        shape, or still to take a first step that `target` does not have; if `steps` is needed.
      TypeError: If an argument is of the wrong type.

    Reference:
      Kalman, "Mathematical description of linear dynamical systems", SIAM J. Control 1963.
    """
    _checks.state("opt_state", opt_state)
    s, t = _settled("source", source), _settled("target", target)
    state, new = only_state(opt_state), only_state(into)
    if state.gain is not None:
        raise ValueError("opt_state must not debias: its updates are those of its rule only without debias=True")
    matrix = _inverse_change(s, t, order_of(state), order_of(new))
    count = checked_steps(steps)
    if count is None and state.step is not None:
        count = int(state.step)
    same_start = new.age is not None and equivalent(source, target, steps=8)
    ours, there = read(state), read(new)
    check_same_paths(there, ours)
    changed = {}
    for path, (velocities, age) in ours.items():
        if age == 0 and not same_start:
            raise ValueError(f"the first step of {path!r} is pending, and target has a different first step")
        if velocities is None:
            changed[path] = ParameterVelocity(None, 0)
        else:
            mixed = tuple(_combined(row, velocities) for row in matrix)
            changed[path] = ParameterVelocity(mixed, (count or 1) if age is None else age)
    return write(into, changed, count)


def _combined(weights: np.ndarray, velocities: "Sequence[jax.Array | np.ndarray]") -> jax.Array:
    """A linear combination of velocities."""
    return jnp.asarray(sum(float(m) * v for m, v in zip(weights, velocities, strict=True)))


def _inverse_change(source: Filter, target: Filter, source_order: int, target_order: int) -> np.ndarray:
    """T^{-1}, from the velocities of `source` to those of `target`; the orders are those of their states."""
    for name, rule, order in (("source", source, source_order), ("target", target, target_order)):
        if rule.order != order:
            raise ValueError(f"{name} must be the rule of its state, of order {order}, got {rule.order}")
    if source.order != target.order or not equivalent(source, target):
        n = source.order + target.order + 1
        responses = f"{source.impulse_response(n).tolist()} and {target.impulse_response(n).tolist()}"
        raise ValueError(f"source and target must have the same updates and order, got impulse responses {responses}")
    return np.asarray(_reachable("target", target) @ np.linalg.inv(_reachable("source", source)))


def _settled(name: str, rule: object) -> Filter:
    """The rule past its first step."""
    if not isinstance(rule, Filter):
        raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    if rule.reads_step:
        raise ValueError(f"{name} must have constant coefficients: give {name}.at(step)")
    settled = rule.at(1, 1)
    settled.matrices()
    for age in _AGES:
        if not np.array_equal(_numbers(settled), _numbers(rule.at(age, age))):
            raise ValueError(
                f"{name} must not change after the first gradient, got one that changes at gradient {age + 1}"
            )
    return settled.pruned()


def _numbers(rule: Filter) -> np.ndarray:
    """All coefficients of a constant rule in one vector."""
    A, B, C, D = rule.matrices()
    return np.concatenate([A.ravel(), B, C, [D]])


def _reachable(name: str, rule: Filter) -> np.ndarray:
    """The matrix [B, AB, A^2 B, ...]."""
    A, B, _, _ = rule.matrices()
    columns = [B]
    for _ in range(rule.order - 1):
        columns.append(A @ columns[-1])
    matrix = np.stack(columns, axis=1) if columns else np.zeros((0, 0))
    if not rule.is_minimal() or not np.linalg.cond(matrix) < 1e12:
        raise ValueError(f"{name} must need all its velocities, got a rule that fewer could express")
    return matrix
