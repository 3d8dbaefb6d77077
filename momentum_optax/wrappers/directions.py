"""Directions after a rule: of unit norm, saturated."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import as_array
from ..storage.protocol import arithmetic_dtype
from .leaves import SCOPES, Scope

# From a leaf in float32 or wider and its norm, as the largest absolute value times the rest, to the new leaf.
ByNorm: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def scale_to_unit_norm(scope: Scope = "tree") -> optax.GradientTransformation:
    r"""The direction of an update alone: $u \leftarrow u / \|u\|_2$, and zero where u is zero.

    After a rule it makes normalised momentum. The norm is taken in float32 or wider and can neither overflow nor
    underflow.

    Args:
      scope: `"tree"`: one norm for all parameters. `"leaf"`: one for each leaf.

    Returns:
      A transformation without state. Updates keep their dtypes; None stays None.

    Raises:
      ValueError: If there is no such scope.

    Reference:
      Cutkosky and Mehta, "Momentum improves normalized SGD", ICML 2020, arXiv:2002.03305 (the tree); You et al.,
      "Large batch training of convolutional networks", 2017, arXiv:1708.03888 (by layers).
    """
    _checks.choice("scope", scope, SCOPES)

    def update(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
        del params
        return by_norm(lambda x, largest, root: x / largest / root, updates, scope)

    return optax.stateless(update)


def by_norm(function: ByNorm, updates: optax.Updates, scope: Scope) -> optax.Updates:
    """`function(leaf, largest, root)` for each leaf, where largest times root is the norm of the tree or the leaf."""
    updates = jax.tree.map(as_array, updates)
    wide = jax.tree.map(lambda x: x.astype(arithmetic_dtype(x.dtype)), updates)
    # A norm is real, and as wide as the widest leaf, whatever promotion the user allows.
    with jax.numpy_dtype_promotion("standard"):
        if scope == "tree":
            norm = _norm(jax.tree.leaves(wide))
            return jax.tree.map(lambda w, x: function(w, *norm).astype(x.dtype), wide, updates)
        return jax.tree.map(lambda w, x: function(w, *_norm([w])).astype(x.dtype), wide, updates)


def _norm(leaves: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The norm of these leaves as their largest absolute value times the rest."""
    tops = [jnp.max(jnp.abs(x), initial=0.0) for x in leaves]
    top = jnp.max(jnp.stack(tops)) if tops else jnp.float32(0)
    # Squares of numbers of at most 1 do not overflow, and the largest of them is 1.
    largest = jnp.where(top > 0, top, 1)
    squares = sum((jnp.sum(jnp.square(jnp.abs(x / largest))) for x in leaves), jnp.zeros([], largest.dtype))
    return largest, jnp.sqrt(jnp.where(top > 0, squares, 1))
