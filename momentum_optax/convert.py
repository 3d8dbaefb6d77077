"""`convert`: a live optimizer state from one storage to another."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._tree import boxes_of, in_box, is_live, layout_of, live, reboxed, to_slots, to_trees, unboxed
from .compress import (
    SECOND_MOMENTS,
    SIGNED,
    CompressedState,
    Kept,
    check_fit,
    field_name,
    flattened,
    is_kept,
    is_plain,
    packed,
    seeded,
    slots_of,
    unpacked,
)
from .storage import Storage, resolve
from .transform import MomentumState

# What a mapping calls the velocities of `scale_by_momentum`.
_VELOCITY = "velocity"


def convert(
    opt_state: Any,
    storage: str | Storage | Mapping[str, str | Storage],
    *,
    like: Any = None,
    second_moments: Collection[str] = SECOND_MOMENTS,
) -> Any:
    """Keep the velocities in a running optimizer's state in another storage.

        state = mo.convert(state, "int8")
        tx = mo.sgd(0.1, storage="int8")         # and go on with this one

    The state is that of the new optimizer, with two exceptions that `like` settles: a step that only the old storage
    read is still there (and does no harm), and float64 velocities that went through fewer bytes come back as float32.

    Args:
      opt_state: Any state that holds states of `scale_by_momentum` or `compress`.
      storage: A name or an object, as for `scale_by_momentum`; or a mapping from fields of `compress`, and
        "velocity" for the velocities of `scale_by_momentum`, to one each. What it does not name stays as it is.
      like: What `init` of the new optimizer gives, arrays or `ShapeDtypeStruct`; the result has its structure, shapes
        and dtypes.
      second_moments: The names of fields of `compress` that hold squares, as given to it.

    Returns:
      A state of the same structure, with other parts. A storage that reads a step begins to count at zero if the old
      state did not count.

    Raises:
      ValueError: If there is no such storage; if `opt_state` holds no such state or no such field; if a field
        would go to a storage that is not fit for it; if the result cannot be `like`.
      TypeError: If `storage` is neither of these.
    """
    wanted: Any = {k: resolve(s) for k, s in storage.items()} if isinstance(storage, Mapping) else resolve(storage)
    _check_fit(unboxed(opt_state), wanted, second_moments)
    found: set[str] = set()
    new = _converted(opt_state, wanted, found)
    missing = sorted(set(wanted) - found) if isinstance(wanted, dict) else []
    if missing or not found:
        fields = ", ".join(map(repr, sorted(_fields_of(opt_state)))) or "none"
        asked = ", ".join(map(repr, missing)) or "a state without any"
        raise ValueError(f"opt_state must hold a state of scale_by_momentum or compress (it has {fields}), got {asked}")
    if not is_live(opt_state):
        return new if like is None else reboxed(_fitted(unboxed(new), unboxed(like)), like)
    return live(new if like is None else _in_variables(_fitted(unboxed(new), unboxed(like)), new))


def _flat(tree: Any, is_leaf: Any = None) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree, is_leaf=is_leaf)


def _is_ours(x: Any) -> bool:
    return isinstance(x, MomentumState | CompressedState | Kept)


def _fields_of(state: Any) -> set[str]:
    """The fields that could be converted."""
    names: set[str] = set()
    for path, x in flattened(state, _is_ours)[0]:
        if isinstance(x, CompressedState):
            names |= _fields_of(x.inner)
        elif isinstance(x, MomentumState | Kept):
            names.add(_VELOCITY if isinstance(x, MomentumState) else field_name(path) or "")
    return names


def _check_fit(state: Any, wanted: Any, second_moments: Collection[str]) -> None:
    """Raise unless every field goes to a storage that is fit for it."""
    for name in sorted(_fields_of(state)):
        keep = wanted.get(name) if isinstance(wanted, dict) else wanted
        if keep is None:
            continue
        if name == _VELOCITY:
            check_fit(keep, name, squares=False)
        for path, x in optax.tree.get_all_with_path(state, name):
            if is_kept(x):
                owner = getattr(path[-1], "tuple_name", "")
                check_fit(keep, name, name in second_moments and (owner, name) not in SIGNED)


def _converted(state: Any, wanted: Any, found: set[str]) -> Any:
    """`state` with every velocity in the storage that `wanted` has for it; notes in `found` which there were."""
    pairs, treedef = flattened(state, _is_ours)
    new: list[Any] = []
    for i, (path, x) in enumerate(pairs):
        name = _VELOCITY if isinstance(x, MomentumState) else field_name(path) or ""
        keep = wanted.get(name) if isinstance(wanted, dict) else wanted
        if isinstance(x, CompressedState):
            new.append(_compressed(x, wanted, found))
        elif isinstance(x, MomentumState | Kept) and keep is not None:
            found.add(name)
            new.append(_momentum(x, keep, i) if isinstance(x, MomentumState) else _field(x, keep, i))
        else:
            new.append(x)
    return treedef.unflatten(new)


def _momentum(state: MomentumState, storage: Storage, number: int) -> MomentumState:
    """The state of `scale_by_momentum` with its velocities in `storage`."""
    step = jnp.zeros([], jnp.int32) if state.step is None and storage.reads_step else state.step
    old = unboxed(state.velocity)
    order = len(old[0])
    if not order:
        return state._replace(velocity=storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), 0), step=step)
    treedef: Any = jax.tree.structure(old[0][0])
    rows = map(type(old).decode, to_slots(old, treedef, layout_of(old)))
    written = [seeded(storage, row, number, i) for i, row in enumerate(rows)]
    boxed = [in_box(box, parts) for box, parts in zip(boxes_of(state.velocity[0][0]), written, strict=True)]
    some = jax.eval_shape(lambda: storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), order))
    return state._replace(velocity=to_trees(boxed, treedef, jax.tree.structure(some)), step=step)


def _compressed(state: CompressedState, wanted: Any, found: set[str]) -> CompressedState:
    """The state of `compress` with its fields in other storages."""
    inner = _converted(state.inner, wanted, found)
    keeps = list(wanted.values()) if isinstance(wanted, dict) else [wanted]
    if any(keep.reads_step for keep in keeps):
        step = jnp.zeros([], jnp.int32) if state.step is None else state.step
    else:
        # What a mapping does not name may need the step still.
        names = _fields_of(state.inner) - {_VELOCITY}
        step = None if not isinstance(wanted, dict) or names <= set(wanted) else state.step
    return CompressedState(step, inner)


def _field(kept: Kept, storage: Storage, number: int) -> Kept:
    """A field of `compress` in `storage`."""
    chosen = [not is_plain(slot) for slot in slots_of(kept)[0]]
    return packed(storage, unpacked(kept), chosen, number)


def _in_variables(bare: Any, new: Any) -> Any:
    """Arrays of `bare` in the variables that `new` has at their paths."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(unboxed(new))]
    boxes = dict(zip(paths, boxes_of(new), strict=True))
    return jax.tree_util.tree_map_with_path(lambda path, x: in_box(boxes[path], x), bare)


def _fitted(state: Any, like: Any) -> Any:
    """The bare `state` in the types of `like`, without the steps that it does not have."""

    def is_state(x: Any) -> bool:
        return isinstance(x, MomentumState | CompressedState)

    def fit(x: Any, y: Any) -> Any:
        if not is_state(x) or type(x) is not type(y):
            return x
        x = x._replace(step=None) if y.step is None else x
        return x._replace(inner=_fitted(x.inner, y.inner)) if isinstance(x, CompressedState) else x

    nodes, treedef = _flat(state, is_state)
    others, structure = _flat(like, is_state)
    if treedef == structure:
        state = treedef.unflatten([fit(x, y) for x, y in zip(nodes, others, strict=True)])
    leaves, treedef = _flat(state)
    target, structure = _flat(like)
    if treedef != structure:
        raise ValueError(f"like must have the structure of the new state, {treedef}, got {structure}")
    for x, y in zip(leaves, target, strict=True):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(f"like must have the shapes of the new state, {jnp.shape(x)}, got {jnp.shape(y)}")
    return treedef.unflatten([jnp.asarray(x, y.dtype) for x, y in zip(leaves, target, strict=True)])
