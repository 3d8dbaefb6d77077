"""PyTorch's `SGD` and timm's `SGDW`: their own argument names, defaults and errors."""

__all__ = ["timm_sgdw", "torch_sgd"]

from collections.abc import Callable

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Coefficient, Scalar, is_zero, lift, on_first_step
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description, checked_decay
from .dialect import Hyperparameter, check_without_effect, dialect


def _torch_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(l2=True, maximize=True)
    return {**rule_arguments(form), "weight_decay": form.l2, "maximize": form.maximize}


@dialect(inverse=_torch_arguments, learning_rate="lr", momentum="momentum")
def torch_sgd(
    lr: Scalar = 1e-3,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: "Scalar | None" = None,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    capturable: bool = False,
    storage: AnyStorage = "float32",
) -> Description:
    r"""`torch.optim.SGD`, step for step.

    $$ g \leftarrow \pm g + \lambda\theta, \quad v' = \mu v + (1 - \tau) g \;(\text{first: } v' = g), \quad
       u = v' \;\text{or}\; g + \mu v', \quad \theta' = \theta - \eta u $$

    The first gradient that a parameter receives becomes its buffer undampened, whenever it comes. A parameter whose
    gradient is None is skipped: no decay of its velocity, no weight decay. Under a schedule, a momentum of 0 leaves the
    buffer unchanged, as in PyTorch.

    Args:
      lr: eta, a number in [0, inf), a scalar array or a schedule, as all numbers here.
      momentum: mu in [0, inf); the number 0 keeps no state.
      dampening: tau, finite. As in PyTorch, without effect if there is no momentum.
      weight_decay: lambda in [0, inf), coupled; `update` then needs `params`. None for no decay, PyTorch's 0.
      nesterov: u = g + mu v'.
      maximize: Ascend; the sign is turned before the weight decay is added.
      foreach: Ignored, like the next three: they choose an implementation in PyTorch and change no number.
      differentiable: Ignored; JAX can differentiate through every step.
      fused: Ignored.
      capturable: Ignored.
      storage: How the velocity is stored, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `nesterov` without a momentum or with dampening, as in PyTorch; for
        dampening with a momentum schedule that starts at 0: PyTorch's buffer would begin only later; for a `storage`
        without a momentum to keep.
      TypeError: If an argument is of the wrong type.

    Reference:
      PyTorch 2.13, `torch/optim/sgd.py`.
    """
    check_without_effect(foreach=foreach, differentiable=differentiable, fused=fused, capturable=capturable)
    rule = checked_rule(lr, momentum, dampening, nesterov)
    return Description(rule, lr, l2=checked_decay(weight_decay), maximize=maximize, storage=storage)


def _timm_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(decoupled=True, maximize=True)
    decay = form.decoupled_decay(undampened_rate(form))
    return {**rule_arguments(form), "weight_decay": decay, "maximize": form.maximize}


@dialect(inverse=_timm_arguments, learning_rate="lr", momentum="momentum")
def timm_sgdw(
    lr: Scalar = 1e-3,
    momentum: Scalar = 0.0,
    dampening: Scalar = 0.0,
    weight_decay: "Scalar | None" = None,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    foreach: bool | None = None,
    differentiable: bool = False,
    fused: bool | None = None,
    capturable: bool = False,
    storage: AnyStorage = "float32",
) -> Description:
    r"""The `SGDW` of timm: PyTorch's rule with decoupled weight decay, $\theta' = (1 - \eta\lambda)\theta - \eta u$.

    timm's factory name "sgdw" means `nesterov=True` and momentum 0.9.

    Args:
      lr: eta.
      momentum: mu in [0, inf).
      dampening: tau, see `torch_sgd`.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for no decay.
      nesterov: u = g + mu v'.
      maximize: Ascend.
      foreach: Ignored, see `torch_sgd`.
      differentiable: Ignored.
      fused: Ignored.
      capturable: Ignored.
      storage: How the velocity is stored.

    Raises:
      ValueError: As `torch_sgd`.
      TypeError: If an argument is of the wrong type. `caution` and `corrected_weight_decay` are not arguments here: the
        first depends on the gradient, the second on the constructor's learning rate.

    Reference:
      timm 1.0.31, `timm/optim/sgdw.py`; Loshchilov and Hutter, ICLR 2019, arXiv:1711.05101.
    """
    check_without_effect(foreach=foreach, differentiable=differentiable, fused=fused, capturable=capturable)
    rule = checked_rule(lr, momentum, dampening, nesterov)
    return Description(rule, lr, decoupled=checked_decay(weight_decay), maximize=maximize, storage=storage)


def undampened_rate(form: ConstantForm) -> float:
    """The learning rate where the first gradient enters in full."""
    return form.sum_rate * form.first_gradient


def rule_arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    """The arguments of `checked_rule` where the first gradient enters in full."""
    return {
        "lr": undampened_rate(form),
        "dampening": 1 - 1 / form.first_gradient,
        "momentum": form.decay,
        "nesterov": form.is_nesterov(),
    }


def checked_rule(
    lr: Scalar,
    momentum: Scalar,
    dampening: Scalar,
    nesterov: bool,
    *,
    intake: Callable[[Coefficient, Coefficient], Coefficient] = on_first_step,
) -> Filter | None:
    """PyTorch's rule after PyTorch's checks; `intake(first, then)` is the weight of the gradient with a first step."""
    for name, value in (("lr", lr), ("momentum", momentum)):
        _checks.within(name, value, "[0, inf)")
    _checks.finite("dampening", dampening)
    _checks.flag("nesterov", nesterov)
    damped = not is_zero(dampening)
    if nesterov and (is_zero(momentum) or (damped and _checks.is_number(dampening))):
        raise ValueError(f"nesterov needs a momentum above 0 and dampening 0, got {momentum!r} and {dampening!r}")
    if is_zero(momentum):
        return None
    if damped and _starts_at_zero(momentum):
        raise ValueError(f"dampening must be 0 where the momentum starts at 0, got {dampening!r}")
    taken = lift(lambda tau: 1 - tau, dampening)
    return sgd_rule(momentum, intake(1.0, taken) if damped else taken, nesterov)


def sgd_rule(momentum: Scalar, intake: Coefficient, nesterov: bool) -> Filter:
    """The rule v' = momentum v + intake g, u = v' or g + momentum v'; where the momentum is 0, v' = v and u = g."""
    keep: Coefficient = momentum
    if not _checks.is_number(momentum):
        keep = lift(lambda m: m + (m == 0), momentum)
        intake = lift(lambda m, b: (m != 0) * b, momentum, intake)
    if nesterov:
        direct = lift(lambda m, b: 1 + m * b, momentum, intake)
        return Filter(A=keep, B=intake, C=lift(lambda m: m * m, momentum), D=direct)
    return Filter(A=keep, B=intake, C=momentum, D=lift(lambda m, b: b + (m == 0), momentum, intake))


def _starts_at_zero(momentum: Scalar) -> bool:
    """Whether a schedule is known to be 0 at step 0."""
    return callable(momentum) and is_zero(momentum(0))
