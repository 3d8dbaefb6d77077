"""TensorFlow 1's `MomentumOptimizer`."""

__all__ = ["tf1_momentum"]

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift
from ..storage._by_leaf import AnyStorage
from .constant_form import ConstantForm
from .description import Description
from .dialect import Hyperparameter, dialect


def _arguments(form: ConstantForm) -> dict[str, Hyperparameter]:
    form.require_linear()
    return {"learning_rate": form.sum_rate, "momentum": form.decay, "use_nesterov": form.is_nesterov()}


@dialect(inverse=_arguments, learning_rate="learning_rate", momentum="momentum")
def tf1_momentum(
    learning_rate: Scalar,
    momentum: Scalar,
    use_nesterov: bool = False,
    *,
    storage: AnyStorage = "float32",
) -> Description:
    r"""`tf.compat.v1.train.MomentumOptimizer`: the learning rate outside the accumulator, unlike in Keras.

    $$ a' = \mu a + g, \qquad \theta' = \theta - \eta a' \;\text{or}\; \theta - \eta g - \eta\mu a' $$

    Args:
      learning_rate: eta.
      momentum: mu in [0, inf), a number, a scalar array or a schedule. At 0 the accumulator is still the last gradient.
      use_nesterov: The second form.
      storage: How the velocity is stored.

    Raises:
      ValueError: If a number is out of range; for `use_nesterov` with momentum 0, where it would do nothing.
      TypeError: If an argument is of the wrong type.

    Reference:
      TensorFlow, `tensorflow/python/training/momentum.py` and the `ApplyMomentum` kernel.
    """
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    _checks.within("momentum", momentum, "[0, inf)")
    _checks.flag("use_nesterov", use_nesterov)
    if use_nesterov and is_zero(momentum):
        raise ValueError(f"use_nesterov needs a momentum above 0, got {momentum!r}")
    after = lift(lambda m: m * m, momentum) if use_nesterov else momentum
    direct = lift(lambda m: 1 + m, momentum) if use_nesterov else 1.0
    return Description(Filter(A=momentum, B=1.0, C=after, D=direct), learning_rate, storage=storage)
