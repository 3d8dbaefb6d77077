"""`compress`: any Optax optimizer, with chosen fields of its state kept in a storage."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import absent, boxes_of, content, in_box, reboxed, to_leaf_states, to_trees, unboxed
from ..state.mismatch import StateMismatchError, check_state
from ..storage import Storage, resolve
from ..storage.protocol import SUPPORTED, EncodeContext, encode_context, is_signed
from ..storage.rows import reaches
from ..storage.slopes import marked, unmarked
from ..storage.zeros import made_of_zeros

# Optax's fields of squares: never negative, and divided by the square root of, so that small ones must not become zero.
SECOND_MOMENTS = frozenset(
    (
        *("nu", "nu_max", "n", "v", "v_row", "v_col", "e_g", "e_x", "sum_of_squares", "grad_sum_sq", "exp_avg_sq"),
        *("grad_sum_of_squares", "sum_sq_diff_grads", "variance_grads_ema"),
    )
)


# The same name for something of either sign: Adan's v is an average of differences of gradients.
SIGNED = {("ScaleByAdanState", "v")}


# A storage learns its scale from what it wrote before; see `seeded`. As many more until it is about right.
_ROUNDS, _SETTLING = 3, 24


Predicate = Callable[[Any, Any], bool]


@serializable
class Kept(NamedTuple):
    """A field of an optimizer's state, kept in a storage.

    Attributes:
      parts: The storage's parts, each a tuple with one tree of the field's structure. Where a leaf is not compressed
        its entries are bool, of the leaf's rank and shape (1, ..., 1).
      plain: A tree of the field's structure: a leaf that is not compressed, as it is; for one that is compressed an
        array of its dtype, of its rank and shape (1, ..., 1).
    """

    parts: Any
    plain: Any


@serializable
class CompressedState(NamedTuple):
    """State of `compress`.

    Attributes:
      step: int32 scalar, the number of updates made; None if no storage reads it.
      inner: The state of the optimizer, with a `Kept` in the place of each chosen field.
    """

    step: Any
    inner: Any


def compress(
    tx: optax.GradientTransformation,
    select: Collection[str] | Mapping[str, str | Storage] | Predicate,
    storage: str | Storage = "int8",
    *,
    second_moments: Collection[str] = SECOND_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Keep chosen fields of an optimizer's state in a storage: read before each update of `tx`, written after it.

        mo.compress(optax.adamw(1e-3), {"mu"})                          # Adam's momentum in one byte
        mo.compress(optax.adamw(1e-3), {"mu": "int8", "nu": "uint8"})   # and its squares in another

    A field is what a NamedTuple in the state of `tx` calls so, at any depth in chains, masks, partitions and injected
    hyperparameters, if it has the parameters' structure. Its float and complex leaves of more than one element are
    kept in the storage; other leaves stay as they are. `tx` sees them in the dtypes that they had at `init`.

    Types: the state keeps the structure and dtypes of `init` even where that of `tx` alone would not. A leaf of the
    state that `tx` replaces by None, as `optax.ema` does where the gradient is None, stays as it is.

    Memory: `init` makes the state of `tx` and then compresses it. Under `jax.jit` the compiler leaves the former out
    where fields start at zero.

    Args:
      tx: Any optimizer.
      select: Names of fields; or a mapping from names to storages, one for each field; or a predicate `(path, leaf)`,
        asked at `init` of each leaf that can be kept, with its key path in the state of `tx`.
      storage: How the chosen fields are kept: a name or an object, as for `scale_by_momentum`. A mapping has its own.
      second_moments: The names of fields that hold squares. They need relative accuracy, so that a storage must be
        fit for them (its `nonnegative` is true). Adan's `v` has either sign and is not meant by its name.

    Returns:
      A transformation whose state is a `CompressedState`.

    Raises:
      TypeError: If an argument is of the wrong type.
      ValueError: If there is no such storage; at `init` if a name matches no field or the predicate no leaf, if
        a field is to be kept in a storage that is not fit for it, or if `tx` has a compressed state already; at
        `update` if the state was kept in another storage (see `convert`).

    Reference:
      Eight-bit states of stateful optimizers: Dettmers et al., ICLR 2022, arXiv:2110.02861.
    """
    _checks.transformation("tx", tx)
    choice = _choice(select, resolve(storage), second_moments)
    run = optax.with_extra_args_support(tx)
    reads_step = any(keep.reads_step for keep in choice.storages())

    def init(params: optax.Params) -> CompressedState:
        state = jax.tree.map(_strong, tx.init(params))
        leaves = zip(jax.tree.leaves(state), made_of_zeros(tx.init, params), strict=False)
        inner = _keep_fields(state, params, choice, {id(x) for x, is_zeros in leaves if is_zeros})
        return CompressedState(jnp.zeros([], jnp.int32) if reads_step else None, inner)

    def update(
        updates: optax.Updates, state: CompressedState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, CompressedState]:
        check_state(state, CompressedState(... if reads_step else None, ...))
        pairs, treedef = flattened(state.inner, is_kept)
        _check_fields(pairs, choice)
        olds = [old for _, old in pairs]
        read = treedef.unflatten([unpacked(old) if is_kept(old) else old for old in olds])
        out, inner = run.update(updates, read, params, **extra)
        news = []
        for i, ((path, old), new) in enumerate(zip(pairs, treedef.flatten_up_to(inner), strict=True)):
            news.append(_rewrite(choice.at(path), old, new, (state.step, i)) if is_kept(old) else _like(new, old))
        step = None if state.step is None else optax.safe_increment(state.step)
        return out, CompressedState(step, treedef.unflatten(news))

    return optax.GradientTransformationExtraArgs(init, update)


def is_kept(x: Any) -> bool:
    """Whether `x` is a field in its stored form."""
    return isinstance(x, Kept)


def flattened(tree: Any, is_leaf: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Pairs of path and leaf, and the structure."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)


def field_name(path: Any) -> str | None:
    """The field of a NamedTuple that `path` passed last."""
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else None


def unpacked(kept: Kept) -> Any:
    """The field as its optimizer knows it."""
    slots, _, treedef = slots_of(kept)
    boxes = zip(boxes_of(kept.plain), boxes_of(kept.parts[0][0]), strict=True)
    return treedef.unflatten(
        [
            in_box(leaf, slot.plain) if is_plain(slot) else in_box(codes, _read(slot))
            for slot, (leaf, codes) in zip(slots, boxes, strict=True)
        ]
    )


def _read(slot: Kept) -> Any:
    """The leaf of a slot that is compressed."""
    dtype = slot.plain.dtype if _has_floats(slot.parts) else unmarked(slot.plain).dtype
    return slot.parts.decode(slot.parts)[0].astype(dtype)


def _written(storage: Storage, slot: Kept, new: Any, write: EncodeContext) -> Kept:
    """The slot with another leaf."""
    parts = storage.encode((new,), slot.parts, write)
    # Codes that have floats beside them are marked there.
    return Kept(parts, slot.plain if _has_floats(parts) else marked(slot.plain, new))


def _has_floats(parts: Any) -> bool:
    return any(jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(parts))


def packed(storage: Storage, tree: Any, chosen: list[bool], number: int, zeros: Collection[int] = frozenset()) -> Kept:
    """The stored form of the field `tree`, whose leaves are `chosen` or not; `number` tells fields apart.

    `zeros` holds the ids of leaves that are known to be zeros: nothing is compiled to find that out.
    """
    some: Any = jax.eval_shape(lambda: storage.init(jax.ShapeDtypeStruct((1,), jnp.float32), 1))
    layout: Any = jax.tree.structure(Kept(some, 0))
    treedef: Any = jax.tree.structure(unboxed(tree))
    slots = []
    for i, (box, keep) in enumerate(zip(boxes_of(tree), chosen, strict=True)):
        leaf = content(box)
        one = (1,) * jnp.ndim(leaf)
        # Each array is made on its own: two that shared a buffer could not be donated.
        if keep:
            parts = storage.init(leaf, 1) if id(leaf) in zeros else seeded(storage, (leaf,), number, i)
            slot = Kept(parts, jnp.zeros(one, leaf.dtype))
        else:
            slot = Kept(jax.tree.map(lambda _, one=one: jnp.zeros(one, bool), some), leaf)
        slots.append(in_box(box, slot))
    kept: Kept = to_trees(slots, treedef, layout)
    return kept


def seeded(storage: Storage, velocities: tuple[Any, ...], *numbers: int) -> Any:
    """The parts of one leaf that hold `velocities`, written for the first time; `numbers` tell leaves apart.

    What a storage writes before it knows a scale is coarse, and in few bits too small by orders of magnitude where a
    leaf has few rows: it is written until the largest value is within reach, again with the scale that this gives, and
    once more for what a storage derives from how well that one fitted.
    """
    fresh = storage.init(velocities[0], len(velocities))
    if isinstance(velocities[0], jax.ShapeDtypeStruct) or not velocities[0].size:
        return fresh
    sizes = [jnp.max(jnp.abs(v)) for v in velocities]
    some: Any = jnp.any(jnp.stack([size != 0 for size in sizes]))
    if not isinstance(some, jax.core.Tracer) and not some:
        return fresh
    # Copies, since a storage may keep what it is given, and the caller its own.
    velocities, parts = tuple(jnp.array(v, copy=True) for v in velocities), fresh

    def write(i: Any, parts: Any) -> Any:
        return storage.encode(
            velocities, parts, encode_context(storage, velocities[0], (-1 - i, *numbers), _gains(sizes))
        )

    count, parts = _settled(write, write(0, parts), velocities)
    for i in range(1, _ROUNDS):
        parts = write(count + i, parts)
    # A velocity of zero has no scale yet: the next write must still be a first one.
    return (
        jax.tree.map(lambda new, old: jnp.where(some, new, old), parts, fresh)
        if isinstance(some, jax.core.Tracer)
        else parts
    )


def _settled(write: Callable[[Any, Any], Any], parts: Any, velocities: tuple[Any, ...]) -> tuple[Any, Any]:
    """How often `parts` were written again until what is read is half as large as it should be, and they."""
    sizes = [jnp.max(jnp.where(jnp.isfinite(v), jnp.abs(v), 0)) for v in velocities]

    def is_short(carry: Any) -> Any:
        count, parts = carry
        read = [jnp.max(jnp.abs(v)) for v in parts.decode(parts)]
        short = [2 * value < size for value, size in zip(read, sizes, strict=True)]
        return (count < _SETTLING) & jnp.stack(short).any()

    def again(carry: Any) -> Any:
        count, parts = carry
        return count + 1, write(count + 1, parts)

    carry = (jnp.int32(0), parts)
    if isinstance(is_short(carry), jax.core.Tracer):
        settled: tuple[Any, Any] = jax.lax.while_loop(is_short, again, carry)
        return settled
    while is_short(carry):
        carry = again(carry)
    return int(carry[0]), carry[1]


def _gains(sizes: list[Any]) -> tuple[Any, ...]:
    """How large each velocity is against the smallest."""
    if len(sizes) == 1:
        return (1.0,)
    known = [(size > 0) & jnp.isfinite(size) for size in sizes]
    least = jnp.min(jnp.stack([jnp.where(ok, size, jnp.inf) for ok, size in zip(known, sizes, strict=True)]))
    return tuple(jnp.where(ok, size / least, 1.0) for ok, size in zip(known, sizes, strict=True))


def is_plain(slot: Kept) -> bool:
    """Whether the leaf of `slot` is not compressed."""
    return bool(jax.tree.leaves(slot.parts)[0].dtype == jnp.bool_)


class _Choice(NamedTuple):
    """What is kept how: `names` to storages, or the leaves of a `predicate` in `storage`."""

    names: dict[str, Storage] | None
    predicate: Any
    storage: Storage
    second_moments: frozenset[str]

    def storages(self) -> list[Storage]:
        return [self.storage] if self.names is None else list(self.names.values())

    def at(self, path: Any) -> Storage:
        """The storage of the field at `path`."""
        return self.storage if self.names is None else self.names[field_name(path) or ""]

    def leaves(self, path: Any, tree: Any) -> list[bool] | None:
        """Which leaves of the field `tree` are kept; None if it is no chosen field."""
        if self.names is not None and field_name(path) not in self.names:
            return None
        pairs = jax.tree_util.tree_leaves_with_path(unboxed(tree))
        may = [_can_be_kept(x) for _, x in pairs]
        if self.names is not None:
            return None if pairs and not any(_is_float(x) for _, x in pairs) else may
        return [m and bool(self.predicate((*path, *p), x)) for m, (p, x) in zip(may, pairs, strict=True)]


def _choice(select: Any, storage: Storage, second_moments: Any) -> _Choice:
    if isinstance(second_moments, str) or not isinstance(second_moments, Collection):
        raise TypeError(f"second_moments must be a collection of names, got {_checks.shown(second_moments)}")
    squares = frozenset(second_moments)
    if isinstance(select, Mapping):
        names = {name: resolve(keep) for name, keep in select.items()}
    elif isinstance(select, Collection) and not isinstance(select, str):
        names = {name: storage for name in sorted(select, key=repr)}
    elif callable(select) and not isinstance(select, type):
        return _Choice(None, select, storage, squares)
    else:
        raise TypeError(
            f"select must be a set of names, a mapping from names or a predicate, got {_checks.shown(select)}"
        )
    if not names:
        raise ValueError(f"select must name at least one field, got {_checks.shown(select)}")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"select must hold names of fields, got {_checks.shown(select)}")
    return _Choice(names, None, storage, squares)


def _keep_fields(state: Any, params: Any, choice: _Choice, zeros: Collection[int]) -> Any:
    """`state` with each chosen field in its stored form; `zeros` as for `packed`."""
    there: list[str] = []
    matched: list[str] = []
    asked: list[bool] = []

    def keep(path: Any, owner: str, tree: Any) -> Any:
        name = field_name(path) or ""
        leaves = jax.tree.leaves(tree)
        if name and (not leaves or any(_is_float(x) for x in leaves)):
            there.append(name)
        chosen = choice.leaves(path, tree)
        # With a predicate every field has the same form, chosen or not: its leaves may be unknown (tree.map_params).
        if chosen is None:
            return tree
        storage = choice.at(path)
        if choice.predicate is None or any(chosen):
            check_fit(storage, name, name in choice.second_moments and (owner, name) not in SIGNED)
        matched.append(name)
        asked.extend(is_chosen for is_chosen, x in zip(chosen, leaves, strict=True) if _can_be_kept(x))
        return packed(storage, tree, chosen, len(matched), zeros)

    state = _map_fields(keep, state, unboxed(params))
    fields = ", ".join(repr(name) for name in dict.fromkeys(there)) or "none"
    missing = ", ".join(repr(name) for name in choice.names or () if name not in matched)
    if missing:
        ours = "velocity" in (choice.names or ()) and any(
            _passes(path, "velocity") for path, _ in flattened(state, None)[0]
        )
        hint = (
            ". A rule keeps its velocity itself: give storage= to scale_by_momentum or mo.sgd instead" if ours else ""
        )
        raise ValueError(
            f"select must name fields of floats that are like the parameters ({fields}), got {missing}{hint}"
        )
    if choice.predicate is not None and asked and not any(asked):
        raise ValueError(f"select must be true of a leaf in one of the fields {fields}, and is false of all")
    return state


def _check_fields(pairs: list[tuple[Any, Any]], choice: _Choice) -> None:
    """Raise unless the fields that a state keeps are those that are chosen by name."""
    kept = {field_name(path) or "" for path, x in pairs if is_kept(x)}
    if choice.names is not None and kept != set(choice.names):
        there, wanted = (", ".join(map(repr, sorted(names))) or "no field" for names in (kept, choice.names))
        raise StateMismatchError(
            f"the state compresses {there}, and this optimizer {wanted}: mo.convert(opt_state, storages, "
            "like=tx.init(params)) makes it fit"
        )


def _map_fields(f: Any, node: Any, params: Any, path: Any = (), owner: str = "") -> Any:
    """`node` with `f(path, class of the NamedTuple around, tree)` for each tree that is like the parameters."""
    if isinstance(node, CompressedState):
        raise ValueError("tx must not be compressed already: give select a mapping for fields in several storages")
    if _is_like(node, params):
        return f(path, owner, node)
    pairs, treedef = flattened(node, lambda x: x is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        return node
    owner = type(node).__name__ if isinstance(node, tuple) and hasattr(node, "_fields") else owner
    children = [_map_fields(f, child, params, (*path, *key), owner) for key, child in pairs]
    return treedef.unflatten(children)


def _passes(path: Any, name: str) -> bool:
    return any(isinstance(key, jax.tree_util.GetAttrKey) and key.name == name for key in path)


def _is_like(node: Any, params: Any) -> bool:
    """Whether `node` has the structure of the bare `params`, where leaves and subtrees may be masked."""
    treedef: Any = jax.tree.structure(unboxed(node), is_leaf=absent)
    leaf: Any = jax.tree.structure(0)
    if treedef == leaf:
        # A lone leaf fits any tree.
        return not absent(node) and bool(leaf == jax.tree.structure(params, is_leaf=absent))
    try:
        treedef.flatten_up_to(params)
    except (ValueError, TypeError):
        return False
    return True


def check_fit(storage: Storage, field: str, squares: bool) -> None:
    """Raise unless `storage` is fit for `field`, which holds `squares` or values of either sign."""
    if squares and not getattr(storage, "nonnegative", False):
        raise ValueError(
            f"{field!r} holds second moments, which are divided by and so need relative accuracy: its storage must be "
            "'float32', 'bfloat16', 'uint8' or an object whose nonnegative is true (or its name left out of "
            f"second_moments, if it holds something else), got {storage!r}"
        )
    if not squares and not is_signed(storage):
        raise ValueError(
            f"{field!r} may hold values of either sign: its storage must keep them (or its name be among "
            f"second_moments, if they are never negative), got {storage!r}"
        )


def _is_float(x: Any) -> bool:
    return str(getattr(x, "dtype", None)) in SUPPORTED


def _can_be_kept(x: Any) -> bool:
    return _is_float(x) and reaches(x.shape, 2, "one element")


def slots_of(kept: Kept) -> tuple[list[Kept], Any, Any]:
    """One `Kept` of arrays per leaf of a `Kept` of trees, with the structures that `to_trees` needs to go back."""
    kept = unboxed(kept)
    layout: Any = jax.tree.structure(Kept(type(kept.parts)(*((0,) * len(field) for field in kept.parts)), 0))
    treedef: Any = jax.tree.structure(kept.plain)
    return to_leaf_states(kept, treedef, layout), layout, treedef


def _rewrite(storage: Storage, old: Kept, tree: Any, numbers: tuple[Any, int]) -> Kept:
    """The stored form of the field `tree` that replaces `old`."""
    if not isinstance(old.parts, storage.state_type):
        got, expected = type(old.parts).__name__, storage.state_type.__name__
        raise StateMismatchError(
            f"the state must be kept as {expected}, got {got}: mo.convert(opt_state, storage, like=tx.init(params)) "
            "changes that"
        )
    slots, layout, treedef = slots_of(old)
    for i, (slot, new) in enumerate(zip(slots, treedef.flatten_up_to(unboxed(tree)), strict=True)):
        if new is None:
            continue
        if is_plain(slot):
            slots[i] = slot._replace(plain=_like(new, slot.plain))
        else:
            write = encode_context(storage, new, (*numbers, i), (1.0,))
            slots[i] = _written(storage, slot, new, write)
    kept: Kept = reboxed(to_trees(slots, treedef, layout), old)
    return kept


def _like(new: Any, old: Any) -> Any:
    """`new` in the dtype of `old`; `old` where there is nothing new."""
    if new is None:
        return old
    if hasattr(old, "dtype") and hasattr(new, "dtype") and new.dtype != old.dtype:
        return jnp.asarray(new, old.dtype)
    return _strong(new)


def _strong(x: Any) -> Any:
    """`x` with a dtype of its own: a weak one, which `jnp.full` for example gives, would change with the first step."""
    return jnp.asarray(x, x.dtype) if getattr(x, "weak_type", False) else x
