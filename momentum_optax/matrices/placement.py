"""The mesh and the split of each leaf: from arguments, explicit axes of types, arrays outside jit, or by assumption."""

import math
from collections.abc import Sequence
from typing import TypeAlias, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from .. import _checks, _tree
from .._tree_arguments import broadcast
from .._typing import KeyPath, PyTree
from ..distributed.specs import axes_of, is_spec, names_in, spread
from .dimensions import Axes

AnyMesh: TypeAlias = Mesh | AbstractMesh


def check_placement(mesh: object, specs: PyTree) -> None:
    """Raise unless `mesh` and `specs` go together, as far as that can be seen without parameters."""
    if mesh is not None and not isinstance(mesh, Mesh | AbstractMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {_checks.shown(mesh)}")
    if specs is not None and mesh is None:
        raise ValueError("specs need the mesh whose axes they name: give mesh= too, got None")
    for spec in jax.tree.leaves(specs, is_leaf=is_spec):
        if isinstance(spec, NamedSharding):
            continue
        if not is_spec(spec):
            raise TypeError(f"specs must hold PartitionSpecs or NamedShardings, got {_checks.shown(spec)}")
        if unknown := names_in(spec) - set(cast(AnyMesh, mesh).axis_names):
            raise ValueError(
                f"specs must name axes of the mesh, {cast(AnyMesh, mesh).axis_names}, got {sorted(unknown)}"
            )


def mesh_of(leaves: Sequence[jax.Array], mesh: AnyMesh | None) -> AnyMesh | None:
    """The mesh of the exchange: the one that was given, else that of types with explicit axes; None on one device."""
    if mesh is not None:
        return mesh if mesh.size > 1 else None
    for leaf in leaves:
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        found = getattr(sharding, "mesh", None)
        if found is not None and AxisType.Explicit in found.axis_types and found.size > 1:
            # Outside jit the array knows the devices.
            placed = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
            return cast(AnyMesh, getattr(placed, "mesh", found))
    return None


def specs_of(
    pairs: Sequence[tuple[KeyPath, jax.Array]], axes: Sequence[Axes], mesh: AnyMesh, specs: PyTree, tree: PyTree
) -> list[PartitionSpec]:
    """The partition of each leaf over the mesh.

    Args:
      pairs: Path and array of each leaf.
      axes: Of the matrices in each.
      mesh: Of the exchange.
      specs: What was given: a specification for all, a tree of them or of `NamedSharding`, or None.
      tree: The bare tree of the leaves.

    Raises:
      ValueError: If `specs` do not fit the tree or the axes of a leaf, or split one into parts of different sizes, with
        its path.
    """
    if specs is None:
        return [_found(leaf, a, mesh) for (_, leaf), a in zip(pairs, axes, strict=True)]
    entries = broadcast("specs", specs, tree, lambda x: is_spec(x) or isinstance(x, NamedSharding))
    given = [x.spec if isinstance(x, NamedSharding) else x for x in entries]
    for (path, leaf), spec in zip(pairs, given, strict=True):
        if len(spec) > leaf.ndim:
            raise ValueError(
                f"specs must have at most as many entries as {_tree.path_name(path)} has axes, {leaf.ndim}, got {spec}"
            )
        for size, names in zip(leaf.shape, axes_of(spec, leaf.ndim), strict=True):
            if parts := size % math.prod(mesh.shape[name] for name in names):
                raise ValueError(
                    f"specs must split {_tree.path_name(path)}, of shape {leaf.shape}, into equal parts, got {spec} "
                    f"over {dict(mesh.shape)}, which leaves {parts} of {size}"
                )
    return given


def _found(leaf: jax.Array, axes: Axes, mesh: AnyMesh) -> PartitionSpec:
    """The partition of a leaf without a given one: from its type or array, or of its rows over the whole mesh."""
    typed = jax.typeof(leaf).sharding
    if AxisType.Explicit in mesh.axis_types and AxisType.Explicit in typed.mesh.axis_types:
        return cast(PartitionSpec, typed.spec)
    if not isinstance(leaf, jax.core.Tracer) and isinstance(getattr(leaf, "sharding", None), NamedSharding):
        sharding = cast(NamedSharding, leaf.sharding)
        if set(sharding.mesh.axis_names) <= set(mesh.axis_names):
            return sharding.spec
    spec = PartitionSpec()
    sides = tuple(1 if a in axes.batch else size for a, size in enumerate(leaf.shape))
    for name in mesh.axis_names:
        spec = spread(sides, spec, cast(Mesh, mesh), name)
    return spec
