"""Gradient noise: the variance around the optimum that a run at a constant learning rate cannot get below."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..filters import Filter
from .arguments import Floats, phases, reals
from .loop import readout
from .periods import covariances, kick, loop_matrix


def stationary_variance(
    rule: Filter,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    noise_variance: ArrayLike = 1.0,
    *,
    point: str = "stored",
    step: int | None = None,
) -> Floats:
    r"""The stationary variance of a parameter around its optimum.

    The gradient is $\lambda\theta + \xi$ with independent $\xi$ of the given variance. The covariance of (theta, v)
    solves $P = M P M^\top + \sigma^2 G G^\top$, $G = (-\eta D, B)$. For the heavy ball the result is
    $\eta\sigma^2 (1+\beta) / ((1-\beta)\lambda(2(1+\beta) - \eta\lambda))$; for small learning rates every
    rule of gain 1 tends to plain descent's $\eta\sigma^2/(2\lambda)$. For a rule with a period it is the mean over one;
    `variance_over_a_period` has them all.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      learning_rate: In (0, inf); all three broadcast.
      curvature: Real and finite.
      noise_variance: sigma^2, in [0, inf).
      point: "stored" for the parameters that the gradient is taken at, "evaluated" for the point of `eval_params`.
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape; infinite where the loop does not converge, or by less than 1e-13 per step.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, `point` is another string, or a coefficient depends on the step and
        `step` is None.

    Reference:
      Mandt, Hoffman and Blei, "Stochastic gradient descent as approximate Bayesian inference", JMLR 2017,
      arXiv:1704.04289, for the limit of small learning rates.
    """
    return _by_phase(phases(rule, step), learning_rate, curvature, noise_variance, point).mean(0)[()]


def variance_over_a_period(
    rule: Filter,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    noise_variance: ArrayLike = 1.0,
    *,
    point: str = "stored",
) -> np.ndarray:
    r"""The stationary variances of a parameter after 0, 1, ..., k - 1 steps of a period of k.

    Entry 0 is that of the parameters just after the last step of a period: for `outer_nesterov` and `lookahead`, just
    after a meeting. Their mean is `stationary_variance`. The covariances of (theta, v) solve the periodic Lyapunov
    equation $P_{t+1} = M_t P_t M_t^\top + \sigma^2 G_t G_t^\top$, $P_k = P_0$.

    Args:
      rule: A rule with constant coefficients, for which k is 1, or ones that are known to repeat (`Filter.period`).
      learning_rate: In (0, inf); all three broadcast.
      curvature: Real and finite.
      noise_variance: sigma^2, in [0, inf).
      point: See `stationary_variance`.

    Returns:
      float64 of shape (k, ...); infinite where the loop does not converge, or by less than 1e-13 per period.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, `point` is another string, or a coefficient depends on the step and is
        not known to repeat.

    Reference:
      Bittanti and Colaneri, "Periodic systems: filtering and control", 2009.
    """
    return _by_phase(phases(rule), learning_rate, curvature, noise_variance, point)


def _by_phase(
    repeated: Sequence[Filter], learning_rate: ArrayLike, curvature: ArrayLike, noise_variance: ArrayLike, point: str
) -> np.ndarray:
    eta, curvature, variance = np.broadcast_arrays(
        reals("learning_rate", learning_rate, "(0, inf)"),
        reals("curvature", curvature, "(-inf, inf)"),
        reals("noise_variance", noise_variance, "[0, inf)"),
    )
    P = covariances([loop_matrix(now, eta, curvature) for now in repeated], [kick(now, eta) for now in repeated])
    converges = np.all(np.isfinite(P), (-2, -1))
    # The point before a step is read as the step before left it.
    c = np.stack([readout(before, eta, point) for before in (repeated[-1], *repeated[:-1])])
    unit = np.einsum("...i,...ij,...j->...", c, np.where(converges[..., None, None], P, 0.0), c)
    return np.where(converges, unit * variance, np.inf)
