"""Where an optimizer's state lives: with its parameters, spread further over a data axis, or in the host's memory.

The engine is JAX's own: `jit` with `NamedSharding`. What is here says which part of a state goes where.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .. import _checks, _tree

_WHOLE = PartitionSpec()


def state_shardings(tx: optax.GradientTransformation, params: Any, shardings: Any) -> Any:
    """The shardings of an optimizer's state that follow those of the parameters.

        shardings = mo.sharding.state_shardings(tx, params, params_shardings)
        state = jax.jit(tx.init, out_shardings=shardings)(params)

    A part of the state that belongs to a parameter is split as that is, along each axis that still has the parameter's
    length; scales and other parts of length 1 are whole along those axes, and what belongs to no parameter is whole on
    every device. Works for any chain of Optax and of this package, masks, partitions and compressed states included.

    Args:
      tx: The optimizer.
      params: A tree of arrays or `ShapeDtypeStruct`, in boxes of Flax or not.
      shardings: A tree of `NamedSharding` of the same structure, boxes apart, all on one mesh.

    Returns:
      A tree of `NamedSharding` of the structure of `tx.init(params)`.

    Raises:
      TypeError: If an entry of `shardings` is no `NamedSharding`.
      ValueError: If there is none, or they are on different meshes.
    """
    _checks.transformation("tx", tx)
    mesh = _mesh_of(shardings)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    state = jax.eval_shape(tx.init, shapes)

    def follow(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        return leaf if _tree.empty(leaf) else NamedSharding(mesh, _kept_axes(leaf.shape, param.shape, sharding.spec))

    placed = optax.tree.map_params(
        tx,
        follow,
        *map(_tree.unboxed, (state, shapes, shardings)),
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
        is_leaf=_tree.empty,
    )
    return _tree.reboxed(placed, state)


def zero1(
    tx: optax.GradientTransformation, mesh: Mesh, axis: str, specs: Any = _WHOLE
) -> optax.GradientTransformationExtraArgs:
    """Spread an optimizer's state over a data axis along which parameters and gradients are whole on every device.

        tx = mo.sharding.zero1(mo.sgd(0.1, 0.9), mesh, "data")

    Each device keeps and updates its share of the state, and the updates are gathered: ZeRO's first stage. The share is
    cut along the first axis of a parameter whose length the devices divide; a parameter without one stays whole. For
    use under `jax.jit`, where the partitioner does the rest; the numbers are those of `tx`.

    Args:
      tx: The optimizer.
      mesh: The mesh that parameters and gradients live on.
      axis: The name of its axis to spread over.
      specs: How parameters are split otherwise: one `PartitionSpec` for all, or a tree of them like the parameters.

    Returns:
      A transformation whose state has the structure of that of `tx`.

    Raises:
      TypeError: If `mesh` is no `Mesh`.
      ValueError: If `axis` is none of the mesh's, or `specs` use it already.

    Reference:
      Rajbhandari et al., SC 2020, arXiv:1910.02054.
    """
    _checks.transformation("tx", tx)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {_checks.shown(mesh)}")
    _checks.choice("axis", axis, tuple(mesh.axis_names))
    for spec in jax.tree.leaves(specs, is_leaf=_is_spec):
        if axis in _names_in(spec):
            raise ValueError(f"specs must leave axis {axis!r} free to spread over, got {spec}")
    run = optax.with_extra_args_support(tx)

    def split_of(params: Any) -> tuple[Any, Any]:
        """For each parameter its sharding, and that of its share."""
        bare = _tree.unboxed(params)
        wide = jax.tree.map(lambda _: specs, bare) if _is_spec(specs) else _tree.unboxed(specs)
        whole = _mapped(lambda _, spec: NamedSharding(mesh, spec), bare, wide)
        share = _mapped(lambda p, s: NamedSharding(mesh, _spread(p.shape, s.spec, mesh, axis)), bare, whole)
        return whole, share

    def place(state: Any, params: Any) -> Any:
        return _placed(state, state_shardings(tx, params, split_of(params)[1]))

    def init(params: optax.Params) -> Any:
        return place(tx.init(params), params)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> tuple[optax.Updates, Any]:
        like = updates if params is None else params
        whole, share = split_of(like)
        updates = _placed(updates, share)
        # The parameters' shares too: where an optimizer reads them, as for weight decay, it need read no more.
        local = None if params is None else _placed(params, share)
        updates, state = run.update(updates, state, local, **extra)
        return _placed(updates, whole), place(state, like)

    return optax.GradientTransformationExtraArgs(init, update)


def offloaded(shardings: Any, memory_kind: str = "pinned_host") -> Any:
    """The same shardings in another memory of the devices, such as the host's.

        host = mo.sharding.offloaded(mo.sharding.state_shardings(tx, params, params_shardings))
        state = jax.device_put(state, host)               # and back with the shardings that were given

    Args:
      shardings: A tree of `NamedSharding`, for example from `state_shardings`.
      memory_kind: What the backend calls that memory.

    Returns:
      A tree of `NamedSharding`.

    Raises:
      TypeError: If an entry is no `NamedSharding`.
      ValueError: If there is none, or the devices have no such memory.
    """
    mesh = _mesh_of(shardings)
    kinds = sorted({memory.kind for memory in mesh.devices.flat[0].addressable_memories()})
    _checks.choice("memory_kind", memory_kind, tuple(kinds))
    return jax.tree.map(lambda s: s.with_memory_kind(memory_kind), shardings)


def _mesh_of(shardings: Any) -> Mesh:
    """The one mesh of a tree of shardings."""
    meshes: list[Any] = []
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        if not isinstance(sharding, NamedSharding):
            name = jax.tree_util.keystr(path) or "the root"
            raise TypeError(f"shardings must be NamedShardings, got {_checks.shown(sharding)} at {name}")
        meshes.append(sharding.mesh)
    if not meshes:
        raise ValueError("shardings must hold at least one NamedSharding, got none")
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(f"shardings must be on one mesh, got {len(set(meshes))}")
    mesh: Mesh = meshes[0]
    return mesh


def _placed(tree: Any, shardings: Any) -> Any:
    """`tree` split as `shardings` say: over explicit axes by its type, over others by what XLA is told."""

    def place(x: Any, sharding: NamedSharding) -> Any:
        mesh, axes = sharding.mesh, _axes_of(sharding.spec, x.ndim)
        explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
        if explicit:
            x = jax.sharding.reshard(x, NamedSharding(mesh, _only(axes, explicit)))
        others = set(mesh.axis_names) - explicit
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _only(axes, others))) if others else x

    bare = _mapped(place, _tree.unboxed(tree), _tree.unboxed(shardings))
    return _tree.reboxed(bare, tree)


def _mapped(function: Callable[..., Any], tree: Any, other: Any) -> Any:
    """`function` of the leaves of two trees; what is absent in the first stays so."""
    return jax.tree.map(lambda x, y: x if _tree.empty(x) else function(x, y), tree, other, is_leaf=_tree.empty)


def _only(axes: list[tuple[str, ...]], names: set[str]) -> PartitionSpec:
    """The specification of `axes` without what is not in `names`."""
    return PartitionSpec(*(tuple(n for n in entry if n in names) or None for entry in axes))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _axes_of(spec: PartitionSpec, rank: int) -> list[tuple[str, ...]]:
    """The mesh axes that split each axis of an array."""
    entries = [*spec, *[None] * (rank - len(spec))]
    return [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in entries]


def _names_in(spec: PartitionSpec) -> set[str]:
    return {name for entry in _axes_of(spec, len(spec)) for name in entry}


def _kept_axes(shape: tuple[int, ...], of_param: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    """The specification of a parameter for a part of the state: of its rank, perhaps shorter along some axes."""
    if len(shape) != len(of_param):
        return PartitionSpec()
    axes = _axes_of(spec, len(shape))
    return PartitionSpec(*(a or None if n == m else None for n, m, a in zip(shape, of_param, axes, strict=True)))


def _spread(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, axis: str) -> PartitionSpec:
    """`spec` with `axis` added along the first axis of the array that it divides."""
    axes = _axes_of(spec, len(shape))
    for d, names in enumerate(axes):
        parts = math.prod(mesh.shape[name] for name in (*names, axis))
        if shape[d] and shape[d] % parts == 0:
            axes[d] = (*names, axis)
            break
    return PartitionSpec(*(names or None for names in axes))
