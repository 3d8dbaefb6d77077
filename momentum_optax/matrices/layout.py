"""Layouts: the place of a leaf's matrices among its axes and on the devices of a mesh; equal kinds are stacked."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._typing import DType
from ..distributed.specs import axes_of
from .dimensions import Axes


class Side(NamedTuple):
    """One axis of a leaf, as part of the rows or of the columns of its matrices.

    Attributes:
      size: Its length.
      names: The mesh axes that split it, the major one first.
    """

    size: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Kind:
    """The properties that all matrices of a stack share.

    Attributes:
      rows: The axes along the shorter side of each matrix.
      columns: Those along the longer side.
      batch_names: Mesh axes over which whole matrices are spread.
      dtype: Of the arithmetic, and of what is sent.
    """

    rows: tuple[Side, ...]
    columns: tuple[Side, ...]
    batch_names: tuple[str, ...]
    dtype: DType

    @property
    def sides(self) -> tuple[Side, ...]:
        """Axes of rows and columns, in this order."""
        return self.rows + self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Of each matrix: (m, n), m <= n."""
        return math.prod(side.size for side in self.rows), math.prod(side.size for side in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Mesh axes that split each matrix."""
        return tuple(name for side in self.sides for name in side.names)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of the matrices of a leaf among its axes.

    Attributes:
      kind: The properties that decide with which others they are stacked.
      order: The leaf's axes as batch, rows, columns.
      spec: How the leaf is split.
    """

    kind: Kind
    order: tuple[int, ...]
    spec: PartitionSpec

    def stacked(self, leaf: jax.Array) -> jax.Array:
        """The matrices, or the parts of them that are here: (count, sizes of rows, sizes of columns)."""
        moved = jnp.transpose(leaf, self.order).astype(self.kind.dtype)
        batch = moved.ndim - len(self.kind.sides)
        # Not -1 for the count, which a matrix without elements does not determine.
        return moved.reshape(math.prod(moved.shape[:batch]), *moved.shape[batch:])

    def restored(self, stack: jax.Array, like: jax.Array) -> jax.Array:
        """The leaf of these matrices, with the shape and the dtype of `like`."""
        moved = stack.reshape([like.shape[a] for a in self.order]).astype(like.dtype)
        return jnp.transpose(moved, [self.order.index(a) for a in range(like.ndim)])


def layout_of(shape: tuple[int, ...], axes: Axes, dtype: DType, spec: PartitionSpec, mesh: Mapping[str, int]) -> Layout:
    """The layout of a leaf.

    Args:
      shape: Of the leaf.
      axes: Which of its axes are rows and columns.
      dtype: Of the arithmetic.
      spec: How it is split.
      mesh: The size of each mesh axis.
    """
    # Mesh axes of size 1 split nothing.
    names = [tuple(n for n in entry if mesh[n] > 1) for entry in axes_of(spec, len(shape))]
    inputs, outputs = axes.fans(shape)
    rows, columns = (axes.reduction, axes.output) if inputs <= outputs else (axes.output, axes.reduction)
    row_sides, column_sides = (tuple(Side(shape[a], names[a]) for a in side) for side in (rows, columns))
    kind = Kind(row_sides, column_sides, tuple(sorted(n for a in axes.batch for n in names[a])), dtype)
    return Layout(kind, (*axes.batch, *rows, *columns), spec)
