"""Rules with a period: predicted against runs of the transformation, closed forms and SciPy's Lyapunov solver."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import momentum_optax as mo
from momentum_optax import analysis
from momentum_optax.filters.coefficients import Periodic
from tests.analysis.runs import one_velocity, quadratic, run

RESTARTS = mo.nesterov(mo.schedules.restarted(mo.schedules.nesterov_convex(), 10))
CYCLES = mo.heavy_ball(mo.schedules.cyclical(0.5, 0.95, 8))
# With their periods, which the rules must know by themselves.
RULES = {
    "Lookahead": (mo.lookahead(5, 0.5), 5),
    "SNOO": (mo.outer_nesterov(28, 0.68, 0.37), 28),
    "MuLoCo": (mo.outer_nesterov(30, 0.7, 0.5), 30),
    "DiLoCo": (mo.outer_nesterov(12, 0.7, 0.9), 12),
    "restarts": (RESTARTS, 10),
    "cycles": (CYCLES, 8),
    # The only one whose point to evaluate is read with weights that change.
    "averages": (mo.primal_averaging(0.9, mo.schedules.cyclical(0.2, 0.8, 6)), 6),
}
every_periodic_rule = pytest.mark.parametrize("name", RULES)


def matrices(rule, phase, rate, curvature):
    """One step of (theta, v), and what a gradient of 1 adds, written out from A, B, C and D."""
    A, B, C, D = rule.at(phase).matrices()
    step = np.block([[1 - rate * curvature * D, -rate * C], [curvature * B[:, None], A]])
    return step, np.concatenate([[-rate * D], B])


def test_the_period_is_known_from_the_schedules():
    for rule, period in RULES.values():
        assert rule.period == period
    assert mo.quasi_hyperbolic(mo.schedules.cyclical(0.5, 0.9, 4), mo.schedules.cyclical(0.5, 0.9, 6)).period == 12
    assert mo.lookahead(6).scale(mo.schedules.restarted(lambda t: 1 / (1 + t), 4)).period == 12
    assert mo.heavy_ball(0.9).period == mo.heavy_ball(0.9, first_step="gradient").period == 1
    first = mo.heavy_ball(mo.schedules.cyclical(0.5, 0.9, 4), dampening=0.3, first_step="gradient")
    assert first.period == 4
    for schedule in (lambda t: 0.9, mo.schedules.fista(), mo.schedules.restarted(lambda t: t / 9, [3, 6])):
        assert mo.nesterov(schedule).period is None
        assert mo.lookahead(6).scale(schedule).period is None


def test_a_rule_that_is_merely_scheduled_still_asks_for_a_step():
    for rule in (mo.heavy_ball(lambda t: 0.9 - 0.1 * (t % 2)), mo.nesterov(mo.schedules.fista())):
        for function in (
            lambda r: analysis.stability_limit(r, 1.0),
            lambda r: analysis.monodromy(r, 0.1, 1.0),
            lambda r: analysis.variance_over_a_period(r, 0.1, 1.0),
            analysis.noise_gain,
        ):
            with pytest.raises(ValueError, match=r"A\[0\]\[0\] depends on the step: step must choose one"):
                function(rule)
    with pytest.raises(ValueError, match=r"depends on the step: step must choose one.* schedules\.restarted"):
        analysis.bandwidth(mo.lookahead(5))


@pytest.mark.one_in(4)
@every_periodic_rule
def test_the_contraction_of_a_period_is_that_of_the_run_within_one_percent(name, x64):
    rule, period = RULES[name]
    spectrum = np.random.default_rng(len(name)).uniform(0.2, 4.0, 6)
    hessian, _ = quadratic(spectrum, seed=len(name))
    rate = 0.5 * analysis.stability_limit(rule, spectrum.max())
    predicted = period * np.log(analysis.spectral_radius(rule, rate, spectrum).max())
    periods = int(250 / -predicted)
    points, _ = run(rule, rate, lambda x, t: hessian @ x, np.ones(6), periods * period)
    sizes = np.log(abs(points[::period]).max(1))
    window = np.arange(periods // 3, periods + 1)
    measured = np.polyfit(window, sizes[window], 1)[0]
    assert measured < -0.01
    assert measured == pytest.approx(predicted, rel=0.01)
    assert analysis.contraction(rule, rate, 0.2, 4.0) >= math.exp(predicted / period)


@pytest.mark.one_in(2)
@every_periodic_rule
def test_the_variance_of_each_phase_is_the_sum_of_squares_of_the_runs_answers_to_kicks(name, x64):
    # One parameter for each phase, kicked once, late, at a step of that phase. The kicks of independent noise add up in
    # their variances, so nothing is sampled.
    rule, period = RULES[name]
    rate, curvature, noise = 0.3 * analysis.stability_limit(rule, 2.0), 2.0, 3.0
    kicked_at = period * 2 + np.arange(period)
    lasts = int(60 / -np.log(analysis.spectral_radius(rule, rate, curvature)) / period + 4) * period

    def gradient(x, t):
        return curvature * x + (t == jnp.asarray(kicked_at))

    both = run(rule, rate, gradient, np.zeros(period), lasts)
    for points, point in zip(both, analysis.loop.POINTS, strict=True):
        squares = np.sum(points[: lasts - lasts % period] ** 2, 1).reshape(-1, period).sum(0)
        got = analysis.variance_over_a_period(rule, rate, curvature, noise, point=point)
        np.testing.assert_allclose(got, noise * squares, rtol=1e-8)
        mean = analysis.stationary_variance(rule, rate, curvature, noise, point=point)
        assert mean == pytest.approx(noise * squares.mean(), rel=1e-8)


@every_periodic_rule
def test_the_variances_solve_the_lyapunov_equation_of_the_lifted_system(name):
    # One period as one step whose noise has k entries; SciPy solves it, and the phases follow.
    rule, period = RULES[name]
    rate, curvature = 0.4 * analysis.stability_limit(rule, 1.3), 1.3
    pairs = [matrices(rule, phase, rate, curvature) for phase in range(period)]
    whole, noise = np.eye(len(pairs[0][1])), []
    for step, kick in pairs:
        whole, noise = step @ whole, [*(step @ column for column in noise), kick]
    noise = np.stack(noise, 1)
    np.testing.assert_allclose(analysis.monodromy(rule, rate, curvature), whole, rtol=1e-12, atol=1e-14)
    covariance = scipy.linalg.solve_discrete_lyapunov(whole, noise @ noise.T)
    expected = []
    for step, kick in pairs:
        expected.append(covariance[0, 0])
        covariance = step @ covariance @ step.T + np.outer(kick, kick)
    np.testing.assert_allclose(analysis.variance_over_a_period(rule, rate, curvature), expected, rtol=1e-9)


@pytest.mark.one_in(2)
@every_periodic_rule
def test_gains_and_lags_are_those_of_the_responses(name):
    rule, period = RULES[name]
    n = period * math.ceil(25 * max(analysis.half_life(rule), 1) / period)
    responses = rule.response(np.eye(n + period))[n:]  # update, gradient: the last period
    ages = np.arange(n, n + period)[:, None] - np.arange(n + period)
    assert analysis.dc_gain(rule) == pytest.approx(responses.sum() / period, rel=1e-6)
    assert analysis.noise_gain(rule) == pytest.approx((responses**2).sum() / period, rel=1e-9)
    assert analysis.mean_lag(rule) == pytest.approx((ages * responses).sum() / responses.sum(), rel=1e-5)


def test_a_half_life_counts_steps():
    poles = analysis.poles(mo.outer_nesterov(12, 0.7, 0.9))
    np.testing.assert_allclose(sorted(abs(poles)), [0.0, 0.9], atol=1e-12)
    assert analysis.half_life(mo.outer_nesterov(12, 0.7, 0.9)) == pytest.approx(12 * math.log(2) / -math.log(0.9))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("point", analysis.loop.POINTS)
@every_periodic_rule
def test_iterations_and_transients_are_those_of_the_run(name, point):
    rule, _ = RULES[name]
    rate, curvature = 0.8 * analysis.stability_limit(rule, 1.0), np.array([0.2, 1.0])
    curve = abs(analysis.error_curve(rule, rate, curvature, 1000, point=point))
    counts = analysis.iterations(rule, rate, curvature, 1e-4, point=point)
    for count, errors in zip(counts, curve.T, strict=True):
        assert np.all(errors[int(count) :] <= 1e-4)
        assert errors[int(count) - 1] > 1e-4
    np.testing.assert_allclose(analysis.transient_growth(rule, rate, curvature, point=point), curve.max(0), rtol=1e-9)


@pytest.mark.parametrize(("period", "share"), [(1, 0.5), (3, 0.3), (5, 0.5), (5, 1.0), (25, 0.8), (6, 0.5)])
def test_the_stability_limit_of_lookahead_is_the_closed_one(period, share):
    # Of plain descent, a meeting multiplies by 1 - a + a (1 - x)^k, which is -1 first where k is odd, else 1.
    expected = 1 + ((2 / share - 1) ** (1 / period) if period % 2 else 1)
    got = analysis.stability_limit(mo.lookahead(period, share), np.array([1.0, 4.0]))
    np.testing.assert_allclose(got, [expected, expected / 4], rtol=1e-12)


def test_a_constant_rule_said_to_repeat_has_the_numbers_of_the_constant_one():
    constant = one_velocity(0.8, 1.0, 0.3)
    for k in (1, 7):
        rule = constant.scale(Periodic(lambda t: 1.0, k))
        for function in (
            lambda r: analysis.stability_limit(r, 2.0),
            lambda r: analysis.spectral_radius(r, 0.3, [0.1, 1.0]),
            lambda r: analysis.contraction(r, 0.3, 0.1, 1.0),
            lambda r: analysis.stationary_variance(r, 0.3, [0.1, 1.0]),
            lambda r: analysis.iterations(r, 0.3, [0.1, 1.0]),
            lambda r: analysis.transient_growth(r, 0.3, [0.1, 1.0]),
            analysis.dc_gain,
            analysis.mean_lag,
            analysis.noise_gain,
            analysis.half_life,
            lambda r: analysis.precision(r, mo.storage.bfloat16()).noise,
            lambda r: analysis.precision(r, mo.storage.bfloat16()).stall,
        ):
            np.testing.assert_allclose(function(rule), function(constant), rtol=1e-9)


def test_a_look_ahead_alone_may_have_a_period():
    ahead = (0.0, 0.5, 2.0)
    rule = mo.Filter(0.9, 1.0, 0.9, 1.0, Periodic(lambda t: ahead[t % 3], 3))
    assert analysis.dc_gain(rule) == pytest.approx(10)
    got = analysis.variance_over_a_period(rule, 0.1, 1.0, point="evaluated")
    each = [mo.Filter(0.9, 1.0, 0.9, 1.0, x) for x in ahead]
    after = [analysis.stationary_variance(one, 0.1, 1.0, point="evaluated") for one in each]
    # Entry 0 is after the last step of a period.
    np.testing.assert_allclose(got, np.roll(after, 1), rtol=1e-9)


def alternating(first, second):
    """A heavy ball of decays that alternate."""
    return mo.heavy_ball(Periodic(lambda t: first + (second - first) * (t % 2), 2))


def test_a_narrow_band_of_resonance_is_found():
    # A frictionless swing, nearly: its decay pumped a little at twice its frequency, |trace| > 1 + det near x = 2.
    rule = alternating(0.99999, 0.9999)
    x = np.linspace(0.01, 4.0, 400_001)
    product = 0.99999 * 0.9999
    # With M_t = [[1 - x, -b], [x, ...]] the trace is that of the product of [[1 + b - x, -b], [1, 0]].
    trace = (1 + 0.99999 - x) * (1 + 0.9999 - x) - 0.99999 - 0.9999
    unstable = abs(trace) > 1 + product
    first = x[np.argmax(unstable)]
    assert analysis.stability_limit(rule, 1.0) == pytest.approx(first, abs=2e-5)
    for a, b in ((0.9, 0.5), (0.99, 0.2), (0.3, -0.6)):
        unstable = abs((1 + a - x) * (1 + b - x) - a - b) > 1 + a * b
        assert analysis.stability_limit(alternating(a, b), 1.0) == pytest.approx(x[np.argmax(unstable)], abs=2e-5)


def test_games_and_rules_that_never_converge():
    rule = mo.outer_nesterov(4, 0.5, 0.2)
    direction = np.exp(1j * np.array([0.3, 1.0]))
    limits = analysis.stability_limit(rule, direction)
    below, above = analysis.spectral_radius(rule, [[0.999], [1.001]] * limits, direction)
    assert np.all(below < 1)
    assert np.all(above > 1)
    assert analysis.stability_limit(mo.lookahead(3).scale(-1.0), 1.0) == 0
    assert analysis.stability_limit(mo.lookahead(1), 1j) == analysis.stability_limit(mo.lookahead(3, 0.7), 1j) == 0
    assert np.all(analysis.variance_over_a_period(mo.lookahead(3), [2.5], 1.0) == np.inf)


# Of plain descent on a rotation a meeting multiplies by 1 - a + a (1 - ix)^k, of squared modulus 1 + x^2 times
# a (4 a - 2) + a^2 x^2 for k = 2, and (x^4 + 3 x^2 - 3) / 4 for k = 3 and a = 1/2.
TURNED = [(2, 0.3, (2 / 0.3 - 4) ** 0.5), (2, 0.01, 14), (3, 0.5, ((21**0.5 - 3) / 2) ** 0.5), (2, 0.5, 0.0)]


@pytest.mark.parametrize("row", TURNED)
def test_lookahead_converges_in_a_game_in_which_plain_descent_does_not(row):
    period, share, expected = row
    rule = mo.lookahead(period, share)
    assert analysis.stability_limit(rule, [1j, -4j]) == pytest.approx([expected, expected / 4], rel=1e-9)
    # Of rules that are all but that of a limit of 0, no more than rounding tells is wrong.
    assert analysis.stability_limit(rule.scale(1e-6), 1j) == pytest.approx(1e6 * expected, rel=1e-9)


def test_a_loop_that_overflows_within_a_period_diverges():
    for rule in (mo.lookahead(150), mo.outer_nesterov(150)):
        for function in (
            analysis.spectral_radius,
            analysis.stationary_variance,
            analysis.iterations,
            analysis.transient_growth,
        ):
            assert list(function(rule, [1000.0, 0.1], 1.0) == np.inf) == [True, False], function
        assert np.all(analysis.variance_over_a_period(rule, 1e6, 1.0) == np.inf)


def test_a_report_says_the_period(capsys):
    found = analysis.report(mo.outer_nesterov(12, 0.7, 0.9), learning_rate=0.1, L=1.0, mu=0.1)
    assert found.period == 12
    assert found.memory is found.bandwidth is None
    assert "12  steps" in capsys.readouterr().out
    assert found.contraction == analysis.contraction(mo.outer_nesterov(12, 0.7, 0.9), 0.1, 0.1, 1.0)


@pytest.mark.parametrize("rule", [mo.lookahead(5, 0.5), mo.nesterov(0.8)], ids=["periodic", "constant"])
def test_curvatures_behind_frozen_adam_are_those_of_the_preconditioned_hessian(rule, x64):
    spectrum = np.array([0.3, 1.0, 1.7, 2.6])
    hessian, _ = quadratic(spectrum, seed=3)
    second = np.array([0.04, 1.0, 0.3, 2.5])
    scale = 1 / (np.sqrt(second) + 1e-3)
    curvature = np.linalg.eigvalsh(np.sqrt(scale)[:, None] * hessian * np.sqrt(scale))
    rate = 0.4 * analysis.stability_limit(rule, curvature.max())

    # Adam's direction with moments that stand still: a decay of 1 - 1e-12, whose correction after 1000 steps is 1e-9.
    still = optax.scale_by_adam(b1=0.0, b2=1 - 1e-12, eps=1e-3)
    corrected = 1 - (1 - 1e-12) ** 1001
    state = optax.ScaleByAdamState(jnp.int32(1000), jnp.zeros(4), jnp.asarray(second) * corrected)

    def directions(x, t):
        return still.update(hessian @ x, state)[0]

    predicted = np.log(analysis.spectral_radius(rule, rate, curvature).max())
    steps = int(250 / -predicted) // 5 * 5
    points, _ = run(rule, rate, directions, np.ones(4), steps)
    window = np.arange(steps // 15, steps // 5 + 1) * 5
    measured = np.polyfit(window, np.log(abs(points).max(1))[window], 1)[0]
    assert measured == pytest.approx(predicted, rel=0.01)
    unscaled = np.log(analysis.spectral_radius(rule, rate, spectrum).max())
    assert abs(unscaled - predicted) > 0.05 * abs(predicted), "the raw curvatures would not do"
