"""Scales of directions: by the shape of a matrix, and by the recent size of the updates of each output."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._export import serializable
from .._typing import Leaf, Number, PyTree
from ..state.mismatch import ANYTHING, check_state
from ..storage.protocol import arithmetic_dtype, checked_leaf, times
from .dimensions import Axes, WeightDimensionNumbers, matrices_of

# A name, or a factor for matrices of every shape.
Scale: TypeAlias = "Literal['spectral', 'rms'] | Number"
_MOONLIGHT = 0.2


def scale_by_shape(
    scale: Scale = "spectral",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    *,
    consistent_rms: Number | None = None,
) -> optax.GradientTransformation:
    r"""Multiply each matrix by a factor of its inputs and outputs, as Muon does after the orthogonalisation.

    Args:
      scale: "spectral": $\sqrt{\max(1, \mathrm{outputs}/\mathrm{inputs})}$. "rms":
        $0.2 \sqrt{\max(\mathrm{inputs}, \mathrm{outputs})}$, with which the elements have the root mean square of
        AdamW's updates. Or a factor for matrices of every shape.
      weight_dimension_numbers: Which axes are inputs and outputs, see `on_matrices`.
      consistent_rms: Optax's name for "rms" with another number than 0.2; `scale` is then left out.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If a number is out of range, there is no such scale, or both are given.

    Reference:
      Jordan et al., 2024; Liu et al., "Muon is scalable for LLM training", 2025, arXiv:2502.16982;
      `optax.contrib.muon`.
    """
    factor = _factor_of(scale, consistent_rms)

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        _, axes = matrices_of(weight_dimension_numbers, _tree.unboxed(updates))

        def scaled(leaves: list[jax.Array]) -> list[jax.Array]:
            return [times(x, factor(*a.fans(x.shape))) for x, a in zip(leaves, axes, strict=True)]

        return _tree.map_together(scaled, updates)

    return optax.stateless(update)


def _factor_of(scale: Scale, consistent_rms: Number | None) -> Callable[[int, int], Number]:
    """The factor as a function of inputs and outputs."""
    if consistent_rms is not None:
        _checks.constant("consistent_rms", consistent_rms, "[0, inf)")
        if not (isinstance(scale, str) and scale == "spectral"):
            raise ValueError(f"consistent_rms is a scale: leave out scale, got {_checks.shown(scale)}")
        return lambda inputs, outputs: max(inputs, outputs) ** 0.5 * consistent_rms
    if not isinstance(scale, str):
        _checks.constant("scale", scale, "[0, inf)")
        return lambda inputs, outputs: scale
    _checks.choice("scale", scale, ("spectral", "rms"))
    if scale == "rms":
        return lambda inputs, outputs: _MOONLIGHT * max(inputs, outputs) ** 0.5
    # A matrix without inputs has no elements.
    return lambda inputs, outputs: max(1.0, outputs / max(inputs, 1)) ** 0.5


@serializable
class NeuronState(NamedTuple):
    """State of `scale_by_neuron`.

    Attributes:
      second_moment: A tree of the average squares, in float32 or wider, of length 1 along the inputs of each matrix.
    """

    second_moment: PyTree


def scale_by_neuron(
    b2: Number = 0.95, weight_dimension_numbers: WeightDimensionNumbers = None, *, eps: Number | None = None
) -> optax.GradientTransformation:
    r"""Divide each neuron's direction by its recent size, the norm of each matrix unchanged: NorMuon's second step.

    $$ w' = \beta_2 w + (1 - \beta_2)\, \mathrm{mean}_{\text{inputs}}(O^2), \qquad
       \hat O = O / (\sqrt{w'} + \epsilon), \qquad u = \hat O\, \|O\|_F / \|\hat O\|_F $$

    Args:
      b2: beta_2 in [0, 1), a number or a scalar array.
      weight_dimension_numbers: Which axes are inputs and outputs, see `on_matrices`; an output is a neuron.
      eps: At least 0; None for 1e-8.

    Returns:
      A transformation whose state holds one number for each neuron. Updates keep their dtypes; None stays None and
      keeps its state.

    Raises:
      TypeError: If an argument is of the wrong type; at `init` if a leaf is not of a float or complex dtype.
      ValueError: If a number is out of range; at `init` and `update` for a leaf without dimension numbers; at `update`
        if a shape is not that of `init`.

    Reference:
      Li et al., "NorMuon: making Muon more efficient and scalable", 2025, arXiv:2510.05491; the authors' and
      Microsoft's `dion.NorMuon`.
    """
    _checks.constant("b2", b2, "[0, 1)")
    eps = 1e-8 if eps is None else eps
    _checks.constant("eps", eps, "[0, inf)")
    treedef = jax.tree.structure(NeuronState(0))

    def init(params: optax.Params) -> NeuronState:
        by_path = _axes_by_path(params)

        def of_leaf(place: _tree.Place, x: Leaf) -> NeuronState:
            x = checked_leaf(place[0], x)
            shape = _shape_of_moment(x, by_path[_tree.path_name(place[0])])
            return NeuronState(jnp.zeros(shape, jnp.finfo(arithmetic_dtype(x.dtype)).dtype))

        return _tree.init_leaves(of_leaf, params, treedef)

    def update(
        updates: optax.Updates, state: NeuronState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, NeuronState]:
        del params
        check_state(state, NeuronState(ANYTHING))
        by_path = _axes_by_path(updates)

        def of_leaf(place: _tree.Place, x: Leaf, old: NeuronState) -> tuple[jax.Array, NeuronState]:
            name = _tree.path_name(place[0])
            _check_shape(name, x, old, by_path[name])
            return _normalized(jnp.asarray(x), old.second_moment, by_path[name], b2, eps)

        return _tree.update_leaves(of_leaf, updates, state, treedef)

    def _axes_by_path(tree: PyTree) -> dict[str, Axes]:
        paths, axes = matrices_of(weight_dimension_numbers, _tree.unboxed(tree))
        return {_tree.path_name(path): a for path, a in zip(paths, axes, strict=True)}

    return optax.GradientTransformation(init, update)


def _shape_of_moment(x: Leaf, axes: Axes) -> tuple[int, ...]:
    return tuple(1 if a in axes.reduction else n for a, n in enumerate(x.shape))


def _check_shape(name: str, x: Leaf, old: NeuronState, axes: Axes) -> None:
    """Raise unless the state of a leaf is of one of its shape."""
    if _shape_of_moment(x, axes) != old.second_moment.shape:
        raise ValueError(
            f"the update for {name} must fit the second moment of shape {old.second_moment.shape}, which has length 1 "
            f"along inputs, got shape {x.shape}"
        )


def _normalized(x: jax.Array, old: jax.Array, axes: Axes, decay: Number, eps: Number) -> tuple[jax.Array, NeuronState]:
    """One leaf of `scale_by_neuron`."""
    wide = x.astype(arithmetic_dtype(x.dtype))
    keep, eps = (jnp.asarray(c, old.dtype) for c in (decay, eps))
    squares = jnp.square(jnp.abs(wide)).astype(old.dtype)
    moment = keep * old + (1 - keep) * jnp.mean(squares, axis=axes.reduction, keepdims=True)
    scale = 1 / (jnp.sqrt(moment) + eps)
    # The norm of what is scaled, from the squares at hand.
    before, after = (
        jnp.sum(s, axis=(*axes.reduction, *axes.output), keepdims=True) for s in (squares, squares * scale * scale)
    )
    ratio = jnp.sqrt(before / jnp.where(after == 0, 1, after))
    return (wide * (scale * ratio)).astype(x.dtype), NeuronState(moment)
