"""`partition_matrices`: one optimizer for matrices and another for the other parameters."""

import jax
import optax

from .. import _checks, _tree
from .._boxes import content
from .._typing import PyTree
from ..matrices.dimensions import WeightDimensionNumbers, axes_of_leaves
from ..state.mismatch import StateMismatchError
from ..storage.mixed import codes_of
from ..storage.protocol import check_leaves
from ..transform import MomentumState

MATRICES, OTHERS = "matrices", "others"


def partition_matrices(
    matrices: optax.GradientTransformation,
    others: optax.GradientTransformation,
    weight_dimension_numbers: WeightDimensionNumbers,
) -> optax.GradientTransformationExtraArgs:
    """`optax.partition` of parameters with dimension numbers and those without.

    A gradient of None keeps the velocity of a matrix, and its update is None. `others` decides what becomes of others.

    Args:
      matrices: The optimizer of matrices, with a velocity.
      others: The optimizer of other parameters.
      weight_dimension_numbers: Which parameters are matrices, see `matrices.on_matrices`.

    Raises:
      TypeError: If `others` is not a transformation; at `init` if a parameter is not of a float or complex dtype.
    """
    _checks.transformation("others", others)

    parts = {MATRICES: _given_none(matrices), OTHERS: _given_none(_told_of_none(others))}

    def of(labels: PyTree) -> optax.GradientTransformationExtraArgs:
        # A function: a tree may be a model that can be called.
        return optax.partition(parts, lambda _: labels)

    def init(params: optax.Params) -> optax.OptState:
        check_leaves(_tree.unboxed(params))
        return of(_labels(weight_dimension_numbers, params)).init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        velocity = _velocity(state)
        if velocity is not None:
            _check_gradients(updates, velocity)
        if params is not None:
            _tree.paired(updates, params)
        # Optax's partition takes apart trees in the same boxes only: those of the velocity, or none.
        if velocity is None:
            like, old = _bare((updates if params is None else params, state))
            labels = _labels(weight_dimension_numbers, like)
        else:
            like, old, labels = velocity, state, _labels_in(velocity)
        there = None if params is None else _in_boxes_of(like, params)
        out, new = of(labels).update(_in_boxes_of(like, updates), old, there, **extra)
        return _in_boxes_of(updates, out), _tree.reboxed(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _labels(weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree) -> PyTree:
    """Whose each leaf of the parameters is."""
    axes = axes_of_leaves(weight_dimension_numbers, _tree.unboxed(tree))
    return _tree.map_together(lambda _: [OTHERS if entry is None else MATRICES for entry in axes], tree)


def _labels_in(velocity: PyTree) -> PyTree:
    """The same, from the velocity of the matrices."""
    labels = (x if x is None else OTHERS if _tree.absent(x) else MATRICES for x in _tree.entries(velocity))
    return _tree.with_entries(velocity, labels)


def _velocity(state: optax.OptState) -> PyTree:
    """The first velocity of the matrices; other parameters are masked in it. None for a rule without."""
    if MATRICES not in state.inner_states:
        # Optax's labels in `optax.contrib.muon`.
        is_optax = state.inner_states.keys() == {"muon", "adam"}
        way_out = "mo.interop.from_optax(tx.init(params), opt_state)" if is_optax else "tx.init(params)"
        raise StateMismatchError(
            f"the state is of a partition into {', '.join(sorted(state.inner_states))}, and this optimizer's into "
            f"{MATRICES}, {OTHERS}: begin with {way_out}"
        )
    found = _tree.find_all(state.inner_states[MATRICES], MomentumState)
    return next((tree for _, node in found for tree in codes_of(node.velocity)), None)


def _check_gradients(updates: optax.Updates, velocity: PyTree) -> None:
    """Raise, with the path, unless the gradients have the structure of a velocity in which some may be masked."""
    got, expected = (
        _tree.unboxed(jax.tree.map(lambda x: 0 if _is_masked(x) else x, tree, is_leaf=_is_masked))
        for tree in (updates, velocity)
    )
    _tree.update_leaves(lambda place, g, old: (g, old), got, expected, _tree.LEAF)


def _bare(tree: PyTree) -> PyTree:
    """The tree without any box, one around nothing neither."""
    return jax.tree.map(content, tree, is_leaf=lambda x: content(x) is not x)


def _is_masked(x: object) -> bool:
    return isinstance(x, optax.MaskedNode)


def _in_boxes_of(like: PyTree, tree: PyTree) -> PyTree:
    """`tree` in the boxes of `like`, which may be masked in part."""
    return _tree.with_entries(like, _tree.entries(tree))


def _given_none(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with a gradient of None out of its box, as structure."""
    run = optax.with_extra_args_support(tx).update

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        bare = jax.tree.map(lambda x: None if content(x) is None else x, updates, is_leaf=_tree.empty)
        out, new = run(bare, state, params, **extra)
        return _in_boxes_of(updates, out), new

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _told_of_none(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with an error that names a gradient of None if it takes none, as Optax's Adam does not."""
    run = optax.with_extra_args_support(tx).update

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        try:
            new: tuple[optax.Updates, optax.OptState] = run(updates, state, params, **extra)
        except (AttributeError, TypeError, ValueError) as error:
            pairs = jax.tree_util.tree_leaves_with_path(updates, is_leaf=lambda x: x is None)
            missing = [_tree.path_name(path) for path, x in pairs if x is None]
            if not missing:
                raise
            raise ValueError(
                f"others takes no gradient of None, got one for {missing[0]}: give zeros, or leave the parameter out "
                "with optax.masked"
            ) from error
        return new

    return optax.GradientTransformationExtraArgs(tx.init, update)
