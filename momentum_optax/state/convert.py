"""`convert`: a live optimizer state from one storage to another."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import boxes_of, in_box, is_live, leaf_treedef_of, live, reboxed, to_leaf_states, to_trees, unboxed
from ..storage import Storage, resolve
from ..transform import MomentumState
from ..wrappers.compress import (
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
from .fitting import cast, fitted, forms

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
        tx = mo.sgd(0.1, 0.9, storage="int8")         # and go on with this one

    The state is that of the new optimizer, with two exceptions that `like` settles: a step that only the old storage
    read is still there (and does no harm), and float64 velocities that went through fewer bytes come back as float32.
    What is in that storage already stays, to the bit.

    With `like` the other optimizer may also differ in what is around the velocities or in what its rule looks at:

        tx = mo.sgd(0.1, optax.linear_schedule(0.9, 0.5, 1000))          # a schedule for a running state
        state = mo.convert(state, "float32", like=tx.init(params))

    * a step is taken from `like`, 0 from `init`: schedules and noise begin there. So are the counters of learning-rate
      schedules, what `guarded`, `monitor` and restarts note, and injected hyperparameters, which the state has not.
      The memory of a monitor (`gain`, `mean_lag`) then knows only of the gradients to come;
    * the ages that a first step or dampening reads: a leaf that holds a velocity has its first step behind it. Its age
      is the number of steps counted so far, or 1 if none were; a leaf whose velocities are all zero has age 0;
    * the gains of `debias=True` can be left out, but not added: they depend on the rule and on every step so far;
    * `accumulated` begins a cycle, or must have finished one; its `gradient_step` is the step of schedules;
    * fields of `compress` are packed in `storage` or read in full;
    * a momentum that one side has not begins at zero, or is left out.

    Velocities stay as they are, whatever the rule: one of another order is refused, one of the same order goes on with
    them (`checkpoint.check` with `rules` notices that).

    Args:
      opt_state: Any state that holds states of `scale_by_momentum` or `compress`.
      storage: A name or an object, as for `scale_by_momentum`; or a mapping from fields of `compress`, and
        "velocity" for the velocities of `scale_by_momentum`, to one each. What it does not name stays as it is.
      like: What `init` of the new optimizer gives; the result has its structure, shapes and dtypes. `ShapeDtypeStruct`
        do where nothing is taken from it.
      second_moments: The names of fields of `compress` that hold squares, as given to it.

    Returns:
      A state of the same structure, with other parts. A storage that reads a step begins to count at zero if the old
      state did not count.

    Raises:
      ValueError: If there is no such storage; if `opt_state` holds no such state or no such field; if a field
        would go to a storage that is not fit for it; if the result cannot be `like`, saying why.
      TypeError: If `storage` is neither of these.
    """
    _checks.state("opt_state", opt_state)
    wanted: Any = {k: resolve(s) for k, s in storage.items()} if isinstance(storage, Mapping) else resolve(storage)
    _check_fit(unboxed(opt_state), wanted, second_moments)
    found: set[str] = set()
    new = _converted(opt_state, wanted, found)
    if like is not None:
        new = fitted(unboxed(new), unboxed(like), _Refield(wanted, second_moments, found))
    missing = sorted(set(wanted) - found) if isinstance(wanted, dict) else []
    if missing or not (found or like is not None):
        fields = ", ".join(map(repr, sorted(_fields_of(opt_state)))) or "none"
        asked = ", ".join(map(repr, missing)) or "a state without any"
        raise ValueError(f"opt_state must hold a state of scale_by_momentum or compress (it has {fields}), got {asked}")
    if like is None:
        return live(new) if is_live(opt_state) else new
    return live(_in_variables(new, opt_state)) if is_live(opt_state) else reboxed(new, like)


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
    if forms(state.velocity) == forms(jax.eval_shape(lambda: _written(storage, state.velocity, number))):
        # Nothing to write, and what was written is not rounded once more.
        return state._replace(step=step)
    return state._replace(velocity=_written(storage, state.velocity, number), step=step)


def _written(storage: Storage, velocity: Any, number: int) -> Any:
    """The velocities in `storage`, for the first time."""
    old = unboxed(velocity)
    treedef: Any = jax.tree.structure(old[0][0])
    rows = map(type(old).decode, to_leaf_states(old, treedef, leaf_treedef_of(old)))
    written = [seeded(storage, row, number, i) for i, row in enumerate(rows)]
    boxed = [in_box(box, parts) for box, parts in zip(boxes_of(velocity[0][0]), written, strict=True)]
    some = jax.eval_shape(lambda: storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), len(old[0])))
    return to_trees(boxed, treedef, jax.tree.structure(some))


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
    tree = unpacked(kept)
    if forms(kept) == forms(jax.eval_shape(lambda: packed(storage, tree, chosen, number))):
        return kept
    return packed(storage, tree, chosen, number)


def _in_variables(bare: Any, old: Any) -> Any:
    """Arrays of `bare` in the variables that `old` has at their paths, where it has any."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(unboxed(old))]
    boxes = dict(zip(paths, boxes_of(old), strict=True))
    return jax.tree_util.tree_map_with_path(lambda path, x: in_box(boxes.get(path, x), x), bare)


class _Refield:
    """Fields in the form of `like`, compressed or in full; notes in `found` which were packed."""

    def __init__(self, wanted: Any, second_moments: Collection[str], found: set[str]) -> None:
        self._wanted, self._second_moments, self._found = wanted, second_moments, found

    def __call__(self, owner: str, name: str, old: Any, new: Any) -> Any:
        """The field `old` of a state of class `owner` in the form of `new`; one of them at least is compressed."""
        tree = unpacked(old) if is_kept(old) else old
        if not is_kept(new):
            return cast(tree, new, name)
        if is_kept(old) and forms(old) == forms(new):
            return old
        chosen = [not is_plain(slot) for slot in slots_of(new)[0]]
        self._found.add(name)
        if not any(chosen):
            return Kept(new.parts, cast(tree, new.plain, name))
        storage = self._wanted.get(name) if isinstance(self._wanted, dict) else self._wanted
        if storage is None:
            raise ValueError(f"storage must say how to keep {name!r}, which like compresses, got none for it")
        check_fit(storage, name, name in self._second_moments and (owner, name) not in SIGNED)
        # Fields are told apart by their noise.
        return cast(packed(storage, tree, chosen, len(self._found)), new, name)
