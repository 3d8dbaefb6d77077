"""FlashOptim's `FlashSGD`."""

__all__ = ["flash_sgd"]

from ..filters.coefficients import Scalar
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description, checked_decay
from .dialect import Hyperparameter, dialect
from .pytorch import checked_rule


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(l2=True)
    return {
        "lr": form.sum_rate,
        "momentum": form.decay,
        "nesterov": form.is_nesterov(),
        "weight_decay": form.l2,
    }


@dialect(inverse=_arguments, learning_rate="lr", momentum="momentum")
def flash_sgd(
    lr: Scalar = 1e-3,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: "Scalar | None" = None,
    nesterov: bool = False,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""FlashOptim's `FlashSGD`: PyTorch's rule with a buffer that starts at zero, so that every step is dampened.

    Args:
      lr: eta.
      momentum: mu in [0, inf).
      dampening: tau, finite; from the first step on.
      weight_decay: lambda in [0, inf), coupled; `update` then needs `params`. None for no decay.
      nesterov: u = g + mu v'.
      storage: How the velocity is stored; the counterpart of `quantize` there.

    Raises:
      ValueError: As `torch_sgd`.
      TypeError: If an argument is of the wrong type.

    Reference:
      flashoptim 0.1.4, `flashoptim/optimizers.py`.
    """
    rule = checked_rule(lr, momentum, dampening, nesterov, intake=lambda first, then: then)
    return Description(rule, lr, l2=checked_decay(weight_decay), storage=storage)
