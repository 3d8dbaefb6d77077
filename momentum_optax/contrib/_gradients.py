"""Leaves of gradients beside those of a second tree: checked, combined, and computed with in float32 or wider."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from .._tree import Leaves, absent, flatten_with_path, path_name, unboxed
from .._typing import Entry, KeyPath, Number, PyTree
from ..storage.protocol import arithmetic_dtype


def matched(updates: optax.Updates, name: str, tree: PyTree) -> list[tuple[KeyPath, Entry, Entry]]:
    """The path of each leaf, the gradient there, and the leaf of `tree`, which must have the same structure.

    Raises:
      ValueError: If it has not, with the paths.
    """
    ours, theirs = (flatten_with_path(unboxed(x), is_leaf=absent) for x in (updates, tree))
    if ours[1] != theirs[1]:
        here, there = ({path_name(path) for path, _ in pairs} for pairs, _ in (ours, theirs))
        raise ValueError(
            f"the gradients and {name} must have one tree, got a difference in "
            f"{', '.join(sorted(here ^ there)) or 'their containers'}"
        )
    return [(path, g, x) for (path, g), (_, x) in zip(ours[0], theirs[0], strict=True)]


def check_shape(path: KeyPath, name: str, leaf: Entry, gradient: Entry) -> None:
    """Raise unless `leaf` has the gradient's shape; a leaf that is absent has None."""
    got, wanted = (None if absent(x) else jnp.shape(x) for x in (leaf, gradient))
    if got != wanted:
        raise ValueError(f"{name} must have the gradient's shape {wanted} at {path_name(path)}, got {got}")


def combined(
    updates: optax.Updates,
    previous_gradient: PyTree,
    function: Callable[[jax.Array, jax.Array, int], jax.Array],
) -> PyTree:
    """`function(gradient, previous gradient, index of the leaf)` for each leaf that is present, in float32 or wider.

    Raises:
      TypeError: Without a `previous_gradient`.
      ValueError: If it has another tree, shape or None than the gradients.
    """
    if previous_gradient is None:
        raise TypeError(
            "previous_gradient must be given to update, the gradient of this batch at the parameters before"
        )
    out = []
    for i, (path, g, p) in enumerate(matched(updates, "previous_gradient", previous_gradient)):
        check_shape(path, "previous_gradient", p, g)
        if absent(g):
            out.append(g)
        else:
            wide_g, wide_p = _widened(g, p)
            out.append(function(wide_g, wide_p, i))
    return Leaves(updates).to_tree(out, updates)


def times(factor: Number, x: jax.Array) -> jax.Array:
    """`factor` times `x`, in float32 or wider."""
    (wide,) = _widened(x)
    return like(factor, wide) * wide


def like(coefficient: Number, x: jax.Array) -> jax.Array:
    """A coefficient in the real dtype of `x`."""
    return jnp.asarray(coefficient, jnp.finfo(x.dtype).dtype)


def _widened(*arrays: jax.Array) -> list[jax.Array]:
    dtype = arithmetic_dtype(*(x.dtype for x in arrays))
    return [x.astype(dtype) for x in arrays]
