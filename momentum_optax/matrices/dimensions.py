"""Dimension numbers: the axes of a parameter that are rows and columns of matrices; None where it is not one."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _tree
from .._tree_arguments import broadcast
from .._typing import KeyPath, Leaf, PyTree

# Optax's MuonDimensionNumbers, None, a tree of both like the parameters or their upper part, or a function to one.
WeightDimensionNumbers: TypeAlias = PyTree | Callable[[optax.Params], PyTree]
# What to do about a function that Optax takes for a schedule.
STATIC = "a function must be named in optax.inject_hyperparams(..., static_args='weight_dimension_numbers')"


class Axes(NamedTuple):
    """Axes of a parameter that holds matrices, numbered from 0.

    Attributes:
      batch: Those that count the matrices.
      reduction: Those that are summed over where the matrix is applied: its inputs, Muon's rows.
      output: Its outputs.
    """

    batch: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """The number of inputs and of outputs of each matrix in a parameter of this shape."""
        return math.prod(shape[a] for a in self.reduction), math.prod(shape[a] for a in self.output)


def axes_of_leaves(weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree) -> list[Axes | None]:
    """The axes of each leaf of a bare tree; None for leaves that are not matrices.

    Args:
      weight_dimension_numbers: None takes the leaves with two axes.
      tree: Arrays or shapes; leaves that are left out have no entry.

    Raises:
      TypeError: If an entry is neither Optax's dimension numbers nor None.
      ValueError: If the entries do not fit the tree, with the path of the parameter where it is known.
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    if not pairs:  # nor need it be like the parameters: Optax finds copies of them in a state by a stand-in
        return []
    if weight_dimension_numbers is None:
        return [Axes((), (0,), (1,)) if jnp.ndim(x) == 2 else None for _, x in pairs]
    given = weight_dimension_numbers(tree) if callable(weight_dimension_numbers) else weight_dimension_numbers
    if hasattr(given, "dtype"):
        raise TypeError(
            f"weight_dimension_numbers must be a tree or a function of the parameters, got an array; {STATIC}"
        )
    # Plain tuples of axes, too, for an error that names them.
    entries = broadcast("weight_dimension_numbers", given, tree, lambda x: _is_entry(x) or _is_axes(x))
    return [_axes(path, x, entry) for (path, x), entry in zip(pairs, entries, strict=True)]


def matrices_of(weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree) -> tuple[list[KeyPath], list[Axes]]:
    """Path and axes of each leaf of a bare tree, all of which must be matrices."""
    paths, found = [], []
    axes = axes_of_leaves(weight_dimension_numbers, tree)
    for (path, x), entry in zip(jax.tree_util.tree_leaves_with_path(tree), axes, strict=True):
        if entry is None:
            raise ValueError(
                f"{_tree.path_name(path)} must be a matrix, got shape {jnp.shape(x)}"
                "; give its weight_dimension_numbers, or leave it out: mo.muon has others= for such parameters, and a "
                "chain optax.masked"
            )
        paths.append(path)
        found.append(entry)
    return paths, found


def _is_entry(x: object) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)


def _is_axes(x: object) -> bool:
    return isinstance(x, tuple) and len(x) > 0 and all(isinstance(a, int) or _is_axes(a) for a in x)


def _axes(path: KeyPath, leaf: Leaf, entry: PyTree) -> Axes | None:
    if entry is None:
        return None
    name = _tree.path_name(path)
    if not _is_entry(entry):
        raise TypeError(
            f"weight_dimension_numbers must hold optax.contrib.MuonDimensionNumbers or None, got "
            f"{_checks.shown(entry)} for {name}"
        )
    shape = jnp.shape(leaf)
    rank = len(shape)
    reduction, output = (tuple(a) if isinstance(a, Sequence) else (a,) for a in entry)
    named = [*reduction, *output]
    if not all(isinstance(a, int | np.integer) and -rank <= a < rank for a in named):
        raise ValueError(f"weight_dimension_numbers must name axes of {name}, of shape {shape}, got {_said(entry)}")
    reduction, output = (tuple(a % rank for a in axes) for axes in (reduction, output))
    if not reduction or not output or len({*reduction, *output}) < len(named):
        raise ValueError(
            f"weight_dimension_numbers must name different axes of {name} as reduction and output, at least one each, "
            f"got {_said(entry)} for shape {shape}"
        )
    return Axes(tuple(a for a in range(rank) if a not in named and a - rank not in named), reduction, output)


def _said(entry: PyTree) -> str:
    return f"reduction_axis={entry.reduction_axis!r}, output_axis={entry.output_axis!r}"
