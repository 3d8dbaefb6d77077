"""Rules whose coefficients follow from curvatures."""

__all__ = ["accelerated", "chebyshev", "mass", "robust_momentum", "synthesized_nesterov", "triple_momentum"]

import math

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, lift, shifted
from .arguments import step_number


def synthesized_nesterov(decay: Scalar, lookahead: Scalar) -> Filter:
    r"""The synthesised Nesterov variants: the gradient is taken at a look-ahead point of any length.

    $$ x_{t+1} = x_t + \beta_1 p_t - \alpha g(y_t), \quad p_t = x_t - x_{t-1}, \quad y_t = x_t + \beta_2 p_t $$

    The learning rate is alpha and the stored parameters are y; with $p = -\alpha v$, $v' = \beta_1 v + g$ and
    $u = (1 + \beta_2^+) v' - \beta_2 v$, where plus marks the next step's value. beta_2 = 0 is the heavy ball,
    beta_2 = beta_1 Nesterov. Normal form: (1/(1-b1), b1, 1 - b2 (1-b1)/b1).

    Args:
      decay: beta_1 in (-1, 1].
      lookahead: beta_2, finite.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Lessard, Recht and Packard, SIAM J. Optim. 2016, arXiv:1408.3595, section 3.
    """
    _checks.within("decay", decay, "(-1, 1]")
    _checks.finite("lookahead", lookahead)
    ahead = shifted(lookahead)
    return Filter(
        A=decay,
        B=1.0,
        C=lift(lambda b1, b2, n2: (1 + n2) * b1 - b2, decay, lookahead, ahead),
        D=lift(lambda n2: 1 + n2, ahead),
        # The velocity after step t and the point y of step t + 1 belong together.
        lookahead=ahead,
    )


def triple_momentum(L: Scalar, mu: Scalar) -> Filter:
    r"""The triple momentum method, the fastest known rule for smooth strongly convex functions; learning rate 1.

    With $\rho = 1 - \sqrt{\mu/L}$ it is `synthesized_nesterov` for $\alpha = (1+\rho)/L$,
    $\beta = \rho^2/(2-\rho)$, $\gamma = \rho^2/((1+\rho)(2-\rho))$. The point to evaluate at is
    $x + \delta p$, $\delta = \rho^2/(1-\rho^2)$: `eval_params` gives it. The error contracts by rho per step.
    Normal form: (alpha/(1-beta), beta, (rho+beta)/(1+rho)).

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      ValueError: If a number is out of range, or mu is not below L.

    Reference:
      Van Scoy, Freeman and Lynch, "The fastest known globally convergent first-order method for minimizing strongly
      convex functions", IEEE Control Systems Letters 2018.
    """
    check_curvatures(L, mu)
    rho = lift(lambda big, small: 1 - (small / big) ** 0.5, L, mu)
    alpha = lift(lambda r, big: (1 + r) / big, rho, L)
    gamma = lift(lambda r: r**2 / ((1 + r) * (2 - r)), rho)
    rule = synthesized_nesterov(lift(lambda r: r**2 / (2 - r), rho), gamma).scale_gradient(alpha)
    output = shifted(lift(lambda r, c: c - r**2 / (1 - r**2), rho, gamma))
    return Filter(rule.A, rule.B, rule.C, rule.D, lookahead=output)


def robust_momentum(L: Scalar, mu: Scalar, rho: "Scalar | None" = None) -> Filter:
    r"""The robust momentum method, which trades speed for robustness to gradient noise; learning rate 1.

    With $\kappa = L/\mu$ it is `synthesized_nesterov` for $\alpha = \kappa (1-\rho)^2 (1+\rho)/L$,
    $\beta = \kappa\rho^3/(\kappa - 1)$, $\gamma = \rho^3/((\kappa-1)(1-\rho)^2(1+\rho))$. The least rho gives the
    triple momentum method's iterates, the largest plain descent at learning rate 1/L.
    Normal form: (alpha/(1-beta), beta, 1 - gamma (1-beta)/beta).

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).
      rho: Contraction per step, in [1 - sqrt(mu/L), 1 - mu/L]; the lower end if None.

    Raises:
      ValueError: If a number is out of range, or mu is not below L.

    Reference:
      Cyrus, Hu, Van Scoy and Lessard, "A robust accelerated optimization algorithm for strongly convex functions",
      ACC 2018, arXiv:1710.04753.
    """
    check_curvatures(L, mu)
    if rho is None:
        rho = lift(lambda big, small: 1 - (small / big) ** 0.5, L, mu)
    elif _checks.is_number(L) and _checks.is_number(mu):
        # The ends are allowed, whatever the last bit of the caller's own square root.
        _checks.within("rho", rho, f"[{(1 - math.sqrt(mu / L)) * (1 - 1e-12)}, {(1 - mu / L) * (1 + 1e-12)}]")
    else:
        _checks.within("rho", rho, "(0, 1)")
    kappa = lift(lambda big, small: big / small, L, mu)
    decay = lift(lambda k, r: k * r**3 / (k - 1), kappa, rho)
    gamma = lift(lambda k, r: r**3 / ((k - 1) * (1 - r) ** 2 * (1 + r)), kappa, rho)
    alpha = lift(lambda k, r, big: k * (1 - r) ** 2 * (1 + r) / big, kappa, rho, L)
    return synthesized_nesterov(decay, gamma).scale_gradient(alpha)


def accelerated(kappa: Scalar = 1000.0, xi: Scalar = 10.0, epsilon: Scalar = 0.7) -> Filter:
    r"""Accelerated SGD (AccSGD, ASGD): a short and a long step, coupled.

    With $b = \epsilon^2\xi/\kappa$ and $\zeta = \epsilon/(\epsilon + b)$ the reference code keeps a long-step
    average w, $w' = (1-b) w + b (x - \alpha(\kappa/\epsilon) g)$ and $x' = \zeta (x - \alpha g) + (1-\zeta) w'$, from
    $w_0 = x_0$.
    Here $v = (x - w)/\alpha$. Normal form: (eps (1+xi)/(1+eps), (kappa - eps^2 xi)/(kappa + eps xi),
    (eps xi - 1)/(eps (1+xi))).

    Args:
      kappa: Ratio of the long to the short step ("long step"), in [1, inf).
      xi: Statistical advantage, in [1, inf); the paper requires at most sqrt(kappa).
      epsilon: The paper's small constant, in (0, 1].

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Kidambi et al., "On the insufficiency of existing momentum schemes for stochastic optimization", ICLR 2018,
      arXiv:1803.05591. Jain et al., "Accelerating stochastic gradient descent", COLT 2018, arXiv:1704.08227.
    """
    _checks.within("kappa", kappa, "[1, inf)")
    _checks.within("xi", xi, "[1, inf)")
    _checks.within("epsilon", epsilon, "(0, 1]")
    b = lift(lambda e, x, k: e**2 * x / k, epsilon, xi, kappa)
    zeta = lift(lambda e, b: e / (e + b), epsilon, b)
    gain = lift(lambda e, x: e * x, epsilon, xi)
    return Filter(
        A=lift(lambda z, b: z * (1 - b), zeta, b),
        B=lift(lambda z, h: z * (h - 1), zeta, gain),
        C=lift(lambda e, b: b / (e + b) * (1 - b), epsilon, b),
        D=lift(lambda z, h: h - z * (h - 1), zeta, gain),
    )


def mass(alpha: Scalar = 0.05, kappa: Scalar = 12.0) -> Filter:
    r"""MaSS, momentum-added stochastic solver: Nesterov with a compensation for over-parametrised models.

    $$ w' = x - \eta g, \quad z' = (1-\alpha) z + \alpha x - \frac{\eta}{\alpha\kappa} g, \quad
       x' = \frac{\alpha z' + w'}{1 + \alpha} $$

    x are the stored parameters, eta the learning rate, and $v = (x - z)/\eta$; `eval_params` gives w.
    Normal form: (s, (1-alpha)/(1+alpha), 1 - 1/s), s = (1 + 1/(alpha kappa))/2.

    Args:
      alpha: In (0, 1).
      kappa: The paper's modified condition number, in [1, inf).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Liu and Belkin, "Accelerating SGD with momentum for over-parameterized learning", ICLR 2020, arXiv:1810.13395.
    """
    _checks.within("alpha", alpha, "(0, 1)")
    _checks.within("kappa", kappa, "[1, inf)")
    gain = lift(lambda a, k: (1 + 1 / k) / (1 + a), alpha, kappa)
    return Filter(
        A=lift(lambda a: (1 - a) / (1 + a), alpha),
        B=lift(lambda a, k, d: 1 / (a * k) - d, alpha, kappa, gain),
        C=lift(lambda a: a * (1 - a) / (1 + a), alpha),
        D=gain,
        lookahead=alpha,
    )


def chebyshev(L: Scalar, mu: Scalar) -> Filter:
    r"""Chebyshev's semi-iteration as a time-varying heavy ball: optimal on quadratics; learning rate 1.

    With $q = (\sqrt\kappa - 1)/(\sqrt\kappa + 1)$, $s = (L+\mu)/(L-\mu)$, $r_t = q (1+q^{2t})/(1+q^{2t+2})$:
    $v' = a_t v + b_t g$, $u = v'$, $a_t = 2 s r_t - 1$, $b_t = 4 r_t/(L-\mu)$, and $a_0 = 0$, $b_0 = 2/(L+\mu)$.
    After T steps the error on a quadratic is at most $2 q^T/(1+q^{2T})$ of the start, and no method does better.
    The coefficients depend on the global step.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      ValueError: If a number is out of range, or mu is not below L.

    Reference:
      Golub and Varga, Numerische Mathematik 1961; d'Aspremont, Scieur and Taylor, "Acceleration methods", 2021,
      arXiv:2101.09545, section 2.
    """
    check_curvatures(L, mu)
    q = lift(lambda big, small: ((big / small) ** 0.5 - 1) / ((big / small) ** 0.5 + 1), L, mu)
    r = lift(lambda q, t: q * (1 + q ** (2 * t)) / (1 + q ** (2 * t + 2)), q, step_number)
    decay = lift(lambda r, big, small, t: (t > 0) * (2 * (big + small) / (big - small) * r - 1), r, L, mu, step_number)
    # At t = 0 the formula for t > 0 gives twice the first coefficient.
    intake = lift(lambda r, big, small, t: (1 - 0.5 * (t == 0)) * 4 * r / (big - small), r, L, mu, step_number)
    return Filter(A=decay, B=intake, C=decay, D=intake)


def check_curvatures(L: Scalar, mu: Scalar) -> None:
    """Raise unless 0 < mu < L, where these are numbers."""
    _checks.within("L", L, "(0, inf)")
    _checks.within("mu", mu, f"(0, {float(L)})" if _checks.is_number(L) else "(0, inf)")
