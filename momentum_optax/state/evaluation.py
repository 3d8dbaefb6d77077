"""`eval_params`: the point to evaluate, for rules that store a look-ahead point."""

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import absent, find_all, reboxed, unboxed
from .._typing import Number
from ..filters import Filter
from ..storage.protocol import arithmetic_dtype
from ..transform import MomentumState, _dot
from .velocity import decoded


def eval_params(rule: Filter, opt_state: optax.OptState, params: optax.Params, learning_rate: Number) -> optax.Params:
    r"""The point to evaluate and keep, $x = \theta + \eta\,\ell \cdot v$, for rules that store a look-ahead point.

    `nesterov`, `triple_momentum`, `schedule_free` and some others take their gradients at the stored parameters, which
    are not the sequence that their theory is about. For every other rule the parameters are returned unchanged.

    Args:
      rule: The rule that `scale_by_momentum` was given.
      opt_state: The optimizer's state, with one state of `scale_by_momentum` in it.
      params: The stored parameters.
      learning_rate: The constant learning rate that followed the rule in the chain, a number or a scalar array.

    Returns:
      A tree like `params`, of the same dtypes.

    Raises:
      TypeError: If `learning_rate` is a schedule, `rule` is not a `Filter` or `opt_state` is not a state.
      ValueError: If `opt_state` does not hold exactly one state of `scale_by_momentum`, or one of another order.

    Reference:
      See the rules; for example Van Scoy, Freeman and Lynch, IEEE Control Systems Letters 2018.
    """
    if not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as nesterov(0.9), got {_checks.shown(rule)}")
    if not (_checks.is_number(learning_rate) or _checks.is_scalar_array(learning_rate)):
        raise TypeError(f"learning_rate must be a number or a scalar array, got {_checks.shown(learning_rate)}")
    _checks.state("opt_state", opt_state)
    states = [state for _, state in find_all(unboxed(opt_state), MomentumState)]
    if len(states) != 1:
        raise ValueError(f"opt_state must hold one state of scale_by_momentum, got {len(states)}")
    rule = rule.pruned()
    velocities = decoded(states[0])
    if len(velocities) != rule.order:
        raise ValueError(f"rule must be the one of opt_state, got order {rule.order} for {len(velocities)} velocities")
    if not velocities:
        return params
    # The update before this state used the coefficients of the step before.
    now = rule.at(0 if states[0].step is None else jnp.maximum(states[0].step - 1, 0))

    def move(v: jax.Array, p: jax.Array, *more: jax.Array) -> jax.Array:
        if absent(v):
            return p
        far = _dot(now.lookahead, (v, *more))
        rate = jnp.asarray(learning_rate, jnp.finfo(far.dtype).dtype)
        return (p.astype(arithmetic_dtype(p.dtype, far.dtype)) + rate * far).astype(p.dtype)

    return reboxed(jax.tree.map(move, velocities[0], unboxed(params), *velocities[1:], is_leaf=absent), params)
