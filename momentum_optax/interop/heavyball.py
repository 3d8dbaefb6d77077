"""HeavyBall's `SGD`."""

__all__ = ["heavyball_sgd"]

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description, checked_decay
from .dialect import Hyperparameter, dialect


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear(decoupled=True)
    form.require_heavy_ball()
    return {"lr": form.sum_rate, "beta": form.decay, "weight_decay": form.decoupled_decay(form.sum_rate)}


@dialect(inverse=_arguments, learning_rate="lr", momentum="beta")
def heavyball_sgd(
    lr: Scalar = 0.0025,
    beta: Scalar = 0.9,
    weight_decay: "Scalar | None" = None,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""HeavyBall's `SGD`: $v' = \beta v + g$, $\theta' = (1 - \eta\lambda)\theta - \eta v'$.

    Args:
      lr: eta.
      beta: In [0, 1].
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for no decay.
      storage: How the velocity is stored; the counterpart of `storage_dtype` there.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type. Caution, MARS, clipping and error correction are not
        arguments here.

    Reference:
      heavyball 3.2.1, `heavyball/__init__.py` and `chainable.py`.
    """
    _checks.within("lr", lr, "[0, inf)")
    _checks.within("beta", beta, "[0, 1]")
    return Description(Filter(A=beta, B=1.0, C=beta, D=1.0), lr, decoupled=checked_decay(weight_decay), storage=storage)
