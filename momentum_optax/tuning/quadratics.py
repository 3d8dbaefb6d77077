"""Published optimal settings for quadratics and smooth strongly convex functions."""

import dataclasses
import math

from .. import _checks, analysis, rules
from ..filters import Filter


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A rule and the learning rate that follows it in a chain.

    Attributes:
      rule: The rule.
      learning_rate: The constant learning rate; 1 for rules whose step size is part of the rule.
      decay: The decay of the rule's velocity, or its limit.
      contraction: Predicted factor per step on the error, for curvatures in [mu, L]; None where mu is not known.
      reasons: The reasons for these settings, one sentence each.
    """

    rule: Filter
    learning_rate: float
    decay: float
    contraction: float | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        contraction = "unknown" if self.contraction is None else f"{self.contraction:.6g}"
        head = f"learning rate {self.learning_rate:.4g}, decay {self.decay:.6g}, contraction per step {contraction}"
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


def gradient_descent(L: float, mu: float) -> Tuning:
    r"""Plain descent at its best learning rate for curvatures in [mu, L].

    $$ \eta = \frac{2}{L+\mu}, \qquad \rho = \frac{\kappa - 1}{\kappa + 1} $$

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a number is out of range.

    Reference:
      Polyak, "Introduction to optimization", 1987; Nesterov, "Introductory lectures on convex optimization", 2004.
    """
    kappa = _condition(L, mu)
    return Tuning(
        rules.heavy_ball(0.0),
        2 / (L + mu),
        0.0,
        (kappa - 1) / (kappa + 1),
        (
            f"2/(L + mu): curvatures {mu:.4g} and {L:.4g} contract equally",
            "holds for every smooth strongly convex loss",
        ),
    )


def optimal_heavy_ball(L: float, mu: float) -> Tuning:
    r"""Polyak's heavy ball for quadratics with curvatures in [mu, L]: the fastest constant rule of two points.

    $$ \beta = \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^2, \qquad
       \eta = \frac{4}{(\sqrt L + \sqrt\mu)^2}, \qquad \rho = \sqrt\beta $$

    For quadratics only: with these settings it cycles on some smooth strongly convex losses. From rest the error
    is $(1 + Bt)\rho^t$, with B up to 2.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a number is out of range.

    Reference:
      Polyak, 1964. The cycle: Lessard, Recht and Packard, 2016, arXiv:1408.3595.
    """
    root = math.sqrt(_condition(L, mu))
    contraction = (root - 1) / (root + 1)
    return Tuning(
        rules.heavy_ball(contraction**2),
        4 / (math.sqrt(L) + math.sqrt(mu)) ** 2,
        contraction**2,
        contraction,
        ("critically damped at both ends of the spectrum", "quadratics only: elsewhere it may cycle"),
    )


def smooth_nesterov(L: float, mu: float) -> Tuning:
    r"""Nesterov's constants for every smooth strongly convex loss.

    $$ \eta = \frac1L, \qquad \beta = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1} $$

    On quadratics the error contracts per step by a factor of at most $1 - 1/\sqrt\kappa$.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a number is out of range.

    Reference:
      Nesterov, "Introductory lectures on convex optimization", 2004, section 2.2.
    """
    root = math.sqrt(_condition(L, mu))
    decay = (root - 1) / (root + 1)
    return Tuning(
        rules.nesterov(decay),
        1 / L,
        decay,
        1 - 1 / root,
        ("1/L: a step that overshoots for no curvature up to L", "holds for every smooth strongly convex loss"),
    )


def quadratic_nesterov(L: float, mu: float) -> Tuning:
    r"""Nesterov's rule at its best for quadratics with curvatures in [mu, L].

    $$ \eta = \frac{4}{3L + \mu}, \qquad \beta = \frac{\sqrt{3\kappa+1} - 2}{\sqrt{3\kappa+1} + 2}, \qquad
       \rho = 1 - \frac{2}{\sqrt{3\kappa+1}} $$

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a number is out of range.

    Reference:
      Lessard, Recht and Packard, 2016, arXiv:1408.3595, proposition 1.
    """
    root = math.sqrt(3 * _condition(L, mu) + 1)
    decay = (root - 2) / (root + 2)
    return Tuning(
        rules.nesterov(decay),
        4 / (3 * L + mu),
        decay,
        1 - 2 / root,
        ("the least contraction of Nesterov's rule over the spectrum", "quadratics only"),
    )


def optimal_triple_momentum(L: float, mu: float) -> Tuning:
    r"""The triple momentum method, $\rho = 1 - 1/\sqrt\kappa$ on every smooth strongly convex loss; learning rate 1.

    That is the contraction of the point of `eval_params`.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a number is out of range.

    Reference:
      Van Scoy, Freeman and Lynch, IEEE Control Systems Letters 2018.
    """
    kappa = _condition(L, mu)
    rule = rules.triple_momentum(L, mu)
    return Tuning(
        rule,
        1.0,
        float(analysis.poles(rule)[0].real),
        1 - 1 / math.sqrt(kappa),
        ("the fastest constant rule known for every smooth strongly convex loss", "its step size is part of the rule"),
    )


def optimal_chebyshev(L: float, mu: float) -> Tuning:
    r"""Chebyshev's semi-iteration: no method does better on quadratics with curvatures in [mu, L]; learning rate 1.

    After T steps the error is at most $2q^T/(1 + q^{2T})$ of the start, $q = (\sqrt\kappa-1)/(\sqrt\kappa+1)$.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      TypeError: If an argument is not a number.
      ValueError: If a number is out of range.

    Reference:
      Golub and Varga, Numerische Mathematik 1961; d'Aspremont, Scieur and Taylor, 2021, arXiv:2101.09545.
    """
    root = math.sqrt(_condition(L, mu))
    contraction = (root - 1) / (root + 1)
    return Tuning(
        rules.chebyshev(L, mu),
        1.0,
        contraction**2,
        contraction,
        ("the least worst error after any number of steps", "quadratics only; its step sizes are part of the rule"),
    )


def _condition(L: float, mu: float) -> float:
    _checks.number("L", L, "(0, inf)")
    _checks.number("mu", mu, f"(0, {L}]")
    return L / mu
