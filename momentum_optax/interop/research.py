"""Dialects of reference implementations of papers: their own argument names, defaults and errors."""

from .. import _checks, rules
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift
from ..storage import Storage
from .dialect import Dialect, check_without_effect, checked_decay, dialect


@dialect
def qhoptim_qhm(
    lr: Scalar,
    momentum: Scalar,
    nu: Scalar,
    weight_decay: "Scalar | None" = None,
    weight_decay_type: str = "grad",
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    r"""`qhoptim.pyt.QHM`: $v' = \beta v + (1-\beta) g$, $\theta' = \theta - \eta [\nu v' + (1-\nu) g]$.

    Args:
      lr: eta, a number in [0, inf), a scalar array or a schedule, as all numbers here.
      momentum: beta in [0, 1).
      nu: Finite.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for none.
      weight_decay_type: "grad", coupled, or "direct", decoupled: $\theta \leftarrow (1 - \eta\lambda)\theta$ first.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range, or there is no such type.
      TypeError: If an argument is of the wrong type.

    Reference:
      qhoptim 1.1.0, `qhoptim/pyt/qhm.py`; Ma and Yarats, ICLR 2019, arXiv:1810.06801.
    """
    _checks.within("lr", lr, "[0, inf)")
    _checks.within("momentum", momentum, "[0, 1)")
    decay = checked_decay(weight_decay)
    _checks.choice("weight_decay_type", weight_decay_type, ("grad", "direct"))
    l2, decoupled = (decay, 0.0) if weight_decay_type == "grad" else (0.0, decay)
    return Dialect(rules.quasi_hyperbolic(momentum, nu), lr, l2=l2, decoupled=decoupled, storage=storage)


@dialect
def aggmo(
    lr: Scalar,
    betas: tuple[float, ...] = (0.0, 0.9, 0.99),
    weight_decay: "Scalar | None" = None,
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    r"""AggMo's reference optimizer: $v_i' = \beta_i v_i + g$, $\theta' = \theta - \frac{\eta}{K} \sum_i v_i'$.

    Args:
      lr: eta.
      betas: Distinct numbers in [0, 1]. The reference keeps its buffers by the value of beta, so that equal ones share
        a buffer and a scheduled one loses it.
      weight_decay: lambda in [0, inf), coupled; `update` then needs `params`. None for none.
      storage: How the velocities are kept.

    Raises:
      ValueError: If a number is out of range, or two betas are equal.
      TypeError: If an argument is of the wrong type.

    Reference:
      Lucas et al., ICLR 2019, arXiv:1804.00325, and its `aggmo.py`.
    """
    _checks.within("lr", lr, "[0, inf)")
    rule = rules.aggregated(betas)
    for i, beta in enumerate(betas):
        _checks.number(f"betas[{i}]", beta, "[0, 1]")
    if len(set(betas)) < len(betas):
        raise ValueError(f"betas must be distinct, got {_checks.shown(betas)}")
    return Dialect(rule, lr, l2=checked_decay(weight_decay), storage=storage)


@dialect
def accsgd(
    lr: Scalar,
    kappa: Scalar = 1000.0,
    xi: Scalar = 10.0,
    smallConst: Scalar = 0.7,
    weight_decay: "Scalar | None" = None,
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    """The reference optimizer of accelerated SGD; its formula is that of `accelerated`.

    The reference stores a point and this the displacement to it, in which each gradient keeps the rate of its own step.

    Args:
      lr: eta, the short step.
      kappa: Long step over short step, in [1, inf).
      xi: Statistical advantage, in [1, inf).
      smallConst: In (0, 1].
      weight_decay: lambda in [0, inf), coupled; `update` then needs `params`. None for none.
      storage: How the velocity is kept.

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
    return Dialect(rule, lr, rate_inside=True, l2=checked_decay(weight_decay), storage=storage)


@dialect
def mass(
    lr: Scalar = 0.1,
    alpha: Scalar = 0.05,
    kappa_t: Scalar = 12.0,
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    """The reference optimizer of MaSS; its formula is that of the rule `mass`.

    The reference stores a point and this the displacement to it, in which each gradient keeps the rate of its own step.

    Args:
      lr: eta.
      alpha: In (0, 1).
      kappa_t: In [1, inf).
      storage: How the velocity is kept.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Liu and Belkin, ICLR 2020, arXiv:1810.13395, and its `optimizers.py`.
    """
    _checks.within("lr", lr, "[0, inf)")
    _checks.within("kappa_t", kappa_t, "[1, inf)")
    return Dialect(rules.mass(alpha, kappa_t), lr, rate_inside=True, storage=storage)


@dialect
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
    storage: str | Storage = "float32",
) -> Dialect:
    r"""Lion.

    $$ \theta' = (1-\eta\lambda)\theta - \eta\,\mathrm{sign}(\beta_1 v + (1-\beta_1) g), \qquad
       v' = \beta_2 v + (1-\beta_2) g $$

    Args:
      lr: eta.
      betas: beta_1 and beta_2, each in [0, 1).
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for none.
      maximize: Ascend.
      foreach: Ignored, see `torch_sgd`.
      differentiable: Ignored.
      fused: Ignored.
      capturable: Ignored.
      storage: How the velocity is kept.

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
    return Dialect(
        rules.lion_mix(*betas), lr, decoupled=checked_decay(weight_decay), maximize=maximize, sign=True, storage=storage
    )


@dialect
def signum(
    lr: Scalar = 1e-3,
    momentum: Scalar = 0.9,
    weight_decay: "Scalar | None" = None,
    weight_decouple: bool = True,
    *,
    maximize: bool = False,
    storage: str | Storage = "float32",
) -> Dialect:
    r"""Signum in its average form.

    $$ v' = \mu v + (1-\mu) g, \qquad \theta' = (1-\eta\lambda)\theta - \eta\,\mathrm{sign}(v') $$

    Under a schedule, a momentum of 0 leaves the buffer as it is.

    Args:
      lr: eta.
      momentum: mu in [0, 1); the number 0 is sign descent, without state.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for none.
      weight_decouple: False adds $\lambda\theta$ to the gradient instead. Without weight decay it must stay True.
      maximize: Ascend.
      storage: How the velocity is kept.

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
    return Dialect(rule, lr, l2=l2, decoupled=decoupled, maximize=maximize, sign=True, storage=storage)


@dialect
def muon_average(momentum: Scalar = 0.95, nesterov: bool = True, *, storage: str | Storage = "float32") -> Dialect:
    r"""What `torch.optim.Muon` and Jordan's Muon orthogonalise.

    $$ v' = \mu v + (1-\mu) g, \qquad u = v' \;\text{or}\; \mu v' + (1-\mu) g $$

    The momentum alone, neither scaled by a learning rate nor turned downhill: the orthogonalisation follows in the
    chain. Its iteration differs between libraries by more than the momentum does (coefficients, bfloat16, scaling).

    Args:
      momentum: mu in [0, 1).
      nesterov: The second form.
      storage: How the velocity is kept.

    Raises:
      ValueError: If a number is out of range; for `nesterov` with momentum 0, where it would do nothing.
      TypeError: If an argument is of the wrong type.

    Reference:
      Jordan et al., 2024; PyTorch 2.13, `torch/optim/_muon.py`.
    """
    _check_muon(momentum, nesterov, "[0, 1)")
    return Dialect(rules.quasi_hyperbolic(momentum, momentum if nesterov else 1.0), None, storage=storage)


@dialect
def muon_sum(momentum: Scalar = 0.95, nesterov: bool = False, *, storage: str | Storage = "float32") -> Dialect:
    r"""What Microsoft's `dion.Muon` orthogonalises: $v' = \mu v + g$, $u = v'$ or $g + \mu v'$.

    At a constant momentum it is `muon_average` over 1 - mu, which an orthogonalisation does not see. The momentum
    alone, neither scaled nor turned downhill.

    Args:
      momentum: mu in [0, 1].
      nesterov: The second form.
      storage: How the velocity is kept.

    Raises:
      ValueError: If a number is out of range; for `nesterov` with momentum 0, where it would do nothing.
      TypeError: If an argument is of the wrong type.

    Reference:
      Ahn et al., "Dion: distributed orthonormalized updates", 2025, arXiv:2504.05295, and its `muon.py`.
    """
    _check_muon(momentum, nesterov, "[0, 1]")
    after = lift(lambda m: m * m, momentum) if nesterov else momentum
    direct = lift(lambda m: 1 + m, momentum) if nesterov else 1.0
    return Dialect(Filter(A=momentum, B=1.0, C=after, D=direct), None, storage=storage)


def _check_muon(momentum: Scalar, nesterov: bool, interval: str) -> None:
    _checks.within("momentum", momentum, interval)
    _checks.flag("nesterov", nesterov)
    if nesterov and is_zero(momentum):
        raise ValueError(f"nesterov needs a momentum above 0, got {_checks.shown(momentum)}")


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
