"""Rules whose coefficients follow from curvatures: their contraction is the theory's."""

import math

import numpy as np
import pytest

from momentum_optax import rules
from tests.rules.trajectories import points


@pytest.mark.parametrize("kappa", [2.0, 100.0, 1e4])
def test_chebyshevs_error_is_the_least_possible_at_every_step(kappa):
    # Largest over the spectrum and from a start of 1 in every direction: 1/T_T(s), which is 2 q^T/(1 + q^2T).
    L, mu, T = 3.0, 3.0 / kappa, 60
    curvature = np.append(mu + (L - mu) * (1 - np.cos(np.linspace(0, np.pi, 401))) / 2, [mu, L])
    q = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    errors = points(rules.chebyshev(L, mu), 1.0, T, lambda e: curvature * e, np.ones_like(curvature))
    expected = [2 * q**t / (1 + q ** (2 * t)) for t in range(1, T + 1)]
    np.testing.assert_allclose(abs(errors).max(1), expected, rtol=1e-10)


def _optimal_nesterov(L, mu):
    root = math.sqrt(3 * L / mu + 1)
    return rules.nesterov((root - 2) / (root + 2)), 4 / (3 * L + mu), 1 - 2 / root


# Rule, learning rate and worst spectral radius for curvatures in [mu, L] and kappa = L/mu.
RADII = {
    "gradient descent": lambda L, mu: (rules.heavy_ball(0.0), 2 / (L + mu), (L - mu) / (L + mu)),
    "heavy ball": lambda L, mu: (
        rules.heavy_ball(((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)) ** 2),
        4 / (L**0.5 + mu**0.5) ** 2,
        (L**0.5 - mu**0.5) / (L**0.5 + mu**0.5),
    ),
    "Nesterov": lambda L, mu: (
        rules.nesterov((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)),
        1 / L,
        1 - (mu / L) ** 0.5,
    ),
    "Nesterov, best for quadratics": _optimal_nesterov,
    "triple momentum": lambda L, mu: (rules.triple_momentum(L, mu), 1.0, 1 - (mu / L) ** 0.5),
    "robust momentum": lambda L, mu: (rules.robust_momentum(L, mu), 1.0, 1 - (mu / L) ** 0.5),
    "robust momentum, slowest": lambda L, mu: (rules.robust_momentum(L, mu, 1 - mu / L), 1.0, 1 - mu / L),
}


@pytest.mark.parametrize("kappa", [10.0, 100.0, 1e4])
@pytest.mark.parametrize("name", RADII)
def test_the_worst_spectral_radius_is_the_theorys(name, kappa):
    L, mu = 3.0, 3.0 / kappa
    rule, rate, expected = RADII[name](L, mu)
    A, B, C, D = rule.matrices()
    K = rule.order
    worst = 0.0
    for curvature in [mu, L, *np.geomspace(mu, L, 200)]:
        loop = np.zeros((K + 1, K + 1))  # of (v, x)
        loop[:K, :K], loop[:K, K] = A, B * curvature
        loop[K, :K], loop[K, K] = -rate * C, 1 - rate * D * curvature
        worst = max(worst, abs(np.linalg.eigvals(loop)).max())
    # Most of them are double roots at an end of the interval, found to the square root of float64's rounding.
    assert worst == pytest.approx(expected, rel=1e-7)
