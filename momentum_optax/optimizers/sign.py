"""Optimizers that follow the sign of a momentum."""

import optax

from .. import _checks
from .._typing import DType
from ..filters import before_sign
from ..filters.coefficients import Scalar
from ..rules.mixes import lion_mix
from ..rules.sums_and_averages import ema
from ..storage._by_leaf import AnyStorage
from ..transform import scale_by_momentum
from .arguments import Mask, descent, storage_of, weight_decay_of


def lion(  # noqa: PLR0917  the order of `optax.lion`
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: DType | None = None,
    weight_decay: "Scalar | None" = 1e-3,
    mask: Mask | None = None,
    *,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Lion: the sign of a mix of momentum and gradient, with decoupled weight decay; `optax.lion`.

    $$ u = \mathrm{sign}(\beta_1 v + (1 - \beta_1) g), \quad v' = \beta_2 v + (1 - \beta_2) g, \quad
       \theta' = \theta - \eta (u + \lambda\theta) $$

    Args:
      learning_rate: eta.
      b1: beta_1 in [0, 1), the mix.
      b2: beta_2 in [0, 1), the memory.
      mu_dtype: Optax's name for `storage`, see `accumulator_dtype` of `sgd`.
      weight_decay: lambda in [0, inf), Optax's default; `update` then needs `params`. None for no decay.
      mask: Which parameters decay, see `sgd`.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `mask` without `weight_decay`, or `storage` with `mu_dtype`; at
        `init` if `mask` is not like the parameters; at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `init` if `mask` holds anything but bools.

    Reference:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, arXiv:2302.06675.
    """
    return descent(
        learning_rate,
        scale_by_momentum(lion_mix(b1, b2), storage=storage_of(storage, "mu_dtype", mu_dtype)),
        optax.scale_by_sign(),
        weight_decay_of(weight_decay, mask),
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: Scalar = 0.9,
    accumulator_dtype: DType | None = None,
    *,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: the sign of the average gradient, `optax.signum`, with decoupled weight decay if asked for.

    $$ v' = \beta v + (1 - \beta) g, \qquad \theta' = \theta - \eta (\mathrm{sign}(v') + \lambda\theta) $$

    Args:
      learning_rate: eta.
      beta: In [0, 1).
      accumulator_dtype: Optax's name for `storage`, see `sgd`.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for no decay, as in Optax.
      mask: Which parameters decay, see `sgd`.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `mask` without `weight_decay`, or `storage` with
        `accumulator_dtype`; at `init` if `mask` is not like the parameters; at `update` without `params` if there is a
        weight decay.
      TypeError: If an argument is of the wrong type; at `init` if `mask` holds anything but bools.

    Reference:
      Bernstein et al., "signSGD: compressed optimisation for non-convex problems", ICML 2018, arXiv:1802.04434.
    """
    # The rule calls its decay so, and Optax beta.
    _checks.within("beta", beta, "[0, 1)")
    return descent(
        learning_rate,
        scale_by_momentum(before_sign(ema(beta)), storage=storage_of(storage, "accumulator_dtype", accumulator_dtype)),
        optax.scale_by_sign(),
        weight_decay_of(weight_decay, mask),
    )
