"""Matrices in parts on the devices of a mesh: sent to where each is whole, and their parts back."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from .layout import Kind, Layout

# Of a batch of matrices (count, m, n), m <= n, of as many of the same shape, each from its own alone. A matrix of more
# rows than columns comes transposed.
Direction: TypeAlias = Callable[[jax.Array], jax.Array]


def directions(
    direction: Direction, leaves: Sequence[jax.Array], layouts: Sequence[Layout], mesh: Mapping[str, int]
) -> list[jax.Array]:
    """The leaves with their matrices replaced by `direction` of them, one call for all matrices of a shape.

    Args:
      direction: Of a batch of whole matrices.
      leaves: Whole ones on one device; within `shard_map` over a mesh their parts.
      layouts: One for each.
      mesh: The size of each mesh axis; empty on one device.
    """
    kinds: dict[Kind, list[int]] = {}
    for i, layout in enumerate(layouts):
        kinds.setdefault(layout.kind, []).append(i)
    stacks = {kind: [layouts[i].stacked(leaves[i]) for i in members] for kind, members in kinds.items()}
    whole = {kind: _gathered(jnp.concatenate(stack), kind, mesh) for kind, stack in stacks.items()}
    new = _by_shape(direction, whole)
    out = list(leaves)
    for kind, members in kinds.items():
        counts = [len(x) for x in stacks[kind]]
        back = _scattered(new[kind], sum(counts), kind, mesh)
        for i, part in zip(members, _split(back, counts), strict=True):
            out[i] = layouts[i].restored(part, leaves[i])
    return out


def _by_shape(direction: Direction, whole: Mapping[Kind, jax.Array]) -> dict[Kind, jax.Array]:
    """`direction` of all matrices of one shape and dtype together."""
    shapes: dict[object, list[Kind]] = {}
    for kind in whole:
        shapes.setdefault((kind.shape, kind.dtype), []).append(kind)
    new: dict[Kind, jax.Array] = {}
    for kinds in shapes.values():
        together = direction(jnp.concatenate([whole[kind] for kind in kinds]))
        new |= zip(kinds, _split(together, [len(whole[kind]) for kind in kinds]), strict=True)
    return new


def _split(x: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """`x` cut along its first axis."""
    return [x] if len(counts) == 1 else _cut(x, tuple(counts))


def _cut_for_platform(x: jax.Array, counts: tuple[int, ...]) -> list[jax.Array]:
    cut = {name: functools.partial(f, counts=counts) for name, f in (("cpu", _cut_alike), ("default", _cut_in_place))}
    parts: list[jax.Array] = jax.lax.platform_dependent(x, **cut)
    return parts


# Compiled outside jit, too, and once for all steps.
_cut = jax.jit(_cut_for_platform, static_argnums=1)


def _cut_in_place(x: jax.Array, counts: tuple[int, ...]) -> list[jax.Array]:
    """The parts as slices, which XLA's TPU backend writes in one operation."""
    ends = itertools.accumulate(counts)
    return [x[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _cut_alike(x: jax.Array, counts: tuple[int, ...]) -> list[jax.Array]:
    """The parts from places that the compiler does not know.

    XLA's CPU backend compiles kernels that are alike once. With its place as a literal each part would have its own.
    """
    places = tuple(jnp.uint32(end - count) for end, count in zip(itertools.accumulate(counts), counts, strict=True))
    # What a loop carries is not evaluated: here the places, turned round twice.
    places = jax.lax.fori_loop(0, 2, lambda _, carried: carried[::-1], places)
    return [jax.lax.dynamic_slice_in_dim(x, place, n) for place, n in zip(places, counts, strict=True)]


def _gathered(stack: jax.Array, kind: Kind, mesh: Mapping[str, int]) -> jax.Array:
    """This device's share of the matrices, whole: (share, m, n), the count being padded with zeros.

    Every device that holds a part sends it to the one that has the matrix in its share. Devices with equal parts, along
    mesh axes that split nothing, share the matrices too, without sending.
    """
    copies, sizes = _copies(kind, mesh), [mesh[name] for name in kind.names]
    devices, equal = math.prod(sizes), math.prod(mesh[name] for name in copies)
    missing = -len(stack) % (devices * equal)
    stack = jnp.concatenate([stack, jnp.zeros((missing, *stack.shape[1:]), stack.dtype)]) if missing else stack
    if equal > 1:
        mine = stack.reshape(equal, len(stack) // equal, *stack.shape[1:])
        stack = jax.lax.dynamic_index_in_dim(mine, jax.lax.axis_index(copies), 0, keepdims=False)
    if devices > 1:
        stack = _sent(lambda x: jax.lax.all_to_all(x, kind.names, 0, 0, tiled=True), stack)
    parts = stack.reshape(*sizes, len(stack) // devices, *stack.shape[1:])
    return jnp.transpose(parts, _interleaved(kind)).reshape(len(stack) // devices, *kind.shape)


def _scattered(whole: jax.Array, count: int, kind: Kind, mesh: Mapping[str, int]) -> jax.Array:
    """The inverse of `_gathered`: the parts of all `count` matrices that belong on this device."""
    copies, sizes = _copies(kind, mesh), [mesh[name] for name in kind.names]
    local = [side.size // math.prod(mesh[name] for name in side.names) for side in kind.sides]
    order = _interleaved(kind)
    shape = [*sizes, len(whole), *local]
    parts = whole.reshape([shape[a] for a in order])
    stack = jnp.transpose(parts, [order.index(a) for a in range(len(order))])
    stack = stack.reshape(math.prod(sizes) * len(whole), *local)
    if sizes:
        stack = _sent(lambda x: jax.lax.all_to_all(x, kind.names, 0, 0, tiled=True), stack)
    if copies:
        stack = _sent(lambda x: jax.lax.all_gather(x, copies, axis=0, tiled=True), stack)
    return stack[:count]


def _sent(collective: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A collective of `x`; floats of two bytes go as integers, which no compiler widens on the way."""
    # As many leaves as devices, some of them transposed: XLA's CPU backend would send them as they lie in memory, each
    # in its own order, and refuses its own program.
    x = jax.lax.optimization_barrier(x)
    if x.dtype.itemsize != 2:
        return collective(x)
    return jax.lax.bitcast_convert_type(collective(jax.lax.bitcast_convert_type(x, jnp.uint16)), x.dtype)


def _copies(kind: Kind, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which devices hold the same parts."""
    return tuple(name for name, size in mesh.items() if size > 1 and name not in (*kind.names, *kind.batch_names))


def _interleaved(kind: Kind) -> list[int]:
    """The order of axes that makes matrices of (parts along each mesh axis, count, sizes of a part).

    The count comes first, then each axis of the matrices behind the mesh axes that split it.
    """
    splits = len(kind.names)
    order, seen = [splits], 0
    for j, side in enumerate(kind.sides):
        order += [*range(seen, seen + len(side.names)), splits + 1 + j]
        seen += len(side.names)
    return order
