"""`partition_matrices`: one optimizer for matrices and another for the other parameters."""

import functools

import jax
import optax

from .. import _checks, _tree
from .._boxes import content
from .._typing import Leaf, PyTree
from ..matrices.dimensions import WeightDimensionNumbers, axes_of_leaves
from ..state.mismatch import StateMismatchError
from ..storage.mixed import codes_of
from ..storage.protocol import check_leaves
from ..transform import MomentumState

MATRICES, OTHERS = "matrices", "others"


class _Missing:
    """A gradient of None as a leaf, where `optax.partition` asks whose it is."""

    def __init__(self, label: str) -> None:
        self.label = label


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
    tx = optax.partition(parts, functools.partial(_labels, weight_dimension_numbers))

    def init(params: optax.Params) -> optax.OptState:
        check_leaves(_tree.unboxed(params))
        return tx.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        velocity = _velocity(state)
        if velocity is not None:
            _check_gradients(updates, velocity)
        if params is not None:
            _tree.paired(updates, params)
        # Optax's partition takes apart trees in the same boxes only.
        here, there = updates, params
        if velocity is not None:
            here = _with_missing(updates, velocity)
            there = None if params is None else _in_boxes_of(here, params)
        out, new = tx.update(here, state, there, **extra)
        return _in_boxes_of(updates, out), new

    return optax.GradientTransformationExtraArgs(init, update)


def _labels(weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree) -> PyTree:
    """Whose each leaf of the gradients or the parameters is."""
    axes = iter(axes_of_leaves(weight_dimension_numbers, _without_missing(_tree.unboxed(tree))))

    def label(leaf: Leaf | _Missing) -> str:
        if isinstance(leaf, _Missing):
            return leaf.label
        return OTHERS if next(axes) is None else MATRICES

    return _tree.map_together(lambda leaves: [label(x) for x in leaves], tree)


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


def _is_masked(x: object) -> bool:
    return isinstance(x, optax.MaskedNode)


def _in_boxes_of(like: PyTree, tree: PyTree) -> PyTree:
    """`tree` in the boxes of `like`, which may be masked in part."""
    return _tree.with_entries(like, _tree.entries(tree))


def _with_missing(updates: optax.Updates, velocity: PyTree) -> optax.Updates:
    """The gradients with `_Missing` for each None of a parameter: the velocity says whose. Boxed if the velocity is."""
    boxes = velocity
    if _is_boxed(updates) and _is_boxed(velocity):
        # NNX has no box around what is masked in a velocity: there the gradient's.
        boxes = jax.tree.map(
            lambda v, u: u if _is_masked(v) and not _tree.absent(content(u)) else v,
            velocity,
            updates,
            is_leaf=lambda x: _tree.is_box(x) or _tree.absent(content(x)),
        )

    def mark(gradient: PyTree, velocity: PyTree) -> PyTree:
        if gradient is not None or velocity is None:
            return gradient
        return _Missing(OTHERS if _tree.absent(velocity) else MATRICES)

    return _tree.with_entries(boxes, map(mark, _tree.entries(updates), _tree.entries(velocity)))


def _is_boxed(tree: PyTree) -> bool:
    return any(map(_tree.is_box, jax.tree.leaves(tree, is_leaf=_tree.is_box)))


def _without_missing(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: None if isinstance(content(x), _Missing) else x, tree, is_leaf=_tree.is_box)


def _given_none(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with None for what is missing."""
    run = optax.with_extra_args_support(tx).update

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        out, new = run(_without_missing(updates), state, params, **extra)
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
