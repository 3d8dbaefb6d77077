"""Placement of an optimizer's state: with its parameters, spread further over a data axis, or in host memory.

Placement is by `jax.jit` and `NamedSharding`; the functions here return the sharding of each part of a state.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .. import _checks, _tree
from .._tree_arguments import check_entries
from .._typing import KeyPath, Leaf, PyTree, TreeDef
from ..storage._by_leaf import layouts_noted, layouts_replayed
from .specs import axes_of, is_spec, names_in, restricted, spec_of_part, spread

# A tree of `NamedSharding`.
Shardings: TypeAlias = PyTree


_WHOLE = PartitionSpec()


def state_shardings(tx: optax.GradientTransformation, params: optax.Params, shardings: Shardings) -> Shardings:
    """The shardings of an optimizer's state that follow those of the parameters.

        shardings = mo.sharding.state_shardings(tx, params, params_shardings)
        state = jax.jit(tx.init, out_shardings=shardings)(params)

    A part of the state that belongs to a parameter is split as the parameter is, along each axis on which both have the
    same length; scales and other parts of length 1 are replicated along their axes, and what belongs to no parameter is
    replicated on every device. Works for any chain of Optax and of this package, with masks, partitions and compressed
    states.

    Args:
      tx: The optimizer.
      params: A tree of arrays or `ShapeDtypeStruct`, in boxes of Flax or not.
      shardings: A tree of `NamedSharding` of the same structure, boxes apart, all on one mesh.

    Returns:
      A tree of `NamedSharding` of the structure of `tx.init(params)`.

    Raises:
      TypeError: If an entry of `shardings` is not a `NamedSharding`.
      ValueError: If there are no shardings, they are on different meshes, or they are not like the parameters, or split
        more axes than one has, naming the path.
    """
    _checks.transformation("tx", tx)
    mesh = _mesh_of(shardings)
    check_entries("shardings", "NamedShardings", shardings, params, lambda x: isinstance(x, NamedSharding))
    _check_ranks("shardings", _mapped(lambda _, s: s.spec, *map(_tree.unboxed, (params, shardings))), params)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    with layouts_noted() as layouts:
        # A new function each time: JAX caches shapes by function and would not run `tx.init` again.
        state = jax.eval_shape(functools.partial(tx.init), shapes)

    def follow(leaf: Leaf, param: Leaf, sharding: NamedSharding) -> "Leaf | NamedSharding":
        return leaf if _tree.empty(leaf) else NamedSharding(mesh, spec_of_part(leaf.shape, param.shape, sharding.spec))

    with layouts_replayed(layouts):
        placed = optax.tree.map_params(
            tx,
            follow,
            *map(_tree.unboxed, (state, shapes, shardings)),
            transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
            is_leaf=_tree.empty,
        )
    return _tree.reboxed(placed, state)


def zero1(
    tx: optax.GradientTransformation, mesh: Mesh, axis: str, specs: PyTree = _WHOLE
) -> optax.GradientTransformationExtraArgs:
    """Spread an optimizer's state over a data axis along which parameters and gradients are replicated.

        tx = mo.sharding.zero1(mo.sgd(0.1, 0.9), mesh, "data")

    Each device keeps and updates its share of the state, and the updates are gathered: ZeRO's first stage. The share is
    a slice along the first axis of a parameter whose length the number of devices divides; a parameter without such an
    axis stays replicated. For use under `jax.jit`, whose partitioner does the rest; the results are those of `tx`.

    Args:
      tx: The optimizer.
      mesh: The mesh of parameters and gradients.
      axis: The mesh axis to spread over.
      specs: The partitioning of the parameters so far: one `PartitionSpec` for all, or a tree of them.

    Returns:
      A transformation whose state has the structure of that of `tx`.

    Raises:
      TypeError: If `mesh` is not a `Mesh`, or `specs` hold something else than `PartitionSpec`.
      ValueError: If `axis` is not an axis of the mesh; if `specs` use it already, name an axis that the mesh lacks, or
        are not like the parameters, naming the path; at `update` without `params` if a gradient is None.

    Reference:
      Rajbhandari et al., SC 2020, arXiv:1910.02054.
    """
    _checks.transformation("tx", tx)
    _check_spread(mesh, axis, specs)
    run = optax.with_extra_args_support(tx)

    def split_of(params: PyTree) -> tuple[Shardings, Shardings]:
        """For each parameter its sharding, and the sharding of its share."""
        bare, shares = _tree.unboxed(params), zero1_specs(params, mesh, axis, specs)
        each = _spec_of_each(specs, bare)
        whole, share = (_mapped(lambda _, spec: NamedSharding(mesh, spec), bare, tree) for tree in (each, shares))
        return whole, share

    def place(state: optax.OptState, params: PyTree) -> optax.OptState:
        return _placed(state, state_shardings(tx, params, split_of(params)[1]))

    def init(params: optax.Params) -> optax.OptState:
        return place(tx.init(params), params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: object
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        if params is None:
            _check_known(tx, updates, state)
        whole, share = split_of(like)
        updates = _placed(updates, share)
        # The parameters' shares too: an optimizer that reads parameters, as for weight decay, reads no more than these.
        local = None if params is None else _placed(params, share)
        updates, state = run.update(updates, state, local, **extra)
        return _placed(updates, whole), place(state, like)

    return optax.GradientTransformationExtraArgs(init, update)


def zero1_specs(params: optax.Params, mesh: Mesh, axis: str, specs: PyTree = _WHOLE) -> PyTree:
    """The partition of the parameters' shares under `zero1`: the `specs` of an optimizer inside it.

        shares = mo.sharding.zero1_specs(params, mesh, "data", specs)
        tx = mo.sharding.zero1(mo.muon(0.02, mesh=mesh, specs=shares), mesh, "data", specs)

    Args:
      params: Arrays or shapes.
      mesh: See `zero1`.
      axis: See `zero1`.
      specs: See `zero1`.

    Returns:
      A bare tree of `PartitionSpec` like the parameters.

    Raises:
      TypeError: As `zero1`.
      ValueError: As `zero1`.
    """
    _check_spread(mesh, axis, specs)
    bare = _tree.unboxed(params)
    return _mapped(lambda p, spec: spread(jnp.shape(p), spec, mesh, axis), bare, _spec_of_each(specs, bare))


def offloaded(shardings: Shardings, memory_kind: str = "pinned_host") -> Shardings:
    """The same shardings in another memory space of the devices, such as host memory.

        host = mo.sharding.offloaded(mo.sharding.state_shardings(tx, params, params_shardings))
        state = jax.device_put(state, host)               # and back with the shardings that were given

    Args:
      shardings: A tree of `NamedSharding`, for example from `state_shardings`.
      memory_kind: The backend's name of that memory.

    Returns:
      A tree of `NamedSharding`.

    Raises:
      TypeError: If an entry is not a `NamedSharding`.
      ValueError: If there are no shardings, or the devices have no such memory.
    """
    mesh = _mesh_of(shardings)
    kinds = sorted({memory.kind for memory in mesh.devices.flat[0].addressable_memories()})
    _checks.choice("memory_kind", memory_kind, tuple(kinds))
    return jax.tree.map(lambda s: s.with_memory_kind(memory_kind), shardings)


def _mesh_of(shardings: Shardings) -> Mesh:
    """The one mesh of a tree of shardings."""
    meshes: list[Mesh] = []
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        if not isinstance(sharding, NamedSharding):
            name = jax.tree_util.keystr(path) or "the root"
            raise TypeError(f"shardings must be NamedShardings, got {_checks.shown(sharding)} at {name}")
        meshes.append(cast(Mesh, sharding.mesh))
    if not meshes:
        raise ValueError("shardings must hold at least one NamedSharding, got none")
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(f"shardings must be on one mesh, got {len(set(meshes))}")
    return meshes[0]


def _check_spread(mesh: object, axis: str, specs: PyTree) -> None:
    """Raise unless `specs` partition over the mesh and leave `axis` free."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {_checks.shown(mesh)}")
    _checks.choice("axis", axis, tuple(mesh.axis_names))
    for spec in jax.tree.leaves(specs, is_leaf=lambda x: x is None or is_spec(x)):
        if not is_spec(spec):
            raise TypeError(
                f"specs must be a PartitionSpec or a tree of them like the parameters, got {_checks.shown(spec)}: "
                "PartitionSpec() is a parameter that is not split"
            )
        names = names_in(spec)
        if axis in names:
            raise ValueError(f"specs must leave axis {axis!r} free to spread over, got {spec}")
        if unknown := names - set(mesh.axis_names):
            raise ValueError(f"specs must name axes of the mesh, {mesh.axis_names}, got {sorted(unknown)}")


def _spec_of_each(specs: PyTree, bare: PyTree) -> PyTree:
    """The specification of each parameter of a bare tree."""
    if is_spec(specs):
        specs = jax.tree.map(lambda _: specs, bare)
    check_entries("specs", "PartitionSpecs", specs, bare, is_spec)
    specs = _tree.unboxed(specs)
    _check_ranks("specs", specs, bare)
    return specs


def _check_ranks(name: str, specs: PyTree, params: PyTree) -> None:
    """Raise if a specification in the argument `name` has more entries than its parameter has axes."""

    def check(path: KeyPath, p: Leaf, spec: PartitionSpec) -> None:
        if not _tree.empty(p) and len(spec) > jnp.ndim(p):
            raise ValueError(
                f"{name} must have no more entries than a parameter has axes, got {spec} for {_tree.path_name(path)} "
                f"of shape {jnp.shape(p)}"
            )

    jax.tree_util.tree_map_with_path(check, _tree.unboxed(params), specs, is_leaf=_tree.empty)


def _check_known(tx: optax.GradientTransformation, updates: optax.Updates, state: optax.OptState) -> None:
    """Raise if a gradient is None for which the state holds something, where the parameters are not given."""
    pairs = _tree.flatten_with_path(_tree.unboxed(updates), lambda x: x is None)[0]
    missing = [_tree.path_name(path) for path, x in pairs if x is None]
    fresh: TreeDef = jax.tree.structure(jax.eval_shape(tx.init, updates)) if missing else None
    if missing and fresh != jax.tree.structure(state):
        raise ValueError(
            f"update of zero1 needs params where a gradient is None, as for {missing[0]}: its share of the state has "
            "the shape of the parameter"
        )


def _placed(tree: PyTree, shardings: Shardings) -> PyTree:
    """`tree` with these shardings: explicit mesh axes through the types of arrays, others through constraints."""

    def place(x: jax.Array, sharding: NamedSharding) -> jax.Array:
        mesh, axes = sharding.mesh, axes_of(sharding.spec, x.ndim)
        explicit = {n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
        if explicit:
            x = jax.sharding.reshard(x, NamedSharding(mesh, restricted(axes, explicit)))
        others = set(mesh.axis_names) - explicit
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, restricted(axes, others))) if others else x

    bare = _mapped(place, _tree.unboxed(tree), _tree.unboxed(shardings))
    return _tree.reboxed(bare, tree)


def _mapped(function: Callable[..., PyTree], tree: PyTree, other: PyTree) -> PyTree:
    """`function` of the leaves of two trees; leaves that the first leaves out stay out."""
    return jax.tree.map(lambda x, y: x if _tree.empty(x) else function(x, y), tree, other, is_leaf=_tree.empty)
