"""Muon and NorMuon: orthogonalised momentum for matrices, another optimizer for other parameters."""

import optax

from .. import _checks, _tree
from .._typing import DType, Number, PyTree
from ..filters import Filter
from ..filters.coefficients import Scalar
from ..matrices.dimensions import WeightDimensionNumbers
from ..matrices.direction import orthogonalize
from ..matrices.newton_schulz import Coefficients, Preconditioning
from ..matrices.placement import AnyMesh
from ..matrices.scales import Scale, scale_by_neuron, scale_by_shape
from ..rules.mixes import muon_mix
from ..storage import resolve
from ..storage._by_leaf import AnyStorage, chooser_of
from ..storage.directions import check_directions
from ..transform import scale_by_momentum
from .arguments import Mask, rule_of, weight_decay_of
from .gradient_dtype import in_gradient_dtype
from .matrices_apart import partition_matrices


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.95,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    steps: int | None = None,
    coefficients: Coefficients = "standard",
    preconditioning: Preconditioning = "frobenius",
    eps: Number | None = None,
    adaptive: bool = False,
    scale: Scale = "spectral",
    consistent_rms: Number | None = None,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    others: optax.GradientTransformation | None = None,
    dtype: DType | None = None,
    mesh: AnyMesh | None = None,
    specs: PyTree = None,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Muon: for matrices the orthogonalised momentum, scaled by their shape; for other parameters another optimizer.

    $$ \theta' = \theta - \eta \left(\sqrt{\max(1, \tfrac{n}{m})}\;\mathrm{orthogonalize}(u) + \lambda\theta\right) $$

    for u of the rule and $\theta$ of m inputs by n outputs, the layout of Flax and Optax (PyTorch's is transposed).
    Embeddings and output layers are matrices too. To give them to the other optimizer, exclude them in
    `weight_dimension_numbers`, by name with `mo.matrices.excluding("embed", "head")`.

    The default rule, `muon_mix`, is that of the reference code. `optax.contrib.muon` debiases momentum and gradient by
    their own corrections, which is `momentum=nadam_mix(beta, psi=1e6)`; its `nesterov=False` is `momentum=ema(beta)`.

    Args:
      learning_rate: eta; the reference code has 0.02. That of the default `others`, too.
      momentum: The decay of `muon_mix` in [0, 1), or a rule.
      weight_dimension_numbers: Which parameters are Muon's, and which of their axes are inputs and outputs, as in
        Optax: `optax.contrib.MuonDimensionNumbers` or None for each, in a tree like the parameters or a prefix of it,
        or a function of the parameters to one. Axes in neither, of stacked layers, heads or experts, count matrices.
        None for the parameters with two axes.
      steps: Newton-Schulz iterations, at least 1, static; None for the reference code's 5.
      coefficients: Of the iterations, see `orthogonalize`.
      preconditioning: What is orthogonalised is first divided by: "frobenius", "spectral", "schatten" or "aol".
      eps: Added to the norm, at least 0; None for 1e-8.
      adaptive: Multiply by the dual norm of u, see `orthogonalize`.
      scale: "spectral", as above; "rms", $0.2\sqrt{\max(m, n)}$ in its place, so that a learning rate of AdamW fits; or
        a factor for all shapes.
      consistent_rms: Optax's name for "rms" with another number than 0.2.
      weight_decay: lambda in [0, inf), decoupled, of Muon's parameters; `update` then needs `params`. None disables it.
      mask: Which of them decay, see `sgd`.
      others: The optimizer of the other parameters, learning rate included; None for Optax's `nadam` at Muon's rate,
        which is what `optax.contrib.muon` does.
      dtype: Of the iterations, and of what devices send; None for the gradients' own.
      mesh: The devices, for parameters split over them: matrices are sent to where they are whole, and back.
      specs: How the parameters are split, see `matrices.on_matrices`, which says what it costs.
      storage: How the velocity of Muon's parameters is kept, see `scale_by_momentum`: "float32" or "bfloat16"; "int8"
        with a warning: the small singular values, which count as much as the large ones, are lost in its rounding.

    Raises:
      ValueError: If a number is out of range, there is no such preset or scale; for `mask` without `weight_decay`, or
        `specs` without `mesh`; if `storage` is int4, or at `init` a function returns it; at `init` if the dimension
        numbers or `mask` do not fit the parameters; at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `init` if `mask` holds anything but bools.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; `optax.contrib.muon`.
    """
    return _descent_of_matrices(
        learning_rate,
        others,
        weight_dimension_numbers,
        _momentum_of(momentum, storage),
        orthogonalize(
            steps,
            weight_dimension_numbers,
            coefficients=coefficients,
            preconditioning=preconditioning,
            eps=eps,
            adaptive=adaptive,
            dtype=dtype,
            mesh=mesh,
            specs=specs,
        ),
        scale_by_shape(scale, weight_dimension_numbers, consistent_rms=consistent_rms),
        weight_decay_of(weight_decay, mask),
    )


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.95,
    b2: Number = 0.95,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    steps: int | None = None,
    coefficients: Coefficients = "standard",
    preconditioning: Preconditioning = "frobenius",
    eps: Number | None = None,
    scale: Scale = "spectral",
    consistent_rms: Number | None = None,
    weight_decay: "Scalar | None" = None,
    mask: Mask | None = None,
    others: optax.GradientTransformation | None = None,
    dtype: DType | None = None,
    mesh: AnyMesh | None = None,
    specs: PyTree = None,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""NorMuon: Muon with the update of each neuron divided by its recent size, the norm of each matrix unchanged.

    $$ O = \mathrm{orthogonalize}(u), \quad w' = \beta_2 w + (1-\beta_2)\,\mathrm{mean}_{\text{inputs}}(O^2), \quad
       \hat O = \frac{O}{\sqrt{w'} + \epsilon}, \quad \theta' = \theta - \eta \left(\sqrt{\max(1, \tfrac{n}{m})}\;
       \frac{\|O\|_F}{\|\hat O\|_F} \hat O + \lambda\theta\right) $$

    The authors' code. Their paper has $0.2\sqrt{mn}$ in place of the root and $\|O\|_F$, which is `scale="rms"` up to
    what the orthogonalisation leaves of $\|O\|_F = \sqrt{\min(m, n)}$.

    Args:
      learning_rate: eta; the authors' code has 0.02.
      momentum: The decay of `muon_mix` in [0, 1), or a rule.
      b2: beta_2 in [0, 1), a number or a scalar array.
      weight_dimension_numbers: Which parameters are NorMuon's, and their axes, see `muon`; an output is a neuron.
      steps: See `muon`.
      coefficients: See `orthogonalize`.
      preconditioning: See `muon`.
      eps: Added to the norm and to the roots, at least 0; None for 1e-8.
      scale: See `muon`.
      consistent_rms: See `muon`.
      weight_decay: See `muon`.
      mask: See `sgd`.
      others: See `muon`.
      dtype: See `muon`.
      mesh: See `muon`.
      specs: See `matrices.on_matrices`.
      storage: See `muon`.

    Raises:
      ValueError: As `muon` does.
      TypeError: If an argument is of the wrong type.

    Reference:
      Li et al., "NorMuon: making Muon more efficient and scalable", 2025, arXiv:2510.05491, and their code.
    """
    return _descent_of_matrices(
        learning_rate,
        others,
        weight_dimension_numbers,
        _momentum_of(momentum, storage),
        orthogonalize(
            steps,
            weight_dimension_numbers,
            coefficients=coefficients,
            preconditioning=preconditioning,
            eps=eps,
            dtype=dtype,
            mesh=mesh,
            specs=specs,
        ),
        scale_by_neuron(b2, weight_dimension_numbers, eps=eps),
        scale_by_shape(scale, weight_dimension_numbers, consistent_rms=consistent_rms),
        weight_decay_of(weight_decay, mask),
    )


def _descent_of_matrices(
    learning_rate: optax.ScalarOrSchedule,
    others: optax.GradientTransformation | None,
    weight_dimension_numbers: WeightDimensionNumbers,
    *transformations: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """A chain of transformations and the learning rate for matrices, and `others` for other parameters."""
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    matrices = optax.chain(*transformations, optax.scale_by_learning_rate(learning_rate))
    others = optax.nadam(learning_rate) if others is None else others
    return in_gradient_dtype(partition_matrices(matrices, others, weight_dimension_numbers))


def _momentum_of(momentum: "Scalar | Filter", storage: AnyStorage) -> optax.GradientTransformationExtraArgs:
    """The momentum, in a storage whose roundings leave a direction to orthogonalise."""
    kept = chooser_of(resolve(storage))
    check_directions(kept.known or ())
    tx = scale_by_momentum(rule_of(momentum, muon_mix), storage=kept)
    if kept.known is not None:
        return tx

    def init(params: optax.Params) -> optax.OptState:
        check_directions(kept.among(_tree.unboxed(params)))
        return tx.init(params)

    return optax.GradientTransformationExtraArgs(init, tx.update)
