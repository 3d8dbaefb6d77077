"""The curvature of a loss, measured by Lanczos iterations on Hessian-vector products."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .objective import Loss, Objective

if TYPE_CHECKING:
    from .._typing import PyTree


@dataclasses.dataclass(frozen=True)
class Curvature:
    """The ends of a Hessian's spectrum, as Lanczos found them.

    Attributes:
      L: Largest eigenvalue found. The true one is not smaller.
      L_error: An eigenvalue lies within this distance of `L`.
      lowest: Smallest eigenvalue found; negative where the loss is not convex. The true one is not larger.
      lowest_error: An eigenvalue lies within this distance of `lowest`.
      mu: `lowest`, where it is positive, above rounding and known to 10 %; None otherwise.
      exact: Whether the whole spectrum was seen, so that only rounding is left.
      products: Number of Hessian-vector products.
    """

    L: float
    L_error: float
    lowest: float
    lowest_error: float
    mu: float | None
    exact: bool
    products: int


def estimate_curvature(
    loss: Loss, params: "PyTree", batch: "PyTree" = None, *, iterations: int = 40, seed: int = 0
) -> Curvature:
    r"""The ends of the spectrum of the loss's Hessian at `params`, by Lanczos with Hessian-vector products.

    Each product costs about two gradients. A few dozen find the largest eigenvalue; the smallest positive one is found
    only if it is well separated or the spectrum is exhausted, else `mu` is None. The memory is `iterations` vectors of
    the size of the parameters in float64: each is made orthogonal to all before it.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays; computed with in float32 or wider.
      batch: The second argument of `loss`: a tree of arrays and other values.
      iterations: Maximal number of products, at least 2.
      seed: Seed of the random vector to start from.

    Returns:
      A `Curvature`.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, a leaf of `params` is not real floating
        point, or a value is traced.
      ValueError: If `params` has no elements or is not finite, `loss` is not a scalar, or a derivative is not finite.

    Reference:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994. Golub and Van Loan, "Matrix
      computations", 2013, chapter 10.
    """
    objective = Objective(loss, params, batch)
    return curvature_at(objective, objective.start, iterations, seed)


def curvature_at(objective: Objective, point: jax.Array, iterations: int, seed: int) -> Curvature:
    """The ends of the Hessian's spectrum at a point.

    `scipy.sparse.linalg.eigsh` would not do: it gives ends that have converged only, without their errors, does not
    notice that the spectrum is exhausted, and refuses a Hessian of one element or of zeros.
    """
    _checks.integer("iterations", iterations, 2)
    _checks.integer("seed", seed, 0)
    precision = float(jnp.finfo(point.dtype).eps)
    count = min(int(iterations), point.size)
    q = np.random.default_rng(int(seed)).standard_normal(point.size)
    basis = np.empty((count, point.size))
    diagonal, beside = np.empty(count), np.empty(count)
    exhausted = False
    for k in range(count):
        basis[k] = q / np.linalg.norm(q)
        q = objective.product(point, basis[k])
        if not np.all(np.isfinite(q)):
            raise ValueError("loss must have finite derivatives, got a product with its Hessian that is not finite")
        diagonal[k] = q @ basis[k]
        for _ in range(2):  # the second removes the rounding errors of the first
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
