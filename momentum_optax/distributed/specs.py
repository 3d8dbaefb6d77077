"""Partition specifications of the parts of a state, from those of the parameters."""

import math

from jax.sharding import Mesh, PartitionSpec


def restricted(axes: list[tuple[str, ...]], names: set[str]) -> PartitionSpec:
    """The specification of `axes` with only the mesh axes in `names`."""
    return PartitionSpec(*(tuple(n for n in entry if n in names) or None for entry in axes))


def is_spec(x: object) -> bool:
    """Whether `x` is a specification: a leaf in trees of them."""
    return isinstance(x, PartitionSpec)


def axes_of(spec: PartitionSpec, rank: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array."""
    entries = [*spec, *[None] * (rank - len(spec))]
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def names_in(spec: PartitionSpec) -> set[str]:
    """The mesh axes in a specification."""
    return {name for entry in axes_of(spec, len(spec)) for name in entry}


def spec_of_part(shape: tuple[int, ...], of_param: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The specification of a parameter for a part of the state: of its rank, perhaps shorter along some axes."""
    if len(shape) != len(of_param):
        return PartitionSpec()
    axes = axes_of(spec, len(shape))
    return PartitionSpec(*(a or None if n == m else None for n, m, a in zip(shape, of_param, axes, strict=True)))


def spread(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, axis: str) -> PartitionSpec:
    """`spec` with `axis` added along the first axis of the array that it divides."""
    axes = axes_of(spec, len(shape))
    for d, names in enumerate(axes):
        parts = math.prod(mesh.shape[name] for name in (*names, axis))
        if shape[d] and shape[d] % parts == 0:
            axes[d] = (*names, axis)
            break
    return PartitionSpec(*(names or None for names in axes))
