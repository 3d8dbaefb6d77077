r"""A rule in feedback with a loss of curvature lambda: $g = \lambda\theta$, $\theta' = \theta - \eta u$.

The state is the error and the velocities, (theta, v), and one step multiplies it by

    M = [ 1 - eta lambda D   -eta C ]
        [     lambda B          A   ]

A quadratic loss is one such loop per eigenvalue of its Hessian H. Behind a fixed diagonal preconditioner P, such as
Adam's once its second moments are settled, it is one per eigenvalue of $P^{1/2} H P^{1/2}$: these are the curvatures to
give, of the parameters $P^{-1/2}\theta$, whose gradient noise has the covariance $P^{1/2} \Sigma P^{1/2}$.
A complex curvature describes a rotation: the vector field of a bilinear game of strength s has the curvatures +-i s.
"""

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from ..filters import Filter
from .arguments import Floats, at_step, constant, curvatures, known, phases, reals
from .periods import loop_matrix, over_a_period
from .settling import largest

POINTS = ("stored", "evaluated")


def closed_loop(rule: Filter, learning_rate: ArrayLike, curvature: ArrayLike, *, step: int | None = None) -> np.ndarray:
    """The matrix M that maps (theta, v_1, ..., v_K) to its value at the next step.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      learning_rate: In [0, inf); broadcasts against `curvature`.
      curvature: Real, or complex for games; finite.
      step: The step whose coefficients are used; None for constant coefficients, with the limit of those that depend
        on a leaf's age (special first steps, debiasing weights).

    Returns:
      Shape (..., K + 1, K + 1), float64, or complex128 for a complex curvature; K counts the velocities that are read.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, or a coefficient depends on the step and `step` is None.

    Reference:
      Lessard, Recht and Packard, SIAM J. Optim. 2016, arXiv:1408.3595.
    """
    now = constant(rule, step)
    eta, curvature = np.broadcast_arrays(reals("learning_rate", learning_rate, "[0, inf)"), curvatures(curvature))
    return loop_matrix(now, eta, curvature)


def monodromy(rule: Filter, learning_rate: ArrayLike, curvature: ArrayLike) -> np.ndarray:
    r"""The matrix that maps (theta, v_1, ..., v_K) to its value one period later, from steps that k divides.

    $\Phi = M_{k-1} \cdots M_0$, M_t being the `closed_loop` of step t. Its eigenvalues are the Floquet multipliers. For
    constant coefficients it is `closed_loop` itself, k being 1.

    Args:
      rule: A rule with constant coefficients, or ones that are known to repeat (`Filter.period`).
      learning_rate: In [0, inf); broadcasts against `curvature`.
      curvature: Real, or complex for games; finite.

    Returns:
      Shape (..., K + 1, K + 1), float64, or complex128 for a complex curvature.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, or a coefficient depends on the step and is not known to repeat.

    Reference:
      Bittanti and Colaneri, "Periodic systems: filtering and control", 2009.
    """
    repeated = phases(rule)
    eta, curvature = np.broadcast_arrays(reals("learning_rate", learning_rate, "[0, inf)"), curvatures(curvature))
    return over_a_period(repeated, eta, curvature)


def spectral_radius(rule: Filter, learning_rate: ArrayLike, curvature: ArrayLike, *, step: int | None = None) -> Floats:
    r"""The asymptotic factor per step on the error: the largest modulus of the loop's eigenvalues.

    Below 1 the loop converges, above 1 it diverges. For plain descent it is $|1 - \eta\lambda|$, for an underdamped
    heavy ball $\sqrt\beta$. Exact to rounding, except where two eigenvalues meet (critical damping): about 1e-8 there.
    For a rule with a period of k it is the k-th root of that of the `monodromy` matrix.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      learning_rate: In [0, inf); broadcasts against `curvature`.
      curvature: Real, or complex for games; finite.
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, or a coefficient depends on the step and `step` is None.

    Reference:
      Polyak, 1964; Lessard, Recht and Packard, 2016, arXiv:1408.3595.
    """
    repeated = phases(rule, step)
    eta, curvature = np.broadcast_arrays(reals("learning_rate", learning_rate, "[0, inf)"), curvatures(curvature))
    return (largest(over_a_period(repeated, eta, curvature)) ** (1 / len(repeated)))[()]


def readout(rule: Filter, learning_rate: np.ndarray, point: str) -> np.ndarray:
    """The weights of (theta, v) in the point: theta, or theta + eta lookahead . v; shape (..., K + 1)."""
    _checks.choice("point", point, POINTS)
    weights = np.zeros((*learning_rate.shape, rule.order + 1))
    weights[..., 0] = 1.0
    if point == "evaluated":
        weights[..., 1:] = learning_rate[..., None] * np.asarray(rule.lookahead, np.float64)
    return weights


def error_curve(
    rule: Filter, learning_rate: ArrayLike, curvature: ArrayLike, n: int, *, point: str = "stored"
) -> np.ndarray:
    r"""The errors theta_0 = 1, theta_1, ..., theta_n of a run from rest, those of the transformation itself.

    Schedules and first steps are applied step by step. For the optimal heavy ball it is $(1 + Bt) s^t$: the spectral
    radius alone does not show the factor before the power.

    Args:
      rule: Any rule, scheduled too.
      learning_rate: In [0, inf); broadcasts against `curvature`.
      curvature: Real, or complex for games; finite.
      n: Number of steps, at least 0.
      point: "stored" for the parameters that the gradient is taken at, "evaluated" for the point of `eval_params`.

    Returns:
      Shape (n + 1, ...), float64, or complex128 for a complex curvature.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range or `point` is another string.
    """
    _checks.integer("n", n, 0)
    _checks.choice("point", point, POINTS)
    rule = known(rule).pruned()
    eta, curvature = np.broadcast_arrays(reals("learning_rate", learning_rate, "[0, inf)"), curvatures(curvature))
    theta = np.ones(eta.shape, curvature.dtype)
    v = np.zeros((rule.order, *eta.shape), curvature.dtype)
    out = np.empty((int(n) + 1, *eta.shape), curvature.dtype)
    out[0] = theta
    now = rule
    for t in range(int(n)):
        if t == 0 or not rule.is_constant:
            now = at_step(rule, t)
            A, B, C, D = now.matrices()
        g = curvature * theta
        theta = theta - eta * (np.tensordot(C, v, 1) + D * g)
        v = np.tensordot(A, v, 1) + np.multiply.outer(B, g)
        out[t + 1] = theta + (
            eta * np.tensordot(np.asarray(now.lookahead, np.float64), v, 1) if point == "evaluated" else 0.0
        )
    return out
