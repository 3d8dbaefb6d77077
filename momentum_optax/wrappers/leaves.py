"""The leaves of gradients, and what in an optimizer's state belongs to which: what the wrappers share."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import absent, boxes_of, content, in_box, path_name, reboxed, unboxed
from ..state.mismatch import StateMismatchError
from ..storage.protocol import arithmetic_dtype
from .monitor import Figures, Memory

SCOPES = ("tree", "leaf")


class Leaves:
    """The leaves of a tree of gradients, None and masked ones among them, and what in a state belongs to which."""

    def __init__(self, updates: Any) -> None:
        treedef: Any
        self.values, treedef = jax.tree.flatten(unboxed(updates), is_leaf=absent)
        self.treedef = treedef

    def of(self, tree: Any) -> list[Any]:
        """The leaves of a tree of the same structure, boxed or not."""
        found: list[Any] = self.treedef.flatten_up_to(unboxed(tree))
        return found

    def joined(self, each: list[Any], like: Any) -> Any:
        """The tree with these leaves, boxed as `like` is."""
        return reboxed(self.treedef.unflatten(each), like)

    def standing(self) -> Any:
        """The gradients with a scalar for each None: what a state of full structure can be made of."""
        return self.treedef.unflatten([jnp.zeros([]) if g is None else g for g in self.values])

    def spread(self, each: list[Any], like: Any) -> Any:
        """The entries of `each` in the shapes of the tree `like`; what is absent there stays."""
        pairs = zip(each, self.of(like), strict=True)
        return self.joined([x if absent(x) else jnp.broadcast_to(e, x.shape) for e, x in pairs], like)

    def select(self, each: list[Any], shared: Any, new: Any, old: Any) -> Any:
        """The state `new` where the condition of a leaf holds, else `old`, with all that belongs to the leaf.

        A subtree of the parameters' structure belongs to the leaves, everything else to `shared`, as what `monitor`
        measured does. A condition of True or False, known now, looks at no value.
        """

        def pick(path: Any, a: Any, b: Any) -> Any:
            if self._is_ours(a):
                rows = zip(each, self.of(b), self.of(a), strict=True)
                return self.treedef.unflatten([x if absent(x) else where(ok, y, x) for ok, y, x in rows])
            if isinstance(a, Figures | Memory):
                return jax.tree.map(lambda x, y: where(shared, y, x), a, b)
            if isinstance(shared, bool) and jnp.ndim(a) > 0:
                raise ValueError(
                    f"scope must be 'tree' for a state with arrays that belong to no single leaf, got 'leaf' and "
                    f"state{jax.tree_util.keystr(path)} of shape {jnp.shape(a)}"
                )
            return where(shared, b, a)

        picked = jax.tree_util.tree_map_with_path(
            pick, unboxed(old), unboxed(new), is_leaf=lambda x: isinstance(x, Figures | Memory) or self._is_ours(x)
        )
        return reboxed(picked, old)

    def _is_ours(self, node: Any) -> bool:
        structure: Any = jax.tree.structure(node, is_leaf=absent)
        return bool(structure == self.treedef)


def matched(name: str, tree: Any, updates: Any) -> list[Any]:
    """The leaves of `tree`, which must have the paths and containers of the gradients.

    Raises:
      ValueError: If it has not, with the paths.
    """
    ours: Any
    theirs: Any
    ours, theirs = (jax.tree_util.tree_flatten_with_path(unboxed(x), is_leaf=absent) for x in (updates, tree))
    if ours[1] != theirs[1]:
        here, there = ({path_name(path) for path, _ in pairs} for pairs, _ in (ours, theirs))
        raise ValueError(
            f"the gradients and {name} must have one tree, got a difference in "
            f"{', '.join(sorted(here ^ there)) or 'their containers'}"
        )
    return [x for _, x in theirs[0]]


def check_shape(path: Any, name: str, leaf: Any, gradient: Any) -> None:
    """Raise unless `leaf` has the gradient's shape; a leaf that is absent has None."""
    got, wanted = (None if absent(x) else jnp.shape(x) for x in (leaf, gradient))
    if got != wanted:
        raise ValueError(f"{name} must have the gradient's shape {wanted} at {path_name(path)}, got {got}")


def squared_norm(leaves: list[Any], real: Any) -> jax.Array:
    """The squared norm of the leaves that are there, of the dtype `real`; taken in float32 or wider."""
    wide = [x.astype(arithmetic_dtype(x.dtype)) for x in leaves if not absent(x)]
    return sum((jnp.sum(jnp.square(jnp.abs(x))).astype(real) for x in wide), jnp.zeros([], real))


def where(condition: Any, new: Any, old: Any) -> Any:
    """`new` or `old`, of the dtype of `old`."""
    if condition is False:
        return old
    new = new if new.dtype == old.dtype else new.astype(old.dtype)
    return new if condition is True else jnp.where(condition, new, old)


def flags(scope: str, params: Any, value: Any, dtype: Any) -> Any:
    """A scalar, or an entry of the leaf's rank for each leaf."""
    if scope == "tree":
        return jnp.full([], value, dtype)
    treedef: Any = jax.tree.structure(unboxed(params))
    return treedef.unflatten(
        [in_box(box, jnp.full((1,) * jnp.ndim(content(box)), value, dtype)) for box in boxes_of(params)]
    )


def check_scope(scope: str, counts: Any, leaves: Leaves) -> None:
    """Raise unless the counts of a state are of the form that `flags` gives them."""
    form: Any = jax.tree.structure(counts, is_leaf=absent)
    wanted = leaves.treedef if scope == "leaf" else jax.tree.structure(0)
    if form != wanted:
        has = "one count for each leaf" if scope == "tree" else "one count for all leaves"
        raise StateMismatchError(
            f"the state has {has}, and this optimizer scope={scope!r}: mo.convert(opt_state, storage, "
            "like=tx.init(params)) begins to count anew"
        )


def check_real(path: Any, leaf: Any) -> None:
    """Raise for an update that has no sign."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"the update of {path_name(path)} must be real, got {leaf.dtype}")


def checked_transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    """`tx` as one that takes extra arguments."""
    _checks.transformation(name, tx)
    return optax.with_extra_args_support(tx)


def counted(count: Any, happened: Any) -> Any:
    """One more where it happened."""
    return jnp.where(happened, optax.safe_increment(count), count)
