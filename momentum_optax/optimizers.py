"""Finished optimizers: each body is one visible `optax.chain`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import checks
from .coefficients import Scalar, is_zero
from .filters import Filter
from .rules import heavy_ball, torch_nesterov
from .storage import Storage, resolve
from .transform import scale_by_momentum


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter | None" = 0.9,
    *,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    maximize: bool = False,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with momentum: `optax.sgd` with PyTorch's options, or with any rule.

    $$ g \leftarrow \pm g + \lambda\theta, \quad v' = \mu v + (1-\tau) g, \quad u = v' \;\text{or}\; g + \mu v',
       \quad \theta' = \theta - \eta u $$

    The first gradient that a leaf receives enters its velocity undampened.

    Every numeric argument takes a number, a scalar array (so `optax.inject_hyperparams` works) or a schedule.
    Updates have the gradients' dtypes, also where an injected hyperparameter is of a wider one.

    Args:
      learning_rate: eta.
      momentum: mu in [0, 1), with PyTorch's meaning; or a rule, such as `mo.nesterov(schedule)`, which then takes no
        `nesterov` and no `dampening`; None or the number 0 for none, without state.
      nesterov: The Nesterov form of PyTorch and Optax (`torch_nesterov`).
      dampening: tau in [0, 1).
      weight_decay: lambda in [0, inf): L2, coupled, that is through the momentum as in PyTorch; `update` then needs
        `params`.
      maximize: Ascend. As in PyTorch the sign is turned before the weight decay is added, which still shrinks.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; if `nesterov` or `dampening` is given without a momentum to act on, or
        both together, as in PyTorch.
      TypeError: If an argument is of the wrong type.

    Reference:
      `torch.optim.SGD`, `optax.sgd`; Sutskever et al., ICML 2013.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.within("weight_decay", weight_decay, "[0, inf)")
    checks.flag("maximize", maximize)
    storage = resolve(storage)
    rule = _sgd_rule(momentum, nesterov, dampening)
    return in_gradient_dtype(
        optax.chain(
            optax.scale(-1.0) if maximize else optax.identity(),
            optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
            optax.identity() if rule is None else scale_by_momentum(rule, storage=storage),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _sgd_rule(momentum: "Scalar | Filter | None", nesterov: bool, dampening: Scalar) -> Filter | None:
    """The rule of PyTorch's options; None for no momentum."""
    checks.flag("nesterov", nesterov)
    checks.within("dampening", dampening, "[0, 1)")
    damped = not is_zero(dampening)
    if isinstance(momentum, Filter):
        if nesterov or damped:
            raise ValueError("nesterov and dampening must be left out when momentum is a rule: it says what they would")
        return momentum
    if momentum is None or is_zero(momentum):
        if nesterov or damped:
            raise ValueError(f"nesterov and dampening need a momentum in (0, 1), got {momentum!r}")
        return None
    checks.within("momentum", momentum, "[0, 1)")
    if nesterov:
        if checks.is_number(dampening) and damped:
            raise ValueError(f"nesterov needs dampening 0, got {dampening!r}")
        # An injected or scheduled dampening, which may be 0 throughout, cannot be refused: it acts.
        return torch_nesterov(momentum, dampening=dampening)
    return heavy_ball(momentum, dampening=dampening, first_step="gradient")


def in_gradient_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with updates of the gradients' dtypes: Optax multiplies by wider hyperparameters as they are."""
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = tx.update(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
