"""Steps that a wrapper takes for some leaves and not for others: conditions, counts and states by leaf."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import LEAF, Leaves, absent, init_leaves, raise_mismatch, reboxed, unboxed
from .._typing import Condition, DType, Entry, KeyPath, Leaf, Number, PyTree
from ..state.mismatch import StateMismatchError
from ..storage.protocol import arithmetic_dtype
from .figures import Figures
from .rule_memory import Memory

Scope: TypeAlias = Literal["tree", "leaf"]
SCOPES = ("tree", "leaf")


def broadcast(leaves: Leaves, each: list[Condition], like: PyTree) -> PyTree:
    """The entries of `each`, one for each leaf, in the shapes of the tree `like`; absent entries stay absent."""
    pairs = zip(each, leaves.of(like), strict=True)
    return leaves.to_tree([x if absent(x) else jnp.broadcast_to(e, x.shape) for e, x in pairs], like)


def select(
    leaves: Leaves, each: list[Condition], shared: Condition, new: optax.OptState, old: optax.OptState
) -> optax.OptState:
    """The state `new` where the condition of a leaf holds, else `old`, with all that belongs to the leaf.

    A subtree of the parameters' structure belongs to the leaves, everything else to `shared`, as the measurements of
    `monitor` do. A condition that is True or False when traced reads no value. An entry that is None in `new` is kept:
    `optax.trace` makes one of the velocity where the gradient is None.
    """

    def pick(path: KeyPath, a: PyTree, b: PyTree) -> PyTree:
        if leaves.fit(a):
            rows = zip(each, leaves.of(b), leaves.of(a), strict=True)
            return leaves.to_tree([x if absent(x) else where(ok, y, x) for ok, y, x in rows], a)
        if isinstance(a, Figures | Memory):
            return jax.tree.map(lambda x, y: where(shared, y, x), a, b)
        if isinstance(shared, bool) and jnp.ndim(a) > 0:
            raise ValueError(
                f"scope must be 'tree' for a state with arrays that belong to no single leaf, got 'leaf' and "
                f"state{jax.tree_util.keystr(path)} of shape {jnp.shape(a)}"
            )
        return where(shared, b, a)

    picked = jax.tree_util.tree_map_with_path(
        pick, unboxed(old), unboxed(new), is_leaf=lambda x: isinstance(x, Figures | Memory) or leaves.fit(x)
    )
    return reboxed(picked, old)


def where(condition: Condition, new: jax.Array | None, old: jax.Array) -> jax.Array:
    """`new` or `old`, of the dtype of `old`; `old` if `new` is None."""
    if condition is False or new is None:
        return old
    new = new if new.dtype == old.dtype else new.astype(old.dtype)
    return new if condition is True else jnp.where(condition, new, old)


def flags(scope: Scope, params: optax.Params, value: Number, dtype: DType) -> PyTree:
    """A scalar, or an entry of the leaf's rank for each leaf."""
    if scope == "tree":
        return jnp.full([], value, dtype)
    return one_per_leaf(params, lambda leaf: jnp.full((1,) * jnp.ndim(leaf), value, dtype))


def one_per_leaf(params: optax.Params, make: Callable[[Leaf], jax.Array]) -> PyTree:
    """A tree like the parameters of what `make` makes of each, in boxes that fit."""
    return init_leaves(lambda _, leaf: make(leaf), params, LEAF)


def check_scope(scope: Scope, counts: PyTree, updates: optax.Updates) -> None:
    """Raise unless the counts of a state have the form that `flags` gives them, for gradients like these."""
    leaves, counts = Leaves(updates), unboxed(counts)
    if scope == "leaf" and not leaves.fit(counts) and jax.tree.structure(counts, is_leaf=absent) != LEAF:
        raise_mismatch(counts, unboxed(updates))
    if jax.tree.structure(counts, is_leaf=absent) != (leaves.treedef if scope == "leaf" else LEAF):
        has = "one count for each leaf" if scope == "tree" else "one count for all leaves"
        raise StateMismatchError(
            f"the state has {has}, and this optimizer scope={scope!r}: mo.convert(opt_state, storage, "
            "like=tx.init(params)) restarts the counts"
        )


def checked_transformation(name: str, tx: object) -> optax.GradientTransformationExtraArgs:
    """`tx` as a transformation that takes extra arguments; raises `TypeError` for anything else."""
    _checks.transformation(name, tx)
    return optax.with_extra_args_support(tx)


def counted(count: jax.Array, happened: Condition) -> jax.Array:
    """One more where it happened."""
    return jnp.where(happened, optax.safe_increment(count), count)


def scalar_loss(value: PyTree, needed_by: str, dtype: DType) -> jax.Array:
    """The loss that `update` was given as `value=`.

    Raises:
      TypeError: If there is none.
      ValueError: If it has axes.
    """
    if value is None:
        raise TypeError(f"value must be the loss, a scalar given to update for {needed_by}, got None")
    if jnp.shape(value) != ():
        raise ValueError(f"value must be a scalar, got shape {jnp.shape(value)}")
    return jnp.asarray(value, dtype)


def squared_norm(leaves: list[Entry], real: DType) -> jax.Array:
    """The squared norm of the leaves that are present, of the dtype `real`; taken in float32 or wider."""
    wide = [x.astype(arithmetic_dtype(x.dtype)) for x in leaves if not absent(x)]
    return sum((jnp.sum(jnp.square(jnp.abs(x))).astype(real) for x in wide), jnp.zeros([], real))
