"""The curvature of a loss, measured by Lanczos iterations on Hessian-vector products."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from .. import _checks
from .quadratics import Tuning

# How often `suggest` halves and doubles a rate at most.
_HALVINGS, _DOUBLINGS = 10, 4


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What Lanczos found of a Hessian's spectrum.

    Attributes:
      L: Largest eigenvalue found. The true one is not smaller.
      L_error: An eigenvalue lies within this distance of `L`.
      lowest: Smallest eigenvalue found; negative where the loss is not convex. The true one is not larger.
      lowest_error: An eigenvalue lies within this distance of `lowest`.
      mu: `lowest`, where it is positive, above rounding and known to a tenth; None otherwise.
      exact: Whether the whole spectrum was seen, so that only rounding is left.
      products: Hessian-vector products spent.
    """

    L: float
    L_error: float
    lowest: float
    lowest_error: float
    mu: float | None
    exact: bool
    products: int


def estimate_curvature(
    loss: Callable[[Any, Any], Any], params: Any, batch: Any = None, *, iterations: int = 40, seed: int = 0
) -> Curvature:
    r"""The ends of the spectrum of the loss's Hessian at `params`, by Lanczos with Hessian-vector products.

    Each product costs about two gradients. The largest eigenvalue is found in a few dozen; the smallest positive one
    only if it stands apart or the spectrum is exhausted, and `mu` is None when it was not. Lanczos keeps `iterations`
    vectors of the size of the parameters in float64, and makes each orthogonal to all before it.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays; used in float32 at least.
      batch: Whatever `loss` takes: a tree of arrays and of anything else.
      iterations: Products at most, at least 2.
      seed: Of the random vector to start from.

    Returns:
      A `Curvature`.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, a leaf of `params` is not real floating
        point, or a value is traced.
      ValueError: If `params` has no elements or is not finite, `loss` is no scalar, or a derivative is not finite.

    Reference:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994. Golub and Van Loan, "Matrix
      computations", 2013, chapter 10.
    """
    problem = _Problem(loss, params, batch)
    return _lanczos(problem, problem.start, iterations, seed)


def _lanczos(problem: "_Problem", point: jax.Array, iterations: int, seed: int) -> Curvature:
    """The ends of the Hessian's spectrum at a point."""
    _checks.integer("iterations", iterations, 2)
    _checks.integer("seed", seed, 0)
    precision = float(jnp.finfo(point.dtype).eps)
    count = min(int(iterations), point.size)
    q = np.random.default_rng(int(seed)).standard_normal(point.size)
    basis = np.empty((count, point.size))
    diagonal, beside = np.empty(count), np.empty(count)
    exhausted = False
    # A package for this would be one more that every user installs; it is these ten lines.
    for k in range(count):
        basis[k] = q / np.linalg.norm(q)
        q = problem.product(point, basis[k])
        if not np.all(np.isfinite(q)):
            raise ValueError("loss must have finite derivatives, got a product with its Hessian that is not finite")
        diagonal[k] = q @ basis[k]
        for _ in range(2):  # once leaves what rounding put there
            q = q - basis[: k + 1].T @ (basis[: k + 1] @ q)
        beside[k] = np.linalg.norm(q)
        scale = max(abs(diagonal[: k + 1]).max(), beside[:k].max(initial=0.0))
        exhausted = bool(beside[k] <= 100 * precision * scale)
        if exhausted:
            count = k + 1
            break
    T = np.diag(diagonal[:count]) + np.diag(beside[: count - 1], 1) + np.diag(beside[: count - 1], -1)
    values, vectors = np.linalg.eigh(T)
    errors = np.zeros(count) if exhausted else beside[count - 1] * abs(vectors[-1])
    L, lowest = float(values[-1]), float(values[0])
    known = lowest > 100 * precision * max(abs(values)) and errors[0] <= 0.1 * lowest
    return Curvature(L, float(errors[-1]), lowest, float(errors[0]), lowest if known else None, exhausted, count)


class _Problem:
    """A loss of one vector: its value, compiled products with its Hessian, and compiled runs of Nesterov's rule."""

    def __init__(self, loss: Any, params: Any, batch: Any) -> None:
        if not callable(loss):
            raise TypeError(f"loss must be a function of params and batch, got {_checks.shown(loss)}")
        flattened: tuple[list[Any], Any] = jax.tree.flatten(batch)
        leaves, treedef = flattened
        if any(isinstance(x, jax.core.Tracer) for x in (*jax.tree.leaves(params), *leaves)):
            raise TypeError("params and batch must have values that are known now, got traced ones")
        self.start, unravel = ravel_pytree(jax.tree_util.tree_map_with_path(_wide, params))
        if self.start.size == 0:
            raise ValueError("params must have at least one element, got none")
        if not np.all(np.isfinite(self.start)):
            raise ValueError("params must be finite, got a NaN or an infinity")
        # Numbers and words may say what the loss is, so only arrays become arguments of the compiled program.
        self._arrays = [x if isinstance(x, np.ndarray | jax.Array) else None for x in leaves]

        def flat(x: jax.Array, arrays: Any) -> Any:
            filled = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
            return loss(unravel(x), treedef.unflatten(filled))

        out = jax.eval_shape(flat, self.start, self._arrays)
        if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"loss must give a real floating-point scalar, got {out}")
        if out.shape != ():
            raise ValueError(f"loss must give a scalar, got shape {out.shape}")

        def run(x: jax.Array, v: jax.Array, arrays: Any, numbers: tuple[Any, Any], steps: Any) -> Any:
            rate, decay = numbers

            def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                x, v = state
                g = jax.grad(flat)(x, arrays)
                v = decay * (v + g)
                return x - rate * (v + g), v

            return jax.lax.fori_loop(0, steps, step, (x, v))

        self._flat, self._run = jax.jit(flat), jax.jit(run)
        self._product = jax.jit(lambda x, q, arrays: jax.jvp(lambda y: jax.grad(flat)(y, arrays), (x,), (q,))[1])

    def loss(self, x: jax.Array) -> float:
        """The loss at x."""
        return float(self._flat(x, self._arrays))

    def product(self, x: jax.Array, q: np.ndarray) -> np.ndarray:
        """The Hessian at x times q."""
        return np.asarray(self._product(x, jnp.asarray(q, x.dtype), self._arrays), np.float64)

    def descend(self, x: jax.Array, v: jax.Array, tuning: Tuning, steps: int) -> tuple[jax.Array, jax.Array]:
        """Parameters and velocity of `rules.nesterov` after so many steps."""
        numbers = (jnp.asarray(tuning.learning_rate, x.dtype), jnp.asarray(tuning.decay, x.dtype))
        new: tuple[jax.Array, jax.Array] = self._run(x, v, self._arrays, numbers, steps)
        return new


def _wide(path: Any, leaf: Any) -> jax.Array:
    """A leaf in float32 or wider."""
    leaf = jnp.asarray(leaf)
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(f"params{jax.tree_util.keystr(path)} must be real floating point, got {leaf.dtype}")
    wide: jax.Array = leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype))
    return wide
