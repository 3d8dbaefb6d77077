r"""Rules that repeat: one period as one step, after Floquet.

The loop of a rule whose coefficients repeat after k steps is $x_{t+1} = M_{t \bmod k}\, x_t$. The product over a
period, the monodromy matrix $\Phi = M_{k-1} \cdots M_0$, decides about it as the matrix of a step decides about a
constant rule, the case k = 1: the loop converges if the eigenvalues of $\Phi$, the Floquet multipliers, are inside the
unit circle, and the k-th root of the largest is the factor per step.

Reference:
  Bittanti and Colaneri, "Periodic systems: filtering and control", 2009.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from ..filters import Filter
from ..filters.algebra import grows
from .settling import is_contraction, largest, lyapunov

# Learning rates of the first, coarse search, relative to the size of an update; finer ones per step of a period.
_COARSE = np.geomspace(1e-9, 1e9, 1024)
_FINER, _ROUNDS = 16, 6
# How far the modulus of a multiplier must be from 1 to be told from it.
_ROUNDING = 1e-12


def loop_matrix(rule: Filter, eta: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """The matrix of a step of a rule with plain numbers, of (theta, v); shape (..., K + 1, K + 1)."""
    A, B, C, D = rule.matrices()
    M = np.zeros((*eta.shape, len(B) + 1, len(B) + 1), curvature.dtype)
    M[..., 0, 0] = 1 - eta * curvature * D
    M[..., 0, 1:] = -eta[..., None] * C
    M[..., 1:, 0] = curvature[..., None] * B
    M[..., 1:, 1:] = A
    return M


def kick(rule: Filter, eta: np.ndarray) -> np.ndarray:
    """The change of (theta, v) by a gradient of 1, (-eta D, B); shape (..., K + 1)."""
    _, B, _, D = rule.matrices()
    G = np.empty((*eta.shape, len(B) + 1))
    G[..., 0], G[..., 1:] = -eta * D, B
    return G


def over_a_period(phases: Sequence[Filter], eta: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """The monodromy matrix of the loop; shape (..., K + 1, K + 1). It may overflow where the loop diverges."""
    runs = itertools.groupby(phases, lambda rule: (rule.A, rule.B, rule.C, rule.D))
    pairs = [(loop_matrix(next(run), eta, curvature), 1 + sum(1 for _ in run)) for _, run in runs]
    with np.errstate(over="ignore", invalid="ignore"):
        powers = [M if n == 1 else np.linalg.matrix_power(M, n) for M, n in pairs]
        return functools.reduce(lambda before, M: M @ before, powers)


def covariances(matrices: Sequence[np.ndarray], kicks: Sequence[np.ndarray]) -> np.ndarray:
    r"""The stationary covariances of $x_{t+1} = M_t x_t + G_t \xi_t$ before each step of a period.

    The first solves the Lyapunov equation of one period, $P = \Phi P \Phi^\top + Q$, Q being the noise of one period;
    the others follow step by step.

    Args:
      matrices: k of shape (..., d, d).
      kicks: k of shape (..., d).

    Returns:
      Shape (k, ..., d, d); infinite where the spectral radius of $\Phi$ is 1 or more.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        monodromy = functools.reduce(lambda before, M: M @ before, matrices)
    contracts = is_contraction(monodromy)[..., None, None]
    matrices = [np.where(contracts, M, 0.0) for M in matrices]
    squares = [G[..., :, None] * G[..., None, :] for G in kicks]

    def after(P: np.ndarray, k: int) -> np.ndarray:
        return np.asarray(matrices[k] @ P @ np.swapaxes(matrices[k], -1, -2) + squares[k])

    of_a_period = functools.reduce(after, range(len(matrices)), np.zeros_like(squares[0]))
    found = [lyapunov(np.where(contracts, monodromy, 0.0), of_a_period)]
    for k in range(len(matrices) - 1):
        found.append(after(found[-1], k))
    return np.where(contracts, np.stack(found), np.inf)


def steady(matrices: Sequence[np.ndarray], inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The periodic solution of $x_{t+1} = M_t x_t + b_t$, before each step of a period; shape (k, d).

    Raises:
      numpy.linalg.LinAlgError: If nothing settles there: a Floquet multiplier is 1 or outside the unit circle.
    """
    x = np.zeros_like(inputs[0])
    monodromy = np.eye(len(x))
    for M, b in zip(matrices, inputs, strict=True):
        x, monodromy = M @ x + b, M @ monodromy
    if grows(monodromy):
        raise np.linalg.LinAlgError("a multiplier is outside the unit circle")
    found = [np.linalg.solve(np.eye(len(x)) - monodromy, x)]
    for M, b in zip(matrices[:-1], inputs[:-1], strict=True):
        found.append(M @ found[-1] + b)
    return np.stack(found)


def stability_limit(phases: Sequence[Filter], direction: np.number) -> float:
    """The least unstable product of learning rate and |curvature|, for a curvature of modulus 1.

    A coarse search brackets it. Where the loop is stable, the boundaries below are bounded polynomials in the product,
    of a degree of at most k (K + 1) for each pair of multipliers; between points as close as Chebyshev's of some times
    that degree they have no features, so that narrow bands of resonance are found too.
    """
    margins = _margins(phases, direction)
    size = max(abs(D) + abs(B) @ abs(C) for _, B, C, D in (rule.matrices() for rule in phases))
    if size == 0:
        return 0.0
    coarse = _COARSE / size
    radius = largest(over_a_period(phases, coarse, np.full(coarse.shape, direction)))
    # A small product changes a multiplier by less than its rounding, where that has a modulus of 1 + O(product^2).
    known = abs(radius - 1) > _ROUNDING
    coarse, stable = coarse[known], radius[known] < 1
    if not len(stable) or not stable[0]:
        return 0.0
    if stable.all():
        return math.inf
    n = _FINER * len(phases) * (phases[0].order + 1) + 256
    x = coarse[np.argmin(stable)] * (1 - np.cos(np.pi * np.arange(1, n + 1) / n)) / 2
    low, high = _bracket(margins, x[x > coarse[0]], float(coarse[0]))
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if margins(np.array([middle])).min() > 0 else (low, middle)
    return float(high)


def _margins(phases: Sequence[Filter], direction: np.number) -> Callable[[np.ndarray], np.ndarray]:
    """Functions of the product that are all above 0 until a multiplier leaves the disc; shape (1 or 3, n).

    At 1, at -1, or as a pair; for a complex curvature the multipliers come with their conjugates, as those of a real
    loop of twice the size.
    """
    conjugates = bool(np.iscomplexobj(direction) and np.imag(direction))

    def margins(x: np.ndarray) -> np.ndarray:
        monodromy = over_a_period(phases, x, np.full(x.shape, direction))
        z = np.linalg.eigvals(np.where(np.isfinite(monodromy), monodromy, 2.0))
        if conjugates:
            z = np.concatenate([z, z.conj()], -1)
        first, second = np.triu_indices(z.shape[-1], 1)
        pairs = np.prod(1 - z[..., first] * z[..., second], -1).real
        if conjugates:  # at 1 and at -1 too, where the other two only touch 0
            return np.stack([pairs])
        return np.stack([np.prod(1 - z, -1).real, np.prod(1 + z, -1).real, pairs])

    return margins


def _bracket(margins: Callable[[np.ndarray], np.ndarray], x: np.ndarray, start: float) -> tuple[float, float]:
    """A stable point and an unstable one after it, with the first boundary between them.

    x is in order, and `start` a stable point before all of it.
    """
    values = margins(x)
    unstable = np.flatnonzero((values <= 0).any(0))
    end = int(unstable[0]) if len(unstable) else len(x) - 1
    candidates = [(float(x[end - 1]) if end else start, float(x[end]))]
    for i, one in enumerate(values[:, : end + 1]):
        lower, middle, upper = one[:-2], one[1:-1], one[2:]
        # Through such points a parabola ends less than an eighth of their distance below the middle one.
        near = middle < np.maximum(lower, upper) - middle
        for dip in 1 + np.flatnonzero((middle < lower) & (middle <= upper) & near):
            low, high = float(x[dip - 1]), float(x[dip + 1])
            before = low
            for _ in range(_ROUNDS):
                inside = np.linspace(low, high, 17)
                least = margins(inside)[i]
                at = int(least.argmin())
                if least[at] <= 0:
                    candidates.append((before, float(inside[at])))
                    break
                low, high = float(inside[max(at - 1, 0)]), float(inside[min(at + 1, 16)])
    return min(candidates, key=lambda pair: pair[1])
