"""Stochastic gradient descent with momentum."""

from collections.abc import Sequence

import jax
import optax

from .. import _checks
from .._typing import DType
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero
from ..rules.look_ahead import nesterov, torch_nesterov
from ..rules.sums_and_averages import heavy_ball
from ..schedules import nesterov_convex, restarted
from ..schedules.derived import check_restarts
from ..state.mismatch import without_momentum
from ..storage._by_leaf import AnyStorage
from ..storage._float32 import Float32
from ..transform import scale_by_momentum
from .arguments import Mask, descent, storage_of, weight_decay_of, with_raw_gradient


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter | None" = None,
    nesterov: bool = False,
    accumulator_dtype: DType | None = None,
    *,
    dampening: "Scalar | None" = None,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    maximize: bool = False,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with momentum: `optax.sgd` with PyTorch's options, or with any rule.

    $$ g \leftarrow \pm g + \lambda\theta, \quad v' = \mu v + (1-\tau) g, \quad u = v' \;\text{or}\; g + \mu v',
       \quad \theta' = \theta - \eta u $$

    The first gradient that a leaf receives enters its velocity undampened.

    The first four arguments have the order, the defaults and the meaning of `optax.sgd`. Every numeric argument takes a
    number, a scalar array or a schedule, and `optax.inject_hyperparams` works without `static_args`: arguments left at
    None are not injected. Updates have the gradients' dtypes even where an injected hyperparameter has a wider one.

    Args:
      learning_rate: eta.
      momentum: mu in [0, 1], with PyTorch's meaning; or a rule, such as `mo.nesterov(schedule)`, which then takes no
        `nesterov` and no `dampening`; None or the number 0 for no momentum and no state.
      nesterov: The Nesterov form of PyTorch and Optax (`torch_nesterov`). As in Optax, ignored without a momentum.
      accumulator_dtype: Optax's name for `storage`: None or float32 for "float32", bfloat16 for
        `mo.storage.bfloat16("nearest")`. As in Optax, ignored without a momentum.
      dampening: tau in [0, 1); None for 0.
      weight_decay: lambda in [0, inf): L2, coupled, that is through the momentum as in PyTorch; `update` then needs
        `params`. None for no decay.
      mask: Which parameters decay: a tree of bools like the parameters or a prefix of it, or a function from the
        parameters to one, as in `optax.add_decayed_weights`.
      maximize: Ascend. As in PyTorch the gradient is negated before the weight decay is added, which still shrinks.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; if `dampening` or a `storage` is given without a momentum to act on, or
        `mask` without `weight_decay`; if `dampening` meets `nesterov`, as in PyTorch, or `storage` an
        `accumulator_dtype`; at `init` if `mask` is not like the parameters; at `update` without `params`, or with
        parameters that are not like the gradients, if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `init` if `mask` holds anything but bools.

    Reference:
      `torch.optim.SGD`, `optax.sgd`; Sutskever et al., ICML 2013.
    """
    _checks.flag("maximize", maximize)
    rule = _sgd_rule(momentum, nesterov, dampening)
    velocity_storage = storage_of(storage, "accumulator_dtype", accumulator_dtype)
    if rule is None and not isinstance(velocity_storage, Float32) and accumulator_dtype is None:
        raise ValueError(
            f"storage needs a momentum to keep, got {_checks.shown(storage)} and momentum {_checks.shown(momentum)}"
        )
    tx = descent(
        learning_rate,
        optax.scale(-1.0) if maximize else optax.identity(),
        weight_decay_of(weight_decay, mask),
        without_momentum() if rule is None else scale_by_momentum(rule, storage=velocity_storage),
    )
    return tx if weight_decay is None else with_raw_gradient(tx)


def srsgd(
    learning_rate: optax.ScalarOrSchedule,
    restarts: int | Sequence[int] | jax.Array,
    *,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Scheduled restart SGD: Nesterov's increasing momentum, from zero again at every restart.

    $$ x' = y - \eta g(y), \qquad y' = x' + \tfrac{k}{k + 3} (x' - x), $$

    k counting the steps since the last restart, from 0. The stored parameters are y.

    Args:
      learning_rate: eta.
      restarts: The number of steps from one restart to the next, or the increasing steps at which to restart; numbers
        or an integer array.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Wang et al., "Scheduled restart momentum for accelerated stochastic gradient descent", SIAM J. Imaging Sci. 2022,
      arXiv:2002.10583.
    """
    check_restarts("restarts", restarts)
    return descent(
        learning_rate,
        scale_by_momentum(nesterov(restarted(nesterov_convex(), restarts)), storage=storage),
    )


def _sgd_rule(momentum: "Scalar | Filter | None", nesterov: bool, dampening: "Scalar | None") -> Filter | None:
    """The rule of PyTorch's options; None for no momentum."""
    _checks.flag("nesterov", nesterov)
    damped = dampening is not None and not is_zero(dampening)
    dampening = 0.0 if dampening is None else dampening
    _checks.within("dampening", dampening, "[0, 1)")
    if isinstance(momentum, Filter):
        if nesterov or damped:
            raise ValueError("nesterov and dampening must be left out when momentum is a rule, which includes both")
        return momentum
    if momentum is None or is_zero(momentum):
        if damped:
            raise ValueError(f"dampening needs a momentum in (0, 1], got {_checks.shown(momentum)}")
        return None
    _checks.within("momentum", momentum, "[0, 1]")
    if nesterov:
        if _checks.is_number(dampening) and damped:
            raise ValueError(f"nesterov needs dampening 0, got {_checks.shown(dampening)}")
        # An injected or scheduled dampening, which may be 0 throughout, cannot be refused: it acts.
        return torch_nesterov(momentum, dampening=dampening)
    return heavy_ball(momentum, dampening=dampening, first_step="gradient")
