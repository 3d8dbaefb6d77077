"""Live velocities of one rule as those of another with the same updates."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .. import _checks
from ..filters import Filter, equivalent
from .slots import Slot, check_same_paths, checked_steps, only_state, order_of, read, write

# Where a rule with a special first step is looked at again: it must have settled.
_AGES = (2, 3, 10, 100, 1000, 100_000)


def change_basis(opt_state: Any, source: Filter, target: Filter, *, into: Any, steps: int | None = None) -> Any:
    r"""The velocities of one rule as those of another with the same updates: $w = T^{-1} v$.

    Two rules of equal order with the same input-output map, neither of which has a velocity to spare, differ by exactly
    one change of basis. With $\mathcal{C} = [B, AB, \ldots]$ it is $T^{-1} = \mathcal{C}_w \mathcal{C}_v^{-1}$.

        source = mo.interop.Recipe("torch_sgd", lr=0.1, momentum=0.9).filter()
        target = mo.interop.Recipe("keras_sgd", learning_rate=0.1, momentum=0.9).filter()
        state = mo.interop.change_basis(state, source, target, into=keras_like.init(params))

    Args:
      opt_state: Of the optimizer to leave, velocities in any storage.
      source: Its rule, times its learning rate: of `scale_by_momentum(rule)` followed by a rate eta,
        `rule.scale(-eta)`; of a dialect, `Recipe(...).filter()`. Constant coefficients; for scheduled ones those of the
        step, `rule.at(step)`. A special first step may differ.
      target: The same of the optimizer to go on with.
      into: What `init` of that optimizer gave, velocities in float32.
      steps: The number of updates made; needed where something in `into` counts them and `opt_state` does not.

    Returns:
      A state like `into`.

    Raises:
      ValueError: If the rules differ in order or updates, change after the first gradient, or have a velocity to spare;
        if a state is not of its rule, or `into` debiases; naming the entry, if one is missing or too many, of another
        shape, or still to take a first step that `target` does not have; if `steps` is needed.
      TypeError: If an argument is of the wrong type.

    Reference:
      Kalman, "Mathematical description of linear dynamical systems", SIAM J. Control 1963.
    """
    s, t = _settled("source", source), _settled("target", target)
    state, new = only_state(opt_state), only_state(into)
    for name, rule, holder in (("source", s, state), ("target", t, new)):
        if rule.order != order_of(holder):
            raise ValueError(f"{name} must be the rule of its state, of order {order_of(holder)}, got {rule.order}")
    if s.order != t.order or not equivalent(s, t):
        n = s.order + t.order + 1
        responses = f"{s.impulse_response(n).tolist()} and {t.impulse_response(n).tolist()}"
        raise ValueError(f"source and target must have the same updates and order, got impulse responses {responses}")
    matrix = _reachable("target", t) @ np.linalg.inv(_reachable("source", s))
    count = checked_steps(steps)
    if count is None and state.step is not None:
        count = int(state.step)
    same_start = new.age is not None and equivalent(source, target, steps=8)
    ours, there = read(state), read(new)
    check_same_paths(there, ours)
    slots = {}
    for path, slot in ours.items():
        if slot.age == 0 and not same_start:
            raise ValueError(f"the first step of {path!r} is pending, and it would be another one in target")
        if slot.velocities is None:
            slots[path] = Slot(None, 0)
            continue
        mixed = tuple(
            jnp.asarray(sum(float(m) * v for m, v in zip(row, slot.velocities, strict=True))) for row in matrix
        )
        slots[path] = Slot(mixed, max(count or 1, 1) if slot.age is None else slot.age)
    return write(into, slots, count)


def _settled(name: str, rule: Any) -> Filter:
    """The rule past its first step."""
    if not isinstance(rule, Filter):
        raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    if rule.reads_step:
        raise ValueError(f"{name} must have constant coefficients: give {name}.at(step)")
    settled = rule.at(1, 1)
    settled.matrices()
    for age in _AGES:
        pairs: Any = zip(settled.matrices(), rule.at(age, age).matrices(), strict=True)
        if not all(np.array_equal(x, y) for x, y in pairs):
            raise ValueError(f"{name} must not change after the first gradient, got one that does at the {age + 1}th")
    return settled.pruned()


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
