"""Lion and Signum, as timm and pytorch_optimizer have them."""

__all__ = ["lion", "signum"]

from .. import _checks, rules
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm, NotExpressibleError
from .description import Description, checked_decay
from .dialect import Hyperparameter, check_without_effect, dialect


def _lion_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_sign(decoupled=True, maximize=True)
    first = form.nu * form.decay
    if not 0 <= first < 1:
        raise NotExpressibleError(f"its nu times its decay, {first:.6g}, must be in [0, 1)")
    return {
        "lr": form.learning_rate,
        "betas": (first, form.decay),
        "weight_decay": form.decoupled_decay(form.learning_rate),
        "maximize": form.maximize,
    }


@dialect(inverse=_lion_arguments, learning_rate="lr", momentum="betas")
def lion(
    lr: Scalar = 1e-4,
    betas: tuple[Scalar, Scalar] = (0.9, 0.99),
    weight_decay: "Scalar | None" = None,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    capturable: bool = False,
    storage: AnyStorage = "float32",
) -> Description:
    r"""Lion.

    $$ \theta' = (1-\eta\lambda)\theta - \eta\,\mathrm{sign}(\beta_1 v + (1-\beta_1) g), \qquad
       v' = \beta_2 v + (1-\beta_2) g $$

    Args:
      lr: eta.
      betas: beta_1 and beta_2, each in [0, 1).
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for no decay.
      maximize: Ascend.
      foreach: Ignored, see `torch_sgd`.
      differentiable: Ignored.
      fused: Ignored.
      capturable: Ignored.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range, or there are not two betas.
      TypeError: If an argument is of the wrong type.

    Reference:
      Chen et al., NeurIPS 2023, arXiv:2302.06675; timm 1.0.31, `timm/optim/lion.py`.
    """
    _checks.within("lr", lr, "[0, inf)")
    check_without_effect(foreach=foreach, differentiable=differentiable, fused=fused, capturable=capturable)
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas must be a pair of decays, got {_checks.shown(betas)}")
    if len(betas) != 2:
        raise ValueError(f"betas must have 2 entries, got {_checks.shown(betas)}")
    for i, beta in enumerate(betas):
        _checks.within(f"betas[{i}]", beta, "[0, 1)")
    return Description(
        rules.lion_mix(*betas), lr, decoupled=checked_decay(weight_decay), maximize=maximize, sign=True, storage=storage
    )


def _signum_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_sign(l2=True, decoupled=True, maximize=True)
    form.require_heavy_ball()
    coupled = {"weight_decouple": False} if form.l2 else {}
    return {
        "lr": form.learning_rate,
        "momentum": form.decay,
        "weight_decay": form.l2 or form.decoupled_decay(form.learning_rate),
        **coupled,
        "maximize": form.maximize,
    }


@dialect(inverse=_signum_arguments, learning_rate="lr", momentum="momentum")
def signum(
    lr: Scalar = 1e-3,
    momentum: Scalar = 0.9,
    weight_decay: "Scalar | None" = None,
    weight_decouple: bool = True,
    *,
    maximize: bool = False,
    storage: AnyStorage = "float32",
) -> Description:
    r"""Signum in its average form.

    $$ v' = \mu v + (1-\mu) g, \qquad \theta' = (1-\eta\lambda)\theta - \eta\,\mathrm{sign}(v') $$

    Under a schedule, a momentum of 0 leaves the buffer unchanged.

    Args:
      lr: eta.
      momentum: mu in [0, 1); the number 0 is sign descent, without state.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for no decay.
      weight_decouple: False adds $\lambda\theta$ to the gradient instead. Without weight decay it must stay True.
      maximize: Ascend.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range; for `weight_decouple=False` without weight decay.
      TypeError: If an argument is of the wrong type.

    Reference:
      Bernstein et al., "signSGD", ICML 2018, arXiv:1802.04434; `pytorch_optimizer.SignSGD` 4.1.0.
    """
    _checks.within("lr", lr, "[0, inf)")
    _checks.within("momentum", momentum, "[0, 1)")
    decay = checked_decay(weight_decay)
    _checks.flag("weight_decouple", weight_decouple)
    if not weight_decouple and is_zero(decay):
        raise ValueError("weight_decouple must be True without a weight_decay, got False")
    l2, decoupled = (0.0, decay) if weight_decouple else (decay, 0.0)
    rule = None if is_zero(momentum) else _gated_average(momentum)
    return Description(rule, lr, l2=l2, decoupled=decoupled, maximize=maximize, sign=True, storage=storage)


def _gated_average(momentum: Scalar) -> Filter:
    """The average that keeps its velocity, and passes the gradient, where a scheduled momentum is 0."""
    if _checks.is_number(momentum):
        return rules.ema(momentum)
    return Filter(
        A=lift(lambda m: m + (m == 0), momentum),
        B=lift(lambda m: (m != 0) * (1 - m), momentum),
        C=momentum,
        D=lift(lambda m: 1 - m, momentum),
    )
