"""Steps of a given length along the momentum."""

import optax

from ..filters import Filter
from ..filters.coefficients import Scalar
from ..rules.sums_and_averages import ema
from ..storage._by_leaf import AnyStorage
from ..transform import scale_by_momentum
from ..wrappers.directions import scale_to_unit_norm
from ..wrappers.leaves import Scope
from .arguments import descent, rule_of


def normalized_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.9,
    *,
    scope: Scope = "tree",
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Normalised SGD with momentum: steps of length eta along the average gradient.

    $$ v' = \beta v + (1 - \beta) g, \qquad \theta' = \theta - \eta\, v' / \|v'\| $$

    Args:
      learning_rate: eta, the length of a step (of each leaf's, by leaf).
      momentum: beta in [0, 1), or a rule.
      scope: `"tree"`, the paper's, or `"leaf"`, see `scale_to_unit_norm`.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range or there is no such scope.
      TypeError: If an argument is of the wrong type.

    Reference:
      Cutkosky and Mehta, "Momentum improves normalized SGD", ICML 2020, arXiv:2002.03305.
    """
    return descent(
        learning_rate,
        scale_by_momentum(rule_of(momentum, ema), storage=storage),
        scale_to_unit_norm(scope),
    )
