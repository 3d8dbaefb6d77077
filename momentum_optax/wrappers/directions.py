"""Directions after a rule: of unit norm, saturated, orthogonal."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._tree import path_name, reboxed, unboxed
from .._typing import PyTree
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


def orthogonalize(steps: int | None = None) -> optax.GradientTransformation:
    r"""The nearest semi-orthogonal matrix to each update, by Optax's Newton-Schulz iteration: Muon's direction.

    With $X_0 = u / (\|u\|_F + 10^{-8})$, $X \leftarrow a X + (b A + c A^2) X$, $A = X X^T$, and (a, b, c) = (3.4445,
    -4.7750, 2.0315). Five steps bring singular values of $X_0$ from [0.01, 1] to [0.68, 1.14]; they need not converge.

    Args:
      steps: The number of iterations, a whole number of at least 1 that is known now; 5 if None.

    Returns:
      A transformation without state, for matrices; the arithmetic is in the update's dtype. None stays None.

    Raises:
      TypeError: If `steps` is not a whole number.
      ValueError: If `steps` is out of range; at `init` and `update` if a leaf is not a matrix: give others to
        `optax.partition`, or leave them out by `optax.masked`.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; `optax.contrib.scale_by_muon`.
    """
    steps = 5 if steps is None else steps
    _checks.integer("steps", steps, 1)

    def matrices(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)

    # With a decay of 0, Optax's Muon is the map that it applies to its average.
    tx = optax.contrib.scale_by_muon(ns_steps=int(steps), beta=0.0, nesterov=False, weight_dimension_numbers=matrices)

    def init(params: optax.Params) -> optax.EmptyState:
        _check_matrices(unboxed(params))
        return optax.EmptyState()

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        bare = unboxed(updates)
        _check_matrices(bare)
        # Optax corrects the bias of its average by a decay to the power of an int32.
        with jax.numpy_dtype_promotion("standard"):
            return reboxed(tx.update(bare, tx.init(bare))[0], updates), state

    return optax.GradientTransformation(init, update)


def _check_matrices(tree: PyTree) -> None:
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        shape = x.shape if hasattr(x, "shape") else jnp.shape(x)
        if len(shape) != 2:
            raise ValueError(
                f"{path_name(path)} must be a matrix, got shape {shape}; give others another "
                'optimizer: optax.partition({"muon": mo.muon(0.02), "adam": optax.adam(3e-4)}, lambda params: '
                'jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adam", params))'
            )


def by_norm(function: ByNorm, updates: optax.Updates, scope: Scope) -> optax.Updates:
    """`function(leaf, largest, root)` for each leaf, where largest times root is the norm of the tree or the leaf."""
    wide = jax.tree.map(lambda x: x.astype(arithmetic_dtype(x.dtype)), updates)
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
