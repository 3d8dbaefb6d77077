"""Gradient noise: the variance around the optimum that a run at a constant learning rate cannot get below."""

import numpy as np
from numpy.typing import ArrayLike

from ..filters import Filter
from .arguments import Floats, constant, reals
from .loop import closed_loop, readout
from .settling import is_contraction, squares


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
    rule of gain 1 tends to plain descent's $\eta\sigma^2/(2\lambda)$.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      learning_rate: In (0, inf); all three broadcast.
      curvature: Real and finite.
      noise_variance: sigma^2, in [0, inf).
      point: "stored" for the parameters that the gradient is taken at, "evaluated" for the point of `eval_params`.
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape; infinite where the loop does not converge.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, `point` is another string, or a coefficient depends on the step and
        `step` is None.

    Reference:
      Mandt, Hoffman and Blei, "Stochastic gradient descent as approximate Bayesian inference", JMLR 2017,
      arXiv:1704.04289, for the limit of small learning rates.
    """
    rule = constant(rule, step)
    variance = reals("noise_variance", noise_variance, "[0, inf)")
    eta = reals("learning_rate", learning_rate, "(0, inf)")
    M = closed_loop(rule, eta, reals("curvature", curvature, "(-inf, inf)"))
    _, B, _, D = rule.matrices()
    eta = np.broadcast_to(eta, M.shape[:-2])
    G = np.empty(M.shape[:-1])
    G[..., 0], G[..., 1:] = -eta * D, B
    contracts = is_contraction(M)
    P = squares(np.where(contracts[..., None, None], M, 0.0), G)
    c = readout(rule, eta, point)
    unit = np.einsum("...i,...ij,...j->...", c, P, c)
    return np.where(contracts, unit * variance, np.inf)[()]
