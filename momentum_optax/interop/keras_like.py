"""Dialects of TensorFlow, Keras and Caffe: their own argument names, defaults and errors."""

from typing import TYPE_CHECKING

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift
from ..storage import Storage
from .dialect import Dialect, dialect
from .torch_like import sgd_rule

if TYPE_CHECKING:
    import jax


@dialect
def keras_sgd(
    learning_rate: Scalar = 0.01,
    momentum: "float | jax.Array" = 0.0,
    nesterov: bool = False,
    weight_decay: "float | jax.Array | None" = None,
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    r"""`keras.optimizers.SGD` of Keras 3: the learning rate inside the velocity.

    $$ v' = \mu v - \eta g, \qquad \theta' = (1 - \eta\lambda)\theta + v'
       \;\text{or}\; (1 - \eta\lambda)\theta + \mu v' - \eta g $$

    Each gradient keeps the rate of its own step, unlike in PyTorch. The velocity is stored with Keras' sign and scale.
    A variable without a gradient is skipped. With momentum 0, `nesterov` does nothing in Keras; here it is refused.

    Args:
      learning_rate: eta, a number in [0, inf), a scalar array or a schedule.
      momentum: mu, a float in [0, 1] or a scalar array; Keras takes no integer and no schedule.
      nesterov: The second form.
      weight_decay: lambda in [0, inf), decoupled, no schedule; `update` then needs `params`. None for none.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; if `momentum` is no float, as in Keras; for `nesterov` without momentum.
      TypeError: If an argument is of the wrong type. Clipping, averaging and accumulation are transformations of
        Optax's and no arguments here.

    Reference:
      Keras 3.15, `keras/src/optimizers/sgd.py` and `base_optimizer.py`.
    """
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    if not _checks.is_array(momentum) and (not isinstance(momentum, float) or not 0 <= momentum <= 1):
        raise ValueError(f"momentum must be a float in [0, 1] or a scalar array, got {_checks.shown(momentum)}")
    _checks.flag("nesterov", nesterov)
    decay = 0.0 if weight_decay is None else weight_decay
    _checks.constant("weight_decay", decay, "[0, inf)")
    rule = _rule(momentum, nesterov)
    return Dialect(rule, learning_rate, rate_inside=True, decoupled=decay, storage=storage)


@dialect
def tf1_momentum(
    learning_rate: Scalar,
    momentum: Scalar,
    use_nesterov: bool = False,
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    r"""`tf.compat.v1.train.MomentumOptimizer`: the learning rate outside the accumulator, unlike in Keras.

    $$ a' = \mu a + g, \qquad \theta' = \theta - \eta a' \;\text{or}\; \theta - \eta g - \eta\mu a' $$

    Args:
      learning_rate: eta.
      momentum: mu in [0, inf), a number, a scalar array or a schedule. At 0 the accumulator is still the last gradient.
      use_nesterov: The second form.
      storage: How the velocity is kept.

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
    return Dialect(Filter(A=momentum, B=1.0, C=after, D=direct), learning_rate, storage=storage)


@dialect
def caffe_sgd(
    base_lr: Scalar,
    momentum: "float | jax.Array" = 0.0,
    weight_decay: "float | jax.Array | None" = None,
    regularization_type: str = "L2",
    *,
    storage: str | Storage = "float32",
) -> Dialect:
    r"""Caffe's `SGD` solver: $v' = \mu v + \eta (g + \lambda\theta)$, $\theta' = \theta - v'$.

    The learning rate is inside the velocity. The velocity is stored with the opposite sign of Caffe's, downhill.

    Args:
      base_lr: eta, a number in [0, inf), a scalar array or a schedule, which stands for Caffe's `lr_policy`.
      momentum: mu, a number in [0, 1] or a scalar array.
      weight_decay: lambda in [0, inf), coupled, no schedule; `update` then needs `params`. None for none.
      regularization_type: "L2"; Caffe's "L1" is refused.
      storage: How the velocity is kept.

    Raises:
      ValueError: If a number is out of range or the regularization is another.
      TypeError: If an argument is of the wrong type.

    Reference:
      Caffe, `src/caffe/solvers/sgd_solver.cpp` and `src/caffe/proto/caffe.proto`.
    """
    _checks.within("base_lr", base_lr, "[0, inf)")
    _checks.constant("momentum", momentum, "[0, 1]")
    decay = 0.0 if weight_decay is None else weight_decay
    _checks.constant("weight_decay", decay, "[0, inf)")
    _checks.choice("regularization_type", regularization_type, ("L2",))
    return Dialect(_rule(momentum, False), base_lr, rate_inside=True, l2=decay, storage=storage)


def _rule(momentum: Scalar, nesterov: bool) -> Filter | None:
    """The rule of a constant momentum."""
    if nesterov and is_zero(momentum):
        raise ValueError(f"nesterov needs a momentum above 0, got {momentum!r}")
    return None if is_zero(momentum) else sgd_rule(momentum, 1.0, nesterov)
