"""Stationary variance, against closed forms, runs of the transformation and SciPy's Lyapunov solver."""

import numpy as np
import pytest
import scipy.linalg
from conformance import RULES, every_rule

from momentum_optax import analysis, rules
from tests.analysis.runs import one_velocity, run


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_stationary_variance_of_the_heavy_ball(decay):
    rate, curvature, sigma = 0.05, np.array([0.1, 1.0, 10.0]), 4.0
    expected = rate * sigma * (1 + decay) / ((1 - decay) * curvature * (2 * (1 + decay) - rate * curvature))
    got = analysis.stationary_variance(rules.heavy_ball(decay), rate, curvature, sigma)
    np.testing.assert_allclose(got, expected, rtol=1e-11)
    small = analysis.stationary_variance(rules.heavy_ball(decay), 1e-7, 1.0, sigma)
    assert small == pytest.approx(1e-7 * sigma / (2 * (1 - decay)), rel=1e-4)


def test_stationary_variance_of_any_rule_with_one_velocity():
    rng = np.random.default_rng(0)
    checked = 0
    while checked < 300:
        a, h0, h1, lr = rng.uniform(-0.99, 0.99), *rng.normal(size=2), float(rng.uniform(0.01, 1))
        rule = one_velocity(a, h0, h1)
        if analysis.spectral_radius(rule, lr, 1.0) < 0.999:
            p1, p2 = 1 + a - lr * h0, -(a + lr * h1)
            numerator = (1 - p2) * (h0**2 + h1**2) + 2 * p1 * h0 * h1
            expected = lr**2 * numerator / ((1 + p2) * ((1 - p2) ** 2 - p1**2))
            assert analysis.stationary_variance(rule, lr, 1.0, 1.0) == pytest.approx(expected, rel=1e-9)
            checked += 1


@pytest.mark.one_in(8)
@every_rule
def test_stationary_variance_is_the_sum_of_squares_of_the_runs_answer_to_one_kick(rule, x64):
    # Of independent noise each step's kick fades on its own, so variances add: no sampling is needed.
    r = RULES[rule]()
    # Frozen: they never settle, or take 10^5 steps to, or have a variance for each phase of a period.
    if r.period != 1 or rule == "nadam_mix":
        r = r.at(5)
    rate = 0.3 * analysis.stability_limit(r, 2.0)
    late = 3000  # where first steps and debiasing weights are over

    def kicked(x, t):
        return 2.0 * x + (t == late)

    for points, point in zip(run(r, rate, kicked, np.zeros(1), late + 12_000), analysis.loop.POINTS, strict=True):
        variance = analysis.stationary_variance(r, rate, 2.0, 3.0, point=point)
        assert variance == pytest.approx(3.0 * np.sum(points**2), rel=1e-9)


@every_rule
def test_stationary_variance_is_that_of_scipys_lyapunov_equation(rule):
    # Without the loop's matrix of the analysis: one step of (theta, v) is written out again, from A, B, C and D.
    r = RULES[rule]().at(5)
    learning_rate, curvature, noise = 0.3 * analysis.stability_limit(r, 2.0), 2.0, 3.0
    A, B, C, D = r.pruned().matrices()
    step = np.block([[1 - learning_rate * curvature * D, -learning_rate * C], [curvature * B[:, None], A]])
    kick = np.concatenate([[-learning_rate * D], B])
    covariance = scipy.linalg.solve_discrete_lyapunov(step, noise * np.outer(kick, kick))
    ahead = np.concatenate([[1.0], learning_rate * np.array(r.pruned().lookahead)])
    for point, weights in (("stored", np.eye(1, len(kick))[0]), ("evaluated", ahead)):
        got = analysis.stationary_variance(r, learning_rate, curvature, noise, point=point)
        assert got == pytest.approx(weights @ covariance @ weights, rel=1e-8)


def test_stationary_variance_without_convergence_is_infinite():
    got = analysis.stationary_variance(rules.heavy_ball(0.9), [0.1, 4.0], 1.0, 0.0)
    assert list(got) == [0.0, np.inf]


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.stationary_variance(BALL, 0.0, 1.0), ValueError, r"learning_rate must be in \(0, inf\)"),
    (lambda: analysis.stationary_variance(BALL, 0.1, 1.0, -1.0), ValueError, r"noise_variance must be in \[0, inf\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
