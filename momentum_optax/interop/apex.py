"""NVIDIA Apex's `FusedSGD`."""

__all__ = ["apex_sgd"]

from .. import _checks
from ..filters.coefficients import Coefficient, Scalar, is_zero, lift
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description, checked_decay
from .dialect import Hyperparameter, dialect
from .pytorch import checked_rule, rule_arguments, undampened_rate


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(l2=True, decoupled=True)
    return {
        **rule_arguments(form),
        "weight_decay": form.l2 or form.decoupled_decay(undampened_rate(form)),
        "wd_after_momentum": form.shrink > 0,
    }


@dialect(inverse=_arguments, learning_rate="lr", momentum="momentum")
def apex_sgd(  # noqa: PLR0917  the order of the library
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: "Scalar | None" = None,
    nesterov: bool = False,
    wd_after_momentum: bool = False,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""NVIDIA Apex's `FusedSGD`: PyTorch's rule, its first step that of the run.

    Only the first step of the run is undampened: a parameter whose first gradient comes later starts from zero. Apex
    takes that flag from the last parameter of a group, so that a late last parameter resets the whole group there;
    here it does not.

    Args:
      lr: eta.
      momentum: mu in [0, inf).
      dampening: tau, see `torch_sgd`.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for no decay.
      nesterov: u = g + mu v'.
      wd_after_momentum: Add $\lambda\theta$ to the update, past momentum and Nesterov, instead of to the gradient.
      storage: How the velocity is stored.

    Raises:
      ValueError: As `torch_sgd`; for `wd_after_momentum` without weight decay, where it would do nothing.
      TypeError: If an argument is of the wrong type.

    Reference:
      NVIDIA Apex, `apex/optimizers/fused_sgd.py` and `csrc/multi_tensor_sgd_kernel.cu`.
    """
    _checks.flag("wd_after_momentum", wd_after_momentum)
    decay = checked_decay(weight_decay)
    if wd_after_momentum and is_zero(decay):
        raise ValueError("wd_after_momentum must be False without a weight_decay, got True")
    rule = checked_rule(lr, momentum, dampening, nesterov, intake=_at_step_zero)
    after, before = (decay, 0.0) if wd_after_momentum else (0.0, decay)
    return Description(rule, lr, l2=before, decoupled=after, storage=storage)


def _at_step_zero(first: Coefficient, then: Coefficient) -> Coefficient:
    """`first` at the first step of the run."""
    coefficient: Coefficient = lift(lambda a, b, t: (t == 0) * a + (t > 0) * b, first, then, lambda step: step)
    return coefficient
