"""A loss as a function of one vector, compiled once."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .. import _checks
from .quadratics import Tuning

if TYPE_CHECKING:
    from .._typing import KeyPath, PyTree

Pair: TypeAlias = tuple[jax.Array, jax.Array]
# From parameters and batch to a real scalar.
Loss: TypeAlias = "Callable[[PyTree, PyTree], jax.Array]"


class Objective:
    """A loss of one vector: its value, compiled products with its Hessian, and compiled runs of Nesterov's rule.

    Attributes:
      start: The parameters as one vector, in float32 or wider.
    """

    def __init__(self, loss: Loss, params: "PyTree", batch: "PyTree") -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of params and batch, got {_checks.shown(loss)}")
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, batch))):
            raise TypeError("params and batch must have values that are known now, got traced ones")
        self.start, unravel = ravel_pytree(jax.tree_util.tree_map_with_path(_wide, params))
        if self.start.size == 0:
            raise ValueError("params must have at least one element, got none")
        if not np.all(np.isfinite(self.start)):
            raise ValueError("params must be finite, got a NaN or an infinity")
        # Numbers and strings may select what the loss computes, so only arrays are arguments of the compiled program.
        self._arrays = jax.tree.map(lambda x: x if isinstance(x, np.ndarray | jax.Array) else None, batch)

        def flat(x: jax.Array, arrays: "PyTree") -> jax.Array:
            filled = jax.tree.map(lambda leaf, array: leaf if array is None else array, batch, arrays)
            return loss(unravel(x), filled)

        out = jax.eval_shape(flat, self.start, self._arrays)
        if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"loss must give a real floating-point scalar, got {out}")
        if out.shape != ():
            raise ValueError(f"loss must give a scalar, got shape {out.shape}")

        def run(x: jax.Array, v: jax.Array, arrays: "PyTree", numbers: Pair, steps: int) -> Pair:
            learning_rate, decay = numbers

            def step(_: jax.Array, state: Pair) -> Pair:
                x, v = state
                g = jax.grad(flat)(x, arrays)
                v = decay * (v + g)
                return x - learning_rate * (v + g), v

            return cast("Pair", jax.lax.fori_loop(0, steps, step, (x, v)))

        self._flat, self._run = jax.jit(flat), jax.jit(run)
        self._product = jax.jit(lambda x, q, arrays: jax.jvp(lambda y: jax.grad(flat)(y, arrays), (x,), (q,))[1])

    def loss(self, x: jax.Array) -> float:
        """The loss at x."""
        return float(self._flat(x, self._arrays))

    def product(self, x: jax.Array, q: np.ndarray) -> np.ndarray:
        """The Hessian at x times q."""
        return np.asarray(self._product(x, jnp.asarray(q, x.dtype), self._arrays), np.float64)

    def descend(self, x: jax.Array, v: jax.Array, tuning: Tuning, steps: int) -> Pair:
        """Parameters and velocity after `steps` steps of `rules.nesterov` from x and v."""
        numbers = (jnp.asarray(tuning.learning_rate, x.dtype), jnp.asarray(tuning.decay, x.dtype))
        return cast("Pair", self._run(x, v, self._arrays, numbers, steps))


def _wide(path: "KeyPath", leaf: jax.Array) -> jax.Array:
    """A leaf in float32 or wider."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"params{jax.tree_util.keystr(path)} must be real floating point, got {leaf.dtype}")
    return leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype))
