"""Keras' `SGD`."""

__all__ = ["keras_sgd"]

from typing import TYPE_CHECKING

from .. import _checks
from ..filters.coefficients import Scalar, is_zero
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description, constant_decay
from .dialect import Hyperparameter, dialect
from .pytorch import sgd_rule

if TYPE_CHECKING:
    import jax


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(decoupled=True)
    return {
        "learning_rate": form.sum_rate,
        "momentum": form.decay,
        "nesterov": form.is_nesterov(),
        "weight_decay": form.decoupled_decay(form.sum_rate),
    }


@dialect(inverse=_arguments, learning_rate="learning_rate", momentum=None)
def keras_sgd(
    learning_rate: Scalar = 0.01,
    momentum: "float | jax.Array" = 0.0,
    nesterov: bool = False,
    weight_decay: "float | jax.Array | None" = None,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""`keras.optimizers.SGD` of Keras 3: the learning rate inside the velocity.

    $$ v' = \mu v - \eta g, \qquad \theta' = (1 - \eta\lambda)\theta + v'
       \;\text{or}\; (1 - \eta\lambda)\theta + \mu v' - \eta g $$

    Each gradient keeps the learning rate of its step, unlike in PyTorch. The velocity has Keras' sign and scale. A
    variable without a gradient is skipped. With momentum 0, `nesterov` has no effect in Keras; here it is refused.

    Args:
      learning_rate: eta, a number in [0, inf), a scalar array or a schedule.
      momentum: mu, a float in [0, 1] or a scalar array; Keras takes no integer and no schedule.
      nesterov: The second form.
      weight_decay: lambda in [0, inf), decoupled, no schedule; `update` then needs `params`. None for no decay.
      storage: How the velocity is stored, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; if `momentum` is not a float, as in Keras; for `nesterov` without one.
      TypeError: If an argument is of the wrong type. Clipping, averaging and accumulation are transformations of
        Optax's and not arguments here.

    Reference:
      Keras 3.15, `keras/src/optimizers/sgd.py` and `base_optimizer.py`.
    """
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    if not _checks.is_array(momentum) and (not isinstance(momentum, float) or not 0 <= momentum <= 1):
        raise ValueError(f"momentum must be a float in [0, 1] or a scalar array, got {_checks.shown(momentum)}")
    _checks.flag("nesterov", nesterov)
    decay = constant_decay(weight_decay)
    if nesterov and is_zero(momentum):
        raise ValueError(f"nesterov needs a momentum above 0, got {momentum!r}")
    rule = None if is_zero(momentum) else sgd_rule(momentum, 1.0, nesterov)
    return Description(rule, learning_rate, rate_inside=True, decoupled=decay, storage=storage)
