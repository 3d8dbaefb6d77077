"""The closed loop and its error curve, against runs of the transformation in float64."""

import math

import numpy as np
import pytest
from conformance import RULES, every_rule

from momentum_optax import analysis, rules, tuning
from tests.analysis.runs import SPECTRUM, half_of_the_limit, quadratic, run


@pytest.mark.one_in(8)
@every_rule
def test_the_error_curve_is_the_run_itself(rule, x64):
    r = RULES[rule]()
    rate = half_of_the_limit(r)
    hessian, basis = quadratic(SPECTRUM)
    start = np.random.default_rng(1).normal(size=len(SPECTRUM))
    runs = run(r, rate, lambda x, t: hessian @ x, start, 200)
    for points, point in zip(runs, ("stored", "evaluated"), strict=True):
        curve = analysis.error_curve(r, rate, SPECTRUM, 200, point=point)
        np.testing.assert_allclose(points, (curve * (basis.T @ start)) @ basis.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_the_heavy_ball_is_critically_damped_where_the_root_is_double(decay, x64):
    rule = rules.heavy_ball(decay)
    critical = (1 - math.sqrt(decay)) ** 2
    np.testing.assert_allclose(
        analysis.spectral_radius(rule, critical * np.array([1.01, 2.0, 5.0]), 1.0), math.sqrt(decay), rtol=1e-12
    )
    over = critical * 0.99
    slow = ((1 + decay - over) + math.sqrt((1 + decay - over) ** 2 - 4 * decay)) / 2
    assert analysis.spectral_radius(rule, over, 1.0) == pytest.approx(slow, rel=1e-12)
    assert slow > math.sqrt(decay)
    # A double root r: from rest (1 + Bt) r^t, with B from the first step.
    r, t = math.sqrt(decay), np.arange(200)
    expected = (1 + ((1 - critical) / r - 1) * t) * r**t
    points, _ = run(rule, critical, lambda x, t: x, np.ones(1), 199)
    np.testing.assert_allclose(points[:, 0], expected, rtol=0, atol=1e-9)


def test_chebyshevs_worst_error_is_one_over_the_polynomial(x64):
    L, mu, T = 1.0, 0.01, 40
    q = (10 - 1) / (10 + 1)
    t = np.arange(T + 1)
    expected = 2 * q**t / (1 + q ** (2 * t))
    assert expected[40] == pytest.approx(6.5316502e-4, rel=1e-7)
    curvature = np.append(mu + (L - mu) * (1 - np.cos(np.linspace(0, np.pi, 401))) / 2, [mu, L])
    tuned = tuning.optimal_chebyshev(L, mu)
    predicted = analysis.error_curve(tuned.rule, tuned.learning_rate, curvature, T)
    np.testing.assert_allclose(abs(predicted).max(1), expected, rtol=1e-10)
    points, _ = run(tuned.rule, tuned.learning_rate, lambda x, t: curvature * x, np.ones_like(curvature), T)
    np.testing.assert_allclose(abs(points).max(1), expected, rtol=1e-10)
    # Its coefficients tend to those of the optimal heavy ball, and so does its rate.
    assert analysis.contraction(tuned.rule, 1.0, mu, L, step=10**6) == pytest.approx(tuned.contraction, rel=1e-7)
    assert tuned.decay == pytest.approx(q**2, rel=1e-12)


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.spectral_radius(BALL, -0.1, 1.0), ValueError, r"learning_rate must be in \[0, inf\), got -0.1"),
    (lambda: analysis.spectral_radius(BALL, [0.1, np.nan], 1.0), ValueError, r"learning_rate must be .* got nan"),
    (lambda: analysis.spectral_radius(BALL, "0.1", 1.0), TypeError, "learning_rate must be a real number or an array"),
    (lambda: analysis.spectral_radius(BALL, 1j, 1.0), TypeError, "learning_rate must be a real number"),
    (lambda: analysis.spectral_radius(BALL, True, 1.0), TypeError, "learning_rate must be a real number"),
    (lambda: analysis.spectral_radius(BALL, 0.1, [1.0, np.inf]), ValueError, "curvature must be finite, got inf"),
    (lambda: analysis.spectral_radius(BALL, 0.1, None), TypeError, "curvature must be a number or an array of them"),
    (lambda: analysis.spectral_radius(BALL, 0.1, [[1.0], [1.0, 2.0]]), TypeError, "curvature must be a number"),
    (lambda: analysis.error_curve(BALL, 0.1, 1.0, 3, point="y"), ValueError, "point must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
