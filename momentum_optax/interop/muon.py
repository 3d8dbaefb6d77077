"""The two momenta that implementations of Muon orthogonalise."""

__all__ = ["muon_average", "muon_sum"]

from .. import _checks, rules
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description
from .dialect import Hyperparameter, dialect


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    """Of both dialects: the factor 1 - decay between them is removed by the orthogonalisation."""
    form.require_linear(learning_rate=False)
    return {"momentum": form.decay, "nesterov": form.is_nesterov()}


@dialect(inverse=_arguments, learning_rate=None, momentum="momentum")
def muon_average(momentum: Scalar = 0.95, nesterov: bool = True, *, storage: AnyStorage = "float32") -> Description:
    r"""The momentum that `torch.optim.Muon` and Jordan's Muon orthogonalise.

    $$ v' = \mu v + (1-\mu) g, \qquad u = v' \;\text{or}\; \mu v' + (1-\mu) g $$

    The momentum alone, neither scaled by a learning rate nor turned downhill: the orthogonalisation follows in the
    chain. Its iteration differs between libraries by more than the momentum does (coefficients, bfloat16, scaling).

    Args:
      momentum: mu in [0, 1).
      nesterov: The second form.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range; for `nesterov` with momentum 0, where it would do nothing.
      TypeError: If an argument is of the wrong type.

    Reference:
      Jordan et al., 2024; PyTorch 2.13, `torch/optim/_muon.py`.
    """
    _check_muon(momentum, nesterov, "[0, 1)")
    return Description(rules.quasi_hyperbolic(momentum, momentum if nesterov else 1.0), None, storage=storage)


@dialect(inverse=_arguments, learning_rate=None, momentum="momentum")
def muon_sum(momentum: Scalar = 0.95, nesterov: bool = False, *, storage: AnyStorage = "float32") -> Description:
    r"""The momentum that Microsoft's `dion.Muon` orthogonalises: $v' = \mu v + g$, $u = v'$ or $g + \mu v'$.

    At a constant momentum it is `muon_average` over 1 - mu, a factor that the orthogonalisation removes. The momentum
    alone, neither scaled nor turned downhill.

    Args:
      momentum: mu in [0, 1].
      nesterov: The second form.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range; for `nesterov` with momentum 0, where it would do nothing.
      TypeError: If an argument is of the wrong type.

    Reference:
      Ahn et al., "Dion: distributed orthonormalized updates", 2025, arXiv:2504.05295, and its `muon.py`.
    """
    _check_muon(momentum, nesterov, "[0, 1]")
    after = lift(lambda m: m * m, momentum) if nesterov else momentum
    direct = lift(lambda m: 1 + m, momentum) if nesterov else 1.0
    return Description(Filter(A=momentum, B=1.0, C=after, D=direct), None, storage=storage)


def _check_muon(momentum: Scalar, nesterov: bool, interval: str) -> None:
    _checks.within("momentum", momentum, interval)
    _checks.flag("nesterov", nesterov)
    if nesterov and is_zero(momentum):
        raise ValueError(f"nesterov needs a momentum above 0, got {_checks.shown(momentum)}")
