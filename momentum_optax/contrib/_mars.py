"""MARS: momentum with a variance-reduced gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._typing import Number, PyTree
from ..filters import before_sign
from ..filters.coefficients import Scalar, lift, value_at
from ..optimizers.arguments import Mask, descent, weight_decay_of
from ..optimizers.gradient_dtype import keeping_state_dtypes
from ..rules.sums_and_averages import ema
from ..state.mismatch import ANYTHING, check_state
from ..storage._by_leaf import AnyStorage
from ..transform import scale_by_momentum
from ..wrappers.directions import by_norm
from ..wrappers.leaves import SCOPES, Scope
from ._gradients import combined, like


def mars_adamw(
    learning_rate: optax.ScalarOrSchedule,
    decay: Number = 0.95,
    b2: Number = 0.99,
    *,
    gamma: Scalar = 0.025,
    eps: Number = 1e-8,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    scope: Scope = "tree",
) -> optax.GradientTransformationExtraArgs:
    r"""MARS-AdamW: AdamW of the corrected and clipped gradient; see `mars_correction`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before. In one byte:
    `mo.compress(mo.contrib.mars_adamw(rate), {"mu": "int8", "nu": "uint8"})`.

    Args:
      learning_rate: eta; the authors' code has 3e-3.
      decay: beta_1 in [0, 1), a number or a scalar array.
      b2: beta_2 of `optax.scale_by_adam`, a number or a scalar array.
      gamma: The weight of the correction, finite.
      eps: See `optax.scale_by_adam`; a number or a scalar array.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for no decay.
      mask: Which parameters decay, see `sgd`.
      scope: Of the clip: `"tree"`, the paper's, or `"leaf"`, the authors' code's.

    Raises:
      ValueError: If a number is out of range or there is no such scope; for `mask` without `weight_decay`; at `init` if
        `mask` is not like the parameters; at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `init` if `mask` holds anything but bools; at `update` without
        `previous_gradient`.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    # `optax.scale_by_adam` takes no schedules.
    for name, value in (("decay", decay), ("b2", b2), ("eps", eps)):
        _checks.constant(name, value, "(-inf, inf)")
    return descent(
        learning_rate,
        mars_correction(decay, gamma, scope),
        keeping_state_dtypes(optax.scale_by_adam(decay, b2, eps)),
        weight_decay_of(weight_decay, mask),
    )


def mars_lion(
    learning_rate: optax.ScalarOrSchedule,
    decay: Scalar = 0.95,
    *,
    gamma: Scalar = 0.025,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    scope: Scope = "tree",
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""MARS-Lion: the sign of the averaged, corrected and clipped gradient; see `mars_correction`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before.

    Args:
      learning_rate: eta.
      decay: beta in [0, 1).
      gamma: The weight of the correction, finite.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for no decay.
      mask: Which parameters decay, see `sgd`.
      scope: Of the clip: `"tree"`, the paper's, or `"leaf"`, the authors' code's.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range or there is no such scope; for `mask` without `weight_decay`; at `init` if
        `mask` is not like the parameters; at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `init` if `mask` holds anything but bools; at `update` without
        `previous_gradient`.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    return descent(
        learning_rate,
        mars_correction(decay, gamma, scope),
        scale_by_momentum(before_sign(ema(decay)), storage=storage),
        optax.scale_by_sign(),
        weight_decay_of(weight_decay, mask),
    )


@serializable
class MarsState(NamedTuple):
    """State of `mars_correction`.

    Attributes:
      step: int32 scalar, the number of updates made; None unless an argument is scheduled.
    """

    step: jax.Array | None


def mars_correction(
    decay: Scalar = 0.95, gamma: Scalar = 0.025, scope: Scope = "tree"
) -> optax.GradientTransformationExtraArgs:
    r"""Exact MARS: the gradient, corrected by a second one of the same batch, and clipped to norm 1.

    $$ c_t = g_t(x_t) + \gamma_t \frac{\beta}{1 - \beta} (g_t(x_t) - g_t(x_{t-1})), \qquad
       c_t \leftarrow c_t / \max(1, \|c_t\|) $$

    The rest of the chain uses c as its gradient: `mo.ema(beta)` and a sign make MARS-Lion, AdamW makes MARS-AdamW
    (`mars_lion`, `mars_adamw`). With gamma 1 and no clip the average of c would be the d of
    `scale_by_storm` with $a = 1 - \beta$, up to its start. `mo.mars_mix` is the form for one gradient a step,
    which takes that of the last batch instead.

    `update` takes the second gradient, `previous_gradient=`, through `optax.chain` too. In the first step the previous
    parameters are the present ones: give the gradient itself.

    Args:
      decay: beta in [0, 1), that of the average that follows: a number, a scalar array or a schedule.
      gamma: The weight of the correction, finite: a number, a scalar array or a schedule.
      scope: `"tree"`: one norm for all parameters, as in the paper. `"leaf"`: one for each leaf, as in the authors'
        code.

    Returns:
      A transformation whose state is a `MarsState`. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If an argument is not a coefficient; at `update` without `previous_gradient`.
      ValueError: If a number is out of range or there is no such scope; at `update` if `previous_gradient` has another
        tree, shape or None than the gradients.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    _checks.within("decay", decay, "[0, 1)")
    _checks.finite("gamma", gamma)
    _checks.choice("scope", scope, SCOPES)
    extra_weight = lift(lambda b, c: c * b / (1 - b), decay, gamma)

    def init(params: optax.Params) -> MarsState:
        del params
        return MarsState(jnp.zeros([], jnp.int32) if callable(extra_weight) else None)

    def clipped(x: jax.Array, largest: jax.Array, root: jax.Array) -> jax.Array:
        return jnp.where(largest * root > 1, x / largest / root, x)

    def update(
        updates: optax.Updates,
        state: MarsState,
        params: optax.Params | None = None,
        *,
        previous_gradient: PyTree = None,
        **extra: PyTree,
    ) -> tuple[optax.Updates, MarsState]:
        del params, extra
        check_state(state, MarsState(ANYTHING if callable(extra_weight) else None))
        weight = value_at(extra_weight, state.step)
        moved = combined(updates, previous_gradient, lambda g, p, _: g + like(weight, g) * (g - p))
        out = by_norm(clipped, moved, scope)
        out = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), out, updates)
        return out, MarsState(None if state.step is None else optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)
