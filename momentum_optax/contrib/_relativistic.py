"""The relativistic heavy ball: steps with a speed limit."""

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from ..filters.coefficients import Scalar
from ..optimizers.gradient_dtype import in_gradient_dtype
from ..rules.sums_and_averages import heavy_ball
from ..storage._by_leaf import AnyStorage
from ..transform import scale_by_momentum
from ..wrappers.directions import by_norm
from ..wrappers.leaves import SCOPES, Scope


def relativistic(
    learning_rate: optax.ScalarOrSchedule,
    decay: Scalar = 0.9,
    delta: Scalar = 1.0,
    *,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""The relativistic heavy ball: no step is longer than $1/\sqrt\delta$, whatever the gradient.

    $$ v' = \mu v - \eta g, \qquad \theta' = \theta + v' / \sqrt{1 + \delta \|v'\|^2} $$

    The learning rate is inside the velocity, so that the speed limit is one of the step itself; delta = 0 is the heavy
    ball. This is the reference code's simple form, not its leapfrog.

    Args:
      learning_rate: eta.
      decay: mu in (-1, 1].
      delta: In [0, inf), a number or a scalar array.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Franca, Sulam, Robinson and Vidal, "Conformal symplectic and relativistic optimization", NeurIPS 2020,
      arXiv:1903.04100.
    """
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            optax.scale_by_learning_rate(learning_rate),
            scale_by_momentum(heavy_ball(decay), storage=storage),
            saturate(delta),
        )
    )


def saturate(delta: Scalar, scope: Scope = "tree") -> optax.GradientTransformation:
    r"""The relativistic velocity of a momentum: $u \leftarrow u / \sqrt{1 + \delta \|u\|^2}$.

    Its norm stays below $1/\sqrt\delta$; it is taken as in `scale_to_unit_norm`.

    Args:
      delta: In [0, inf), a number or a scalar array; 0 changes nothing.
      scope: `"tree"`: one norm for all parameters, as in the reference code. `"leaf"`: one for each leaf.

    Returns:
      A transformation without state. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If `delta` is a schedule or no coefficient.
      ValueError: If a number is out of range or there is no such scope.

    Reference:
      Franca, Sulam, Robinson and Vidal, "Conformal symplectic and relativistic optimization", NeurIPS 2020,
      arXiv:1903.04100.
    """
    _checks.constant("delta", delta, "[0, inf)")
    _checks.choice("scope", scope, SCOPES)

    def slowed(x: jax.Array, largest: jax.Array, root: jax.Array) -> jax.Array:
        return x / jnp.hypot(1.0, jnp.sqrt(jnp.asarray(delta, largest.dtype)) * largest * root)

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        return by_norm(slowed, updates, scope)

    return optax.stateless(update)
