"""The reference implementations of AggMo, accelerated SGD and MaSS."""

__all__ = ["accsgd", "aggmo", "mass"]

from .. import _checks, rules
from ..filters.coefficients import Scalar
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm, NotExpressibleError, near
from .description import Description, checked_decay
from .dialect import Hyperparameter, dialect


def _aggmo_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(l2=True)
    if form.decay == 0 or near(form.nu, 1.0):
        return {"lr": form.sum_rate, "betas": (form.decay,), "weight_decay": form.l2}
    # The mean of the gradient and a heavy ball.
    if not near(form.nu, 1 / (2 - form.decay)):
        raise NotExpressibleError(f"its nu, {form.nu:.6g}, must be 1 or, for two velocities, 1/(2 - decay)")
    return {"lr": form.sum_rate * 2 / (2 - form.decay), "betas": (0.0, form.decay), "weight_decay": form.l2}


@dialect(inverse=_aggmo_arguments, learning_rate="lr", momentum=None)
def aggmo(
    lr: Scalar,
    betas: tuple[float, ...] = (0.0, 0.9, 0.99),
    weight_decay: "Scalar | None" = None,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""AggMo's reference optimizer: $v_i' = \beta_i v_i + g$, $\theta' = \theta - \frac{\eta}{K} \sum_i v_i'$.

    Args:
      lr: eta.
      betas: Distinct numbers in [0, 1]. The reference keeps its buffers by the value of beta, so that equal ones share
        a buffer and a scheduled one loses it.
      weight_decay: lambda in [0, inf), coupled; `update` then needs `params`. None for no decay.
      storage: How the velocities are stored.

    Raises:
      ValueError: If a number is out of range, two betas are equal, or there is none.
      TypeError: If an argument is of the wrong type.

    Reference:
      Lucas et al., ICLR 2019, arXiv:1804.00325, and its `aggmo.py`.
    """
    _checks.within("lr", lr, "[0, inf)")
    if not isinstance(betas, tuple | list):
        raise TypeError(f"betas must be a tuple or list of numbers, got {_checks.shown(betas)}")
    if not betas:
        raise ValueError("betas must have at least one entry, got none")
    for i, beta in enumerate(betas):
        _checks.number(f"betas[{i}]", beta, "[0, 1]")
    if len(set(betas)) < len(betas):
        raise ValueError(f"betas must be distinct, got {_checks.shown(betas)}")
    return Description(rules.aggregated(betas), lr, l2=checked_decay(weight_decay), storage=storage)


def _accsgd_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(l2=True)
    form.require_inner_velocity()
    e = 0.7
    xi = (1 + form.nu * e) / (e * (1 - form.nu))
    kappa = xi * (form.decay * e + e**2) / (1 - form.decay)
    if xi < 1 or kappa < 1:
        raise NotExpressibleError(f"it would need xi {xi:.6g} and kappa {kappa:.6g}, which must be at least 1")
    return {"lr": form.gain * (1 + e) / (e * (1 + xi)), "kappa": kappa, "xi": xi, "weight_decay": form.l2}


@dialect(inverse=_accsgd_arguments, learning_rate="lr", momentum=None)
def accsgd(
    lr: Scalar,
    kappa: Scalar = 1000.0,
    xi: Scalar = 10.0,
    smallConst: Scalar = 0.7,
    weight_decay: "Scalar | None" = None,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    """The reference optimizer of accelerated SGD; its formula is that of `accelerated`.

    The reference stores a point, this the displacement to it, in which a gradient keeps the learning rate of its step.

    Args:
      lr: eta, the short step.
      kappa: Long step over short step, in [1, inf).
      xi: Statistical advantage, in [1, inf).
      smallConst: In (0, 1].
      weight_decay: lambda in [0, inf), coupled; `update` then needs `params`. None for no decay.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Kidambi et al., ICLR 2018, arXiv:1803.05591, and its `AccSGD.py`; `pytorch_optimizer.AccSGD` 4.1.0, where
      smallConst is called constant.
    """
    _checks.within("lr", lr, "[0, inf)")
    _checks.within("smallConst", smallConst, "(0, 1]")
    rule = rules.accelerated(kappa, xi, smallConst)
    return Description(rule, lr, rate_inside=True, l2=checked_decay(weight_decay), storage=storage)


def _mass_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear()
    form.require_inner_velocity()
    alpha, ratio = (1 - form.decay) / (1 + form.decay), 1 / (1 - form.nu)
    inverse = alpha * (2 * ratio - 1)
    if not 0 < inverse <= 1 + 1e-12:
        kappa = 1 / inverse if inverse else float("inf")
        raise NotExpressibleError(f"it would need kappa_t {kappa:.6g}, which must be at least 1")
    return {"lr": form.gain / ratio, "alpha": alpha, "kappa_t": max(1 / inverse, 1.0)}


@dialect(inverse=_mass_arguments, learning_rate="lr", momentum=None)
def mass(
    lr: Scalar = 0.1,
    alpha: Scalar = 0.05,
    kappa_t: Scalar = 12.0,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    """The reference optimizer of MaSS; its formula is that of the rule `mass`.

    The reference stores a point, this the displacement to it, in which a gradient keeps the learning rate of its step.

    Args:
      lr: eta.
      alpha: In (0, 1).
      kappa_t: In [1, inf).
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Liu and Belkin, ICLR 2020, arXiv:1810.13395, and its `optimizers.py`.
    """
    _checks.within("lr", lr, "[0, inf)")
    _checks.within("kappa_t", kappa_t, "[1, inf)")
    return Description(rules.mass(alpha, kappa_t), lr, rate_inside=True, storage=storage)
