"""Muon: orthogonalised momentum for matrices."""

import jax
import optax

from ..filters import Filter
from ..filters.coefficients import Scalar
from ..rules.mixes import muon_mix
from ..storage._by_leaf import AnyStorage
from ..transform import scale_by_momentum
from ..wrappers.directions import orthogonalize
from .arguments import Mask, descent, rule_of, weight_decay_of


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.95,
    *,
    steps: int | None = None,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Muon, for matrices: the orthogonalised momentum, scaled by their shape.

    $$ \theta' = \theta - \eta \left(\sqrt{\max(1, \tfrac{n}{m})}\;\mathrm{orthogonalize}(u) + \lambda\theta\right) $$

    for u of the rule and $\theta$ of m inputs by n outputs, the layout of Flax and Optax (PyTorch's is transposed).
    The default rule, `muon_mix`, is that of the reference code. `optax.contrib.muon` debiases momentum and gradient by
    their own corrections, which is `momentum=nadam_mix(beta, psi=1e6)`. Other parameters need another optimizer:

        label = lambda params: jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adam", params)
        optax.partition({"muon": mo.muon(0.02), "adam": optax.adam(3e-4)}, label)

    Args:
      learning_rate: eta; the reference code has 0.02.
      momentum: The decay of `muon_mix` in [0, 1), or a rule.
      steps: Newton-Schulz iterations, at least 1, known now; None for the reference code's 5.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for no decay.
      mask: Which parameters decay, see `sgd`.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `mask` without `weight_decay`; at `init` if a leaf is not a matrix;
        at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    return descent(
        learning_rate,
        scale_by_momentum(rule_of(momentum, muon_mix), storage=storage),
        orthogonalize(steps),
        optax.stateless(_scaled_by_shape),
        weight_decay_of(weight_decay, mask),
    )


def _scaled_by_shape(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
    """Each matrix times the square root of its outputs over its inputs, where they are more."""
    del params
    return jax.tree.map(lambda u: max(1.0, u.shape[1] / u.shape[0]) ** 0.5 * u, updates)
