"""qhoptim's `QHM`."""

__all__ = ["qhoptim_qhm"]

from .. import _checks, rules
from ..filters.coefficients import Scalar
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description, checked_decay
from .dialect import Hyperparameter, dialect


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(l2=True, decoupled=True)
    return {
        "lr": form.gain,
        "momentum": form.decay,
        "nu": form.nu,
        "weight_decay": form.decoupled_decay(form.gain) if form.shrink else form.l2,
        "weight_decay_type": "direct" if form.shrink else "grad",
    }


@dialect(inverse=_arguments, learning_rate="lr", momentum="momentum")
def qhoptim_qhm(
    lr: Scalar,
    momentum: Scalar,
    nu: Scalar,
    weight_decay: "Scalar | None" = None,
    weight_decay_type: str = "grad",
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""`qhoptim.pyt.QHM`: $v' = \beta v + (1-\beta) g$, $\theta' = \theta - \eta [\nu v' + (1-\nu) g]$.

    Args:
      lr: eta, a number in [0, inf), a scalar array or a schedule, as all numbers here.
      momentum: beta in [0, 1).
      nu: Finite.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for no decay.
      weight_decay_type: "grad", coupled, or "direct", decoupled: $\theta \leftarrow (1 - \eta\lambda)\theta$ first.
      storage: How the velocity is stored, see `scale_by_momentum`.

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
    return Description(rules.quasi_hyperbolic(momentum, nu), lr, l2=l2, decoupled=decoupled, storage=storage)
