"""An optimizer in a storage, compared step by step with itself in float32, fed the same gradients and weights."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

# Of an optimizer, and of the same in float32.
States: TypeAlias = tuple[optax.OptState, optax.OptState]


class Figures(NamedTuple):
    """The difference that a storage makes in one step; with axes of seeds and steps, in all of them.

    Attributes:
      leaf_error: The relative error of the velocity after the step, mean over leaves.
      tree_error: That of the whole tree.
      cosine: Between the update and that of float32.
      longest: The largest element of the update.
      longest_exact: That of float32.
    """

    leaf_error: jax.Array
    tree_error: jax.Array
    cosine: jax.Array
    longest: jax.Array
    longest_exact: jax.Array


class Tracked:
    """An optimizer, and beside it the exact one, which sees the same gradients and weights and moves nothing."""

    def __init__(
        self,
        tx: optax.GradientTransformation,
        exact: optax.GradientTransformation,
        velocity: Callable[[optax.OptState], optax.Params],
    ) -> None:
        self.tx, self.exact, self.velocity = tx, exact, velocity

    def init(self, params: optax.Params) -> States:
        """The states of both."""
        return self.tx.init(params), self.exact.init(params)

    def step(
        self, params: optax.Params, state: States, gradients: optax.Updates
    ) -> tuple[optax.Params, States, Figures]:
        """New parameters and states, and how far the two are apart."""
        updates, stored = self.tx.update(gradients, state[0], params)
        expected, exact = self.exact.update(gradients, state[1], params)
        errors = relative_errors(self.velocity(stored), self.velocity(exact))
        longest = (optax.tree.norm(x, ord=jnp.inf) for x in (updates, expected))
        figures = Figures(*errors, cosine(updates, expected), *longest)
        return optax.apply_updates(params, updates), (stored, exact), figures

    def bytes_per_parameter(self, params: optax.Params) -> float:
        """Size of the whole state, as an accelerator holds it, which packs two of int4 into a byte."""
        width = {jnp.dtype(jnp.int4): 0.5}
        state = jax.tree.leaves(jax.eval_shape(self.tx.init, params))
        total = sum(x.size * width.get(x.dtype, x.dtype.itemsize) for x in state)
        return float(total / sum(x.size for x in jax.tree.leaves(params)))


def relative_errors(stored: optax.Updates, exact: optax.Updates) -> tuple[jax.Array, jax.Array]:
    """|stored - exact| / |exact|: mean over leaves, and of the whole tree; 0 where nothing has a velocity yet."""
    norms = jax.tree.map(lambda s, e: jnp.stack([jnp.sum(jnp.square(s - e)), jnp.sum(jnp.square(e))]), stored, exact)
    squares = jnp.stack(jax.tree.leaves(norms))
    squares = jnp.concatenate([squares, squares.sum(0, keepdims=True)])
    ratios = jnp.sqrt(jnp.where(squares[:, 1] > 0, squares[:, 0] / squares[:, 1], 0))
    return ratios[:-1].mean(), ratios[-1]


def cosine(one: optax.Updates, other: optax.Updates) -> jax.Array:
    """Between two trees; 1 where one of them is zero."""
    norms = optax.tree.norm(one) * optax.tree.norm(other)
    return jnp.where(norms > 0, optax.tree.vdot(one, other) / norms, 1)
