"""Caffe's `SGD` solver."""

__all__ = ["caffe_sgd"]

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
    form.require_linear(l2=True)
    form.require_heavy_ball()
    return {"base_lr": form.sum_rate, "momentum": form.decay, "weight_decay": form.l2}


@dialect(inverse=_arguments, learning_rate="base_lr", momentum=None)
def caffe_sgd(
    base_lr: Scalar,
    momentum: "float | jax.Array" = 0.0,
    weight_decay: "float | jax.Array | None" = None,
    regularization_type: str = "L2",
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""Caffe's `SGD` solver: $v' = \mu v + \eta (g + \lambda\theta)$, $\theta' = \theta - v'$.

    The learning rate is inside the velocity. The velocity is stored with the opposite sign of Caffe's, downhill.

    Args:
      base_lr: eta, a number in [0, inf), a scalar array or a schedule, which stands for Caffe's `lr_policy`.
      momentum: mu, a number in [0, 1] or a scalar array.
      weight_decay: lambda in [0, inf), coupled, no schedule; `update` then needs `params`. None for no decay.
      regularization_type: "L2"; Caffe's "L1" is refused.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range or the regularization is another.
      TypeError: If an argument is of the wrong type.

    Reference:
      Caffe, `src/caffe/solvers/sgd_solver.cpp` and `src/caffe/proto/caffe.proto`.
    """
    _checks.within("base_lr", base_lr, "[0, inf)")
    _checks.constant("momentum", momentum, "[0, 1]")
    decay = constant_decay(weight_decay)
    _checks.choice("regularization_type", regularization_type, ("L2",))
    rule = None if is_zero(momentum) else sgd_rule(momentum, 1.0, False)
    return Description(rule, base_lr, rate_inside=True, l2=decay, storage=storage)
