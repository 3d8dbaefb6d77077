"""Contraction, stability limits, iterations and transients, against closed forms and runs of the transformation."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from conformance import RULES, every_rule

import momentum_optax as mo
from momentum_optax import analysis, rules, tuning
from tests.analysis.runs import SPECTRUM, half_of_the_limit, one_velocity, quadratic, run

KAPPAS = (10.0, 100.0, 1e4)


# Coefficients that never settle, or not within 10^4 steps, so that no eigenvalue says how fast it converges.
UNSETTLED = {"implicit_transport", "nadam_mix", "schedule_free"}


@pytest.mark.one_in(8)
@every_rule
def test_predicted_and_measured_contraction_agree_within_one_percent(rule, x64):
    r = RULES[rule]()
    rate = half_of_the_limit(r)
    hessian, basis = quadratic(SPECTRUM)
    settled = 10**6 if r.period in (None, 1) else None
    predicted = np.log(analysis.spectral_radius(r, rate, SPECTRUM, step=settled).max())
    # Far enough for oscillations to average out, and not as far as the smallest float64.
    steps = 4000 if rule in UNSETTLED else int(min(400 / -predicted, 60_000))
    points, _ = run(r, rate, lambda x, t: hessian @ x, np.ones(len(SPECTRUM)), steps)
    window = np.arange(steps // 3, steps + 1)

    def fall(points):
        return np.polyfit(window, np.log(abs(points).max(1))[window], 1)[0]  # no squares: they would underflow

    measured = fall(points)
    if rule in UNSETTLED:
        curve = analysis.error_curve(r, rate, SPECTRUM, steps) * (basis.T @ np.ones(len(SPECTRUM)))
        predicted = fall(curve @ basis.T)
    assert measured < -1e-4, "did not converge"
    assert measured == pytest.approx(predicted, rel=0.01)


@pytest.mark.one_in(8)
@every_rule
def test_the_run_converges_below_the_stability_limit_and_diverges_above(rule, x64):
    r = RULES[rule]()
    if rule == "nadam_mix":  # takes 10^5 steps to settle
        r = r.at(1000)
    limit = analysis.stability_limit(r, 3.0, step=10**6 if r.period in (None, 1) else None)
    sizes = []
    for factor in (0.97, 1.03):
        points, _ = run(r, factor * limit, lambda x, t: 3.0 * x, np.ones(1), 3000)
        with np.errstate(divide="ignore"):
            sizes.append(np.log(np.abs(points).max(1)))
    late = slice(1500, 3001)
    assert sizes[0][late].max() < sizes[0][:1500].max() - 1
    assert not sizes[1][late].max() < sizes[1][:1500].max() + 1


@pytest.mark.parametrize("decay", [-0.5, 0.1, 0.5, 0.9, 0.999])
def test_stability_limits_of_rules_with_one_velocity(decay):
    limit = {
        "heavy_ball": (rules.heavy_ball(decay), 2 * (1 + decay)),
        "quasi_hyperbolic": (rules.quasi_hyperbolic(decay, 0.7), 2 * (1 + decay) / (1 + decay * (1 - 2 * 0.7))),
    }
    if decay > 0:
        limit["nesterov"] = (rules.nesterov(decay), 2 * (1 + decay) / (1 + 2 * decay))
    for name, (rule, expected) in limit.items():
        got = analysis.stability_limit(rule, np.array([1.0, 4.0]))
        np.testing.assert_allclose(got, [expected, expected / 4], rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("decays", [(0.0, 0.9, 0.99), (0.5,), (0.0, 0.9, 0.99, 0.999), (0.3, 0.3, 0.8)])
def test_stability_limit_of_aggregated_momentum(decays):
    expected = 2 * len(decays) / sum(1 / (1 + b) for b in decays)
    assert analysis.stability_limit(rules.aggregated(decays), 1.0) == pytest.approx(expected, rel=1e-9)
    if decays == (0.0, 0.9, 0.99):
        assert expected == pytest.approx(2.957372, abs=5e-7)


def test_stability_of_one_velocity_is_jurys_criterion():
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(2000):
        a, h0, h1 = rng.uniform(-1, 1), *rng.normal(size=2)
        scale = float(rng.uniform(0.05, 4))
        margins = [scale * (h0 + h1), 1 - abs(a + scale * h1), 2 * (1 + a) - scale * (h0 - h1)]
        if min(abs(m) for m in margins) > 1e-6:
            stable = analysis.spectral_radius(one_velocity(a, h0, h1), scale, 1.0) < 1
            assert stable == (min(margins) > 0)
            checked += stable
    assert checked > 200


def test_stability_limits_of_random_filters_of_any_order_and_direction():
    rng = np.random.default_rng(1)
    positive = 0
    grid = np.geomspace(1e-8, 1e3, 800)
    for _ in range(60):
        K = int(rng.integers(1, 6))
        A = rng.normal(size=(K, K))
        A *= rng.uniform(0, 0.99) / abs(np.linalg.eigvals(A)).max()
        rule = mo.Filter(A, rng.normal(size=K), rng.normal(size=K), float(rng.normal()))
        direction = np.exp(1j * rng.uniform(-1.5, 1.5)) if rng.random() < 0.3 else 1.0
        limit = analysis.stability_limit(rule, direction)
        unstable = grid[analysis.spectral_radius(rule, grid, direction) >= 1]
        if limit == 0:
            assert unstable[0] < 1e-6
            continue
        positive += 1
        below, above = analysis.spectral_radius(rule, limit * np.array([1 - 1e-6, 1 + 1e-6]), direction)
        assert below < 1 < above
        assert not len(unstable) or unstable[0] > limit * (1 - 1e-9)
    assert positive > 20


@pytest.mark.parametrize("a", [-0.5, 0.1, 0.5, 0.7, 0.9, 0.99])
def test_stability_limits_where_three_roots_reach_minus_one_at_once(a):
    # With h1/h0 = (1 - a)/(3 + a) a pair of complex roots arrives together with the real one, at the rate 3 + a. A
    # threefold root is known to the cube root of the rounding.
    assert analysis.stability_limit(one_velocity(a, 1.0, (1 - a) / (3 + a)), 1.0) == pytest.approx(3 + a, rel=1e-7)


def test_the_stability_limit_scales_with_the_rule():
    for gain in (1e-15, 1e15):
        for rule, expected in ((rules.heavy_ball(0.9), 3.8), (rules.lookahead(3, 0.5), 1 + 3 ** (1 / 3))):
            assert analysis.stability_limit(rule.scale(gain), 1.0) == pytest.approx(expected / gain, rel=1e-9, abs=0)


def test_rules_that_never_converge_have_no_stable_rate():
    for rule in (mo.Filter(1.0, 1.0, 1.0, 1.0), mo.Filter(0.0, 0.0, 0.0, 0.0), rules.heavy_ball(0.9).scale(-1.0)):
        assert analysis.stability_limit(rule, 1.0) == 0


TUNED = {
    "gradient descent": (tuning.gradient_descent, lambda k: (k - 1) / (k + 1)),
    "heavy ball": (tuning.optimal_heavy_ball, lambda k: (k**0.5 - 1) / (k**0.5 + 1)),
    "Nesterov": (tuning.smooth_nesterov, lambda k: 1 - 1 / k**0.5),
    "Nesterov, best for quadratics": (tuning.quadratic_nesterov, lambda k: 1 - 2 / (3 * k + 1) ** 0.5),
    "triple momentum": (tuning.optimal_triple_momentum, lambda k: 1 - 1 / k**0.5),
}


@pytest.mark.parametrize("kappa", KAPPAS)
@pytest.mark.parametrize("name", TUNED)
def test_the_worst_contraction_over_a_spectrum_is_the_theorys(name, kappa):
    tune, expected = TUNED[name]
    tuned = tune(3.0, 3.0 / kappa)
    worst = analysis.contraction(tuned.rule, tuned.learning_rate, 3.0 / kappa, 3.0)
    # Double roots at the ends of the interval, found to the square root of float64's rounding.
    assert worst == pytest.approx(expected(kappa), rel=1e-7)
    assert tuned.contraction == pytest.approx(expected(kappa), rel=1e-12)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", TUNED)
def test_the_worst_contraction_is_that_of_a_run(name, x64):
    tune, expected = TUNED[name]
    tuned = tune(3.0, 0.03)
    curvature = np.geomspace(0.03, 3.0, 9)
    hessian, _ = quadratic(curvature)
    _, points = run(tuned.rule, tuned.learning_rate, lambda x, t: hessian @ x, np.ones(9), 2500)
    sizes = np.log(abs(points).max(1))
    # A double root makes the error t times a power: between steps n and 2n it costs ln 2.
    double = name != "gradient descent"
    measured = (sizes[2500] - sizes[1250] - (math.log(2) if double else 0)) / 1250
    assert measured == pytest.approx(math.log(expected(100.0)), rel=0.01)


def test_a_worst_curvature_inside_the_interval_is_found():
    rule = mo.Filter(((-0.35, 0.0), (0.0, 0.36)), (1.0, 1.0), (-0.09, 0.74), 1.0)
    radii = analysis.spectral_radius(rule, 1.0, np.linspace(0.34, 3.2, 100_001))
    assert radii.max() > max(radii[0], radii[-1]) + 0.05
    assert analysis.contraction(rule, 1.0, 0.34, 3.2) == pytest.approx(radii.max(), abs=1e-9)


def test_a_worst_curvature_a_millionth_of_the_largest_is_found():
    # Poles very near 1 behind zeros less near: the loop (z - 1)(z - p)^2 + c (z - b)^2 diverges for small c; and from
    # the largest one here on, with a root at -1, so that between these two nothing looks worse than the largest.
    p, b = 1 - 5e-5, 1 - 1e-3
    mu, L = 3e-8, 2 * ((1 + p) / (1 + b)) ** 2 * (1 - 2.5e-6)
    rule = mo.Filter(((p, 1.0), (0.0, p)), (0.0, 1.0), ((p - b) ** 2, 2 * (p - b)), 1.0)
    curvature = np.geomspace(mu, L, 1001)
    radii = [abs(np.roots(np.poly([1, p, p]) + c * np.array([0, 1, -2 * b, b * b]))).max() for c in curvature]
    assert max(radii) > 1 + 5e-5
    assert radii[0] < radii[-1] < 1
    assert 1e-6 < curvature[np.argmax(radii)] / L < 1e-3
    # A threefold root near 1 is known to the cube root of the rounding.
    assert analysis.contraction(rule, 1.0, mu, L) == pytest.approx(max(radii), abs=2e-6)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_the_optimal_heavy_balls_transient_is_one_plus_bt(kappa, x64):
    tuned = tuning.optimal_heavy_ball(1.0, 1 / kappa)
    r, root, n = tuned.contraction, math.sqrt(kappa), 300
    t = np.arange(n + 1)
    expected = np.array([(1 + 2 / (root + 1) * t) * r**t, (1 + 2 * root / (root + 1) * t) * (-r) ** t]).T
    curvature = np.array([1 / kappa, 1.0])
    np.testing.assert_allclose(
        analysis.error_curve(tuned.rule, tuned.learning_rate, curvature, n), expected, rtol=0, atol=1e-8
    )
    points, _ = run(tuned.rule, tuned.learning_rate, lambda x, t: curvature * x, np.ones(2), n)
    np.testing.assert_allclose(points, expected, rtol=0, atol=1e-8)
    # The peak of the formula, over more steps than it needs.
    t = np.arange(1000)
    peak = (abs(1 + 2 * root / (root + 1) * t) * r**t).max()
    growth = analysis.transient_growth(tuned.rule, tuned.learning_rate, curvature)
    np.testing.assert_allclose(growth, [1.0, peak], rtol=1e-8)
    if kappa == 1e4:
        assert peak == pytest.approx(root / math.e, rel=0.02)


def test_lessards_cycle(x64):
    # f' = 25 x below 1, x + 24 up to 2, 25 x - 24 above: strongly convex, smooth, and too much for the heavy ball.
    def slope(x, t):
        return jnp.where(x < 1, 25 * x, jnp.where(x < 2, x + 24, 25 * x - 24))

    ends = {}
    for name, (tune, _) in TUNED.items():
        tuned = tune(25.0, 1.0)
        ends[name] = run(tuned.rule, tuned.learning_rate, slope, np.array([3.3]), 200)
    tuned = tuning.optimal_heavy_ball(25.0, 1.0)
    assert (tuned.learning_rate, tuned.decay) == pytest.approx((1 / 9, 4 / 9), rel=1e-12)
    cycle = np.sort(ends["heavy ball"][0][-3:, 0])
    np.testing.assert_allclose(cycle, np.array([-2208, 792, 2592]) / 1225, rtol=0, atol=1e-6)
    # All others converge, each below what it was seen to reach.
    for name, most in (("Nesterov", 1e-15), ("triple momentum", 1e-15), ("gradient descent", 2e-7)):
        assert abs(ends[name][1][-1, 0]) < most, name


def test_the_evaluated_points_of_a_run_have_the_look_ahead_of_each_step():
    rule = mo.Filter(0.5, 1.0, 0.5, 1.0, lambda step: step + 1.0)
    stored, evaluated = (analysis.error_curve(rule, 0.1, 1.0, 4, point=point) for point in ("stored", "evaluated"))
    v, expected = 0.0, [1.0]
    for t in range(4):
        v = 0.5 * v + stored[t]
        expected.append(stored[t + 1] + 0.1 * (t + 1) * v)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-14)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("point", analysis.loop.POINTS)
@pytest.mark.parametrize("tolerance", [0.5, 1e-3, 1e-5])
def test_iterations_are_counted_on_the_run_itself(tolerance, point):
    rule, curvature = rules.nesterov(0.95), np.array([1e-4, 0.02, 0.5, 1.0])
    counts = analysis.iterations(rule, 0.7, curvature, tolerance, point=point)
    curve = abs(analysis.error_curve(rule, 0.7, curvature, 9000, point=point))
    for count, errors in zip(counts, curve.T, strict=True):
        assert np.all(errors[int(count) :] <= tolerance)
        assert errors[int(count) - 1] > tolerance


def test_iterations_without_convergence_and_without_a_transient():
    assert analysis.iterations(rules.heavy_ball(0.9), 4.0, 1.0) == np.inf
    assert analysis.transient_growth(rules.heavy_ball(0.9), 4.0, 1.0) == np.inf
    np.testing.assert_allclose(
        analysis.asymptotic_iterations([0.5, 0.0, 1.0, 2.0], 2.0**-10), [10, 0, np.inf, np.inf], rtol=1e-12
    )
    # Plain descent has no transient: both counts agree to the rounding up.
    exact = analysis.iterations(rules.heavy_ball(0.0), 0.1, 1.0, 1e-6)
    assert exact == math.ceil(analysis.asymptotic_iterations(0.9, 1e-6))


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.stability_limit(BALL, 0.0), ValueError, r"curvature must be in \(0, inf\), got 0.0"),
    (lambda: analysis.stability_limit(BALL, [1.0, -2.0]), ValueError, r"curvature must be .* got -2.0"),
    (lambda: analysis.stability_limit(BALL, 0j), ValueError, "curvature must be other than 0"),
    (lambda: analysis.contraction(BALL, 0.1, 2.0, 1.0), ValueError, "mu must be at most L, got 2.0 above 1.0"),
    (lambda: analysis.contraction(BALL, 0.1, 0.0, 0.0), ValueError, r"L must be in \(0, inf\)"),
    (lambda: analysis.iterations(BALL, 0.1, 1.0, 0.0), ValueError, r"tolerance must be in \(0, inf\), got 0.0"),
    (lambda: analysis.iterations(BALL, 0.1, 1j), TypeError, "curvature must be a real number"),
    (lambda: analysis.iterations(BALL, 1e-8, 1.0), ValueError, "must settle within 8388608 steps"),
    (lambda: analysis.iterations(BALL, 0.1, 1.0, point="y"), ValueError, "point must be one of 'stored', 'evaluated'"),
    (lambda: analysis.asymptotic_iterations(0.9, 1.0), ValueError, r"tolerance must be in \(0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
