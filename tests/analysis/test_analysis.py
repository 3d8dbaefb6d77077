"""What the analysis predicts: against closed forms, and against runs of the real transformation in float64."""

import ast
import math
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import RULES, every_rule

import momentum_optax as mo
from momentum_optax import analysis, rules, tuning

PACKAGE = pathlib.Path(mo.__file__).parent
KAPPAS = (10.0, 100.0, 1e4)


@pytest.fixture
def x64():
    # A context manager of jax itself since 0.8, of jax.experimental before.
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True):
        yield


def run(rule, rate, gradient, start, steps):
    """The stored and the evaluated points of a run of the transformation: after 0, 1, ..., `steps` steps."""
    tx = mo.scale_by_momentum(rule)
    start = jnp.asarray(start, jnp.float64)

    def step(carry, t):
        x, state = carry
        u, state = tx.update(gradient(x, t), state, x)
        x = mo.apply_updates(x, -rate * u)
        return (x, state), (x, mo.eval_params(rule, state, x, rate))

    _, points = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), jnp.arange(steps)))(start)
    return [np.concatenate([np.asarray(start)[None], np.asarray(p)]) for p in points]


def quadratic(curvature, seed=0):
    """A Hessian with these eigenvalues in a random basis, and the basis, one eigenvector per column."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(curvature),) * 2))[0]
    return basis @ np.diag(curvature) @ basis.T, basis


def one_velocity(a, h0, h1):
    """The filter (h0 + h1/z)/(1 - a/z)."""
    return mo.Filter(a, 1.0, h1 + a * h0, h0)


# No JAX.


def test_no_module_of_the_analysis_imports_jax():
    modules = sorted((PACKAGE / "analysis").glob("*.py"))
    assert len(modules) > 5
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"jax", "jaxlib", "optax", "flax"}, path


def test_the_analysis_runs_where_jax_is_not_even_imported():
    # The package's own __init__ imports JAX; a bare namespace in its place does not.
    script = f"""
import sys, types
package = types.ModuleType("momentum_optax")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["momentum_optax"] = package
from momentum_optax import analysis, rules
analysis.report(rules.aggregated(), learning_rate=0.1, L=1.0, mu=0.01)
analysis.error_curve(rules.chebyshev(1.0, 0.1), 1.0, 1.0, 20)
assert not [name for name in sys.modules if name.startswith("jax")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_rule
def test_everything_is_numpy_in_float64(rule):
    r = RULES[rule]()
    for value in (
        analysis.impulse_response(r, 4),
        analysis.step_response(r, 4),
        analysis.spectral_radius(r, [0.1, 0.2], [[1.0], [2.0]], step=3),
        analysis.stability_limit(r, [1.0, 2.0], step=3),
        analysis.error_curve(r, 0.1, [1.0, 2.0], 3),
        analysis.stationary_variance(r, 0.01, [1.0, 2.0], 1.0, step=3),
    ):
        assert type(value) is np.ndarray
        assert value.dtype == np.float64
    assert analysis.frequency_response(r, [0.1, 0.2], step=3).dtype == np.complex128
    assert type(analysis.spectral_radius(r, 0.1, 1.0, step=3)) is np.float64


# The whole catalogue, measured.

SPECTRUM = np.array([1.0, 1.1, 1.7, 2.2, 3.1, 4.0])
# Coefficients that never settle, or not within 10^4 steps, so that no eigenvalue says how fast it converges.
UNSETTLED = {"nadam_mix", "schedule_free"}


def half_of_the_limit(rule):
    return 0.5 * analysis.stability_limit(rule, SPECTRUM.max(), step=1000)


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


@every_rule
def test_predicted_and_measured_contraction_agree_within_one_percent(rule, x64):
    r = RULES[rule]()
    rate = half_of_the_limit(r)
    hessian, basis = quadratic(SPECTRUM)
    predicted = np.log(analysis.spectral_radius(r, rate, SPECTRUM, step=10**6).max())
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


@every_rule
def test_the_run_converges_below_the_stability_limit_and_diverges_above(rule, x64):
    r = RULES[rule]()
    if rule == "nadam_mix":  # takes 10^5 steps to settle
        r = r.at(1000)
    limit = analysis.stability_limit(r, 3.0, step=10**6)
    sizes = []
    for factor in (0.97, 1.03):
        points, _ = run(r, factor * limit, lambda x, t: 3.0 * x, np.ones(1), 3000)
        with np.errstate(divide="ignore"):
            sizes.append(np.log(np.abs(points).max(1)))
    late = slice(1500, 3001)
    assert sizes[0][late].max() < sizes[0][:1500].max() - 1
    assert not sizes[1][late].max() < sizes[1][:1500].max() + 1


# Stability and rates.


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


# Energy.


def landscape(x, t):
    """The slope of x^2/20 + 1 - cos 2x, whose curvature is at most 4.1."""
    return 0.1 * x + 2 * jnp.sin(2 * x)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_below_its_limit_a_heavy_ball_from_rest_never_climbs_above_its_start(decay, x64):
    starts = np.random.default_rng(0).uniform(-12, 12, 400)
    rule = rules.heavy_ball(decay)
    limit = analysis.energy_limit(rule, 4.1)
    assert limit == pytest.approx(2 * (1 - decay) / 4.1, rel=1e-12)
    rises = []
    for factor in (1.0, 1.5):
        points, _ = run(rule, factor * limit, landscape, starts, 400)
        losses = points**2 / 20 + 1 - np.cos(2 * points)
        energies = np.stack(
            [analysis.energy(rule, factor * limit, f, x) for f, x in zip(losses.T, points.T, strict=True)]
        )
        rises.append((np.diff(energies, axis=1).max(), (losses - losses[0]).max()))
    assert rises[0][0] < 1e-13
    assert rises[0][1] < 1e-13
    assert rises[1][0] > 1e-3


def test_the_energy_of_equal_rules_is_equal():
    x = np.random.default_rng(0).normal(size=(6, 3))
    f = np.arange(6.0)
    ball = analysis.energy(rules.heavy_ball(0.9), 0.01, f, x)
    np.testing.assert_allclose(analysis.energy(rules.ema(0.9), 0.1, f, x), ball, rtol=1e-12)
    steps = np.concatenate([[0], np.sum(np.diff(x, axis=0) ** 2, 1)])
    np.testing.assert_allclose(ball, f + 0.9 / (2 * 0.01) * steps, rtol=1e-12)
    assert analysis.energy_limit(rules.ema(0.9), 2.0) == pytest.approx(1.0, rel=1e-12)


# Noise.


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


@every_rule
def test_stationary_variance_is_the_sum_of_squares_of_the_runs_answer_to_one_kick(rule, x64):
    # Of independent noise each step's kick fades on its own, so variances add: no sampling is needed.
    r = RULES[rule]()
    if rule in ("schedule_free", "chebyshev", "nadam_mix"):  # frozen: they never settle, or take 10^5 steps to
        r = r.at(5)
    rate = 0.3 * analysis.stability_limit(r, 2.0)
    late = 3000  # where first steps and debiasing weights are over

    def kicked(x, t):
        return 2.0 * x + (t == late)

    for points, point in zip(run(r, rate, kicked, np.zeros(1), late + 12_000), analysis.loop.POINTS, strict=True):
        variance = analysis.stationary_variance(r, rate, 2.0, 3.0, point=point)
        assert variance == pytest.approx(3.0 * np.sum(points**2), rel=1e-9)


def test_stationary_variance_without_convergence_is_infinite():
    got = analysis.stationary_variance(rules.heavy_ball(0.9), [0.1, 4.0], 1.0, 0.0)
    assert list(got) == [0.0, np.inf]


# The filter alone.


@pytest.mark.parametrize("decay", [0.3, 0.9, 0.99, 0.9999])
def test_gains_and_delays(decay):
    b, nu = decay, 0.7
    ball, ema, nag, qhm = rules.heavy_ball(b), rules.ema(b), rules.nesterov(b), rules.quasi_hyperbolic(b, nu)
    close = {"rel": 1e-9}
    assert analysis.dc_gain(ball) == pytest.approx(1 / (1 - b), **close)
    assert analysis.dc_gain(ema) == pytest.approx(1, **close)
    assert analysis.noise_gain(ball) == pytest.approx(1 / (1 - b * b), **close)
    assert analysis.noise_gain(ema) == pytest.approx((1 - b) / (1 + b), **close)
    assert analysis.noise_gain(nag) == pytest.approx((1 + b) ** 2 + b**4 / (1 - b * b), **close)
    assert analysis.noise_gain(qhm) == pytest.approx(1 - 2 * b * nu + 2 * b**2 * nu**2 / (1 + b), **close)
    for rule in (ball, ema):
        assert analysis.mean_lag(rule) == pytest.approx(b / (1 - b), **close)
        assert analysis.half_life(rule) == pytest.approx(math.log(2) / -math.log(b), **close)
    for fraction in (0.5, 0.9):
        assert analysis.memory(ema, fraction) == math.ceil(math.log(1 - fraction) / math.log(b))
    # Met exactly, and not again a step later because of a last digit.
    for n in (1, 2, 5):
        assert analysis.memory(ema, 1 - b**n) == n
    w = np.array([0.0, 0.01, 0.5, np.pi])
    expected = (1 - b) / np.sqrt((1 - b) ** 2 + 4 * b * np.sin(w / 2) ** 2)
    np.testing.assert_allclose(abs(analysis.frequency_response(ema, w)), expected, rtol=1e-9)
    assert abs(analysis.frequency_response(qhm, np.pi)) == pytest.approx(abs(1 + b - 2 * nu * b) / (1 + b), **close)
    assert math.cos(analysis.bandwidth(ema)) == pytest.approx(1 - (1 - b) ** 2 / (2 * b), rel=1e-12)
    assert analysis.effective_learning_rate(ball, 0.1) == pytest.approx(0.1 / (1 - b), **close)


def test_half_lives_that_are_often_quoted():
    assert analysis.half_life(rules.ema(0.9)) == pytest.approx(6.579, abs=5e-4)
    assert analysis.half_life(rules.ema(0.99)) == pytest.approx(68.97, abs=5e-3)


SETTLING = [name for name in RULES if name not in ("chebyshev", "schedule_free", "nadam_mix")]


@pytest.mark.parametrize("rule", SETTLING)
def test_the_filters_numbers_are_those_of_the_transformation(rule, x64):
    r = RULES[rule]()
    tx = mo.scale_by_momentum(r)
    late, n = 1500, 4000
    t = np.arange(late + n)
    low, high = 0.02, 2.0
    signals = np.stack([t == late, t >= 0, np.cos(low * t), np.sin(low * t), np.cos(high * t), np.sin(high * t)], 1)
    signals = jnp.asarray(signals, jnp.float64)
    scan = jax.jit(lambda g: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(g[0]), g)[1])
    impulse, constant, *waves = np.asarray(scan(signals)).T
    h = impulse[late:]
    assert constant[-1] == pytest.approx(analysis.dc_gain(r), rel=1e-9)
    assert h @ h == pytest.approx(analysis.noise_gain(r), rel=1e-9)
    assert np.arange(n) @ h / h.sum() == pytest.approx(analysis.mean_lag(r), rel=1e-7)
    np.testing.assert_allclose(constant[:300], analysis.step_response(r, 300), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(h[:50], analysis.impulse_response(r, 50, start=late), rtol=1e-9, atol=1e-12)
    tails = abs(np.cumsum(h[::-1])[::-1])  # of the gradients from the k-th back
    for fraction in (0.4, 0.95):
        remembered = int(analysis.memory(r, fraction))
        allowed = (1 - fraction) * abs(h.sum())
        assert tails[remembered:].max() <= allowed * (1 + 1e-9)
        assert tails[remembered - 1] > allowed * (1 - 1e-9)
    for omega, (cosine, sine) in zip((low, high), (waves[:2], waves[2:]), strict=True):
        turned = (cosine + 1j * sine)[-1] / np.exp(1j * omega * t[-1])
        assert abs(turned - analysis.frequency_response(r, omega)) < 1e-9 * abs(h).sum()
    # The slowest memory halves in a half-life: over ten of them, on the envelope of what it leaves.
    life = analysis.half_life(r)
    if life > 3:
        envelope = np.maximum.accumulate(abs(h)[::-1])[::-1]
        first, last = round(5 * life), round(15 * life)
        assert np.log2(envelope[first] / envelope[last]) == pytest.approx((last - first) / life, rel=0.05)


def test_the_bandwidth_is_where_a_wave_through_the_transformation_has_half_its_power(x64):
    for rule in (rules.ema(0.9), rules.nesterov(0.9), rules.aggregated((0.0, 0.9, 0.99))):
        omega = analysis.bandwidth(rule)
        t = jnp.arange(4000)
        signal = jnp.stack([jnp.cos(omega * t), jnp.sin(omega * t)], 1)
        tx = mo.scale_by_momentum(rule)
        waves = jax.lax.scan(lambda s, g, tx=tx: tx.update(g, s)[::-1], tx.init(signal[0]), signal)[1]
        power = float(jnp.sum(waves[-1] ** 2)) / analysis.dc_gain(rule) ** 2
        assert power == pytest.approx(0.5, rel=1e-9)


def test_poles_come_slowest_first_and_without_those_that_do_nothing():
    np.testing.assert_allclose(analysis.poles(rules.aggregated((0.0, 0.9, 0.99))), [0.99, 0.9], rtol=1e-12)
    got = analysis.poles(rules.complex_heavy_ball(0.9, 0.4))
    np.testing.assert_allclose(sorted(got, key=np.imag), 0.9 * np.exp([-0.4j, 0.4j]), rtol=1e-12)
    assert analysis.half_life(rules.heavy_ball(0.0)) == 0
    assert analysis.half_life(mo.Filter(1.0, 1.0, 1.0, 0.0)) == np.inf


def test_what_has_no_end_is_infinite():
    sum_of_gradients = mo.Filter(1.0, 1.0, 1.0, 1.0)
    for function in (analysis.dc_gain, analysis.half_life, analysis.memory, analysis.mean_lag, analysis.noise_gain):
        assert function(sum_of_gradients) == np.inf
    assert np.isinf(analysis.frequency_response(sum_of_gradients, 0.0))
    assert math.isnan(analysis.mean_lag(rules.optimistic(0.0, 1.0)))
    assert analysis.bandwidth(rules.ema(0.1)) == np.inf


# First steps and schedules.


def test_without_a_step_coefficients_of_the_age_are_those_they_settle_at():
    settled = {
        rules.heavy_ball(0.9, dampening=0.5, first_step="gradient"): rules.heavy_ball(0.9, dampening=0.5),
        rules.ademamix_mix(0.9, 0.99, 2.0): mo.Filter(
            ((0.9, 0.0), (0.0, 0.99)), (0.1, 0.01), (0.9, 2 * 0.99), 0.1 + 2 * 0.01
        ),
        rules.optimistic(1.0, 0.5): mo.Filter(0.0, 1.0, -0.5, 1.5),
        mo.contrib.grokfast_average(4, 3.0): mo.contrib.grokfast_average(4, 3.0).at(100),
        rules.nadam_mix(0.9): rules.nadam_mix(0.9).at(10**7),
    }
    for rule, expected in settled.items():
        rates = np.array([0.01, 0.1])
        np.testing.assert_allclose(
            analysis.spectral_radius(rule, rates, 1.0), analysis.spectral_radius(expected, rates, 1.0), rtol=1e-9
        )
        assert analysis.dc_gain(rule) == pytest.approx(analysis.dc_gain(expected), rel=1e-9)


def test_a_step_freezes_a_schedule():
    decay = mo.schedules.nesterov_convex()
    rule = rules.nesterov(decay)
    at_7 = rules.nesterov(float(decay(7)))
    for function in (
        analysis.dc_gain,
        analysis.half_life,
        analysis.mean_lag,
        analysis.memory,
        analysis.noise_gain,
        analysis.bandwidth,
        lambda r, **k: analysis.poles(r, **k)[0],
        lambda r, **k: analysis.effective_learning_rate(r, 0.1, **k),
        lambda r, **k: analysis.frequency_response(r, 0.3, **k),
        lambda r, **k: analysis.spectral_radius(r, 0.1, 1.0, **k),
        lambda r, **k: analysis.stability_limit(r, 1.0, **k),
        lambda r, **k: analysis.contraction(r, 0.1, 0.5, 1.0, **k),
        lambda r, **k: analysis.iterations(r, 0.1, 1.0, **k),
        lambda r, **k: analysis.transient_growth(r, 1.3, 1.0, **k),
        lambda r, **k: analysis.stationary_variance(r, 0.1, 1.0, **k),
        lambda r, **k: analysis.bilinear_game(r, 0.1, **k),
        lambda r, **k: analysis.precision(r, mo.storage.bfloat16(), **k),
        lambda r, **k: analysis.report(r, L=1.0, **k),
    ):
        assert function(rule, step=7) == function(at_7)
        assert function(rule, step=8) != function(at_7)
    first = rules.heavy_ball(0.9, dampening=0.5, first_step="gradient")
    assert analysis.closed_loop(first, 1.0, 1.0, step=0)[1, 0] == 1.0
    assert analysis.closed_loop(first, 1.0, 1.0, step=1)[1, 0] == 0.5


def test_scalar_arrays_count_as_numbers():
    rule = rules.heavy_ball(jnp.float32(0.5))
    assert analysis.dc_gain(rule) == 2.0
    assert analysis.poles(rules.heavy_ball(np.float64(0.9)))[0] == 0.9


# Arrays.


def test_arrays_broadcast_and_agree_with_single_calls():
    rule = rules.aggregated((0.0, 0.9, 0.99))
    rate, curvature = np.array([[0.01], [0.1], [5.0]]), np.array([0.2, 1.0])
    functions = {
        "spectral_radius": lambda r, c: analysis.spectral_radius(rule, r, c),
        "stationary_variance": lambda r, c: analysis.stationary_variance(rule, r, c, 2.0),
        "iterations": lambda r, c: analysis.iterations(rule, r, c, 1e-3),
        "transient_growth": lambda r, c: analysis.transient_growth(rule, r, c),
        "contraction": lambda r, c: analysis.contraction(rule, r, 0.1 * c, c),
        "error_curve": lambda r, c: analysis.error_curve(rule, r, c, 5)[5],
        "bilinear_game": lambda r, c: analysis.bilinear_game(rule, r, c),
    }
    for name, function in functions.items():
        got = function(rate, curvature)
        assert got.shape == (3, 2), name
        single = [[function(r, c) for c in curvature] for (r,) in rate]
        np.testing.assert_allclose(got, single, rtol=1e-10, err_msg=name)
    tolerances = analysis.iterations(rule, 0.1, 1.0, [0.1, 1e-3])
    assert list(tolerances) == [analysis.iterations(rule, 0.1, 1.0, t) for t in (0.1, 1e-3)]
    assert analysis.stability_limit(rule, np.ones((2, 3))).shape == (2, 3)
    assert analysis.frequency_response(rule, np.ones((2, 3))).shape == (2, 3)
    assert analysis.stationary_variance(rule, 0.1, 1.0, [1.0, 2.0]).shape == (2,)


# Games.


def play(rule, rate, steps, alternating, strength=1.0):
    """The log of the distance of both players from the equilibrium, by the transformation itself."""
    tx = mo.scale_by_momentum(rule)

    def one_round(carry, _):
        (x, y), (of_x, of_y) = carry
        u, of_x = tx.update(strength * y, of_x, x)
        new = x - rate * u
        u, of_y = tx.update(-strength * (new if alternating else x), of_y, y)
        y = y - rate * u
        return ((new, y), (of_x, of_y)), jnp.log(jnp.hypot(new, y))

    x, y = jnp.float64(1.0), jnp.float64(0.5)
    return np.asarray(jax.lax.scan(one_round, ((x, y), (tx.init(x), tx.init(y))), None, length=steps)[1])


GAMES = [
    (rules.optimistic(1.0, 1.0), 0.5, False, math.sqrt(0.5), 1e-8),
    (rules.heavy_ball(-0.5), 0.5, True, 0.9626, 1e-4),
    (rules.heavy_ball(0.0), 0.5, True, 1.0, 1e-12),
    (rules.complex_heavy_ball(0.9, math.pi / 8), 0.5, False, None, None),
    (rules.complex_heavy_ball(0.667, 0.396 * math.pi), 0.6, False, 0.900, 2e-3),
    (rules.heavy_ball(-0.5), 0.5, False, None, None),
]


@pytest.mark.parametrize("game", GAMES)
def test_the_bilinear_game(game, x64):
    rule, rate, alternating, known, tolerance = game
    radius = analysis.bilinear_game(rule, rate, alternating=alternating)
    if known is not None:
        assert radius == pytest.approx(known, abs=tolerance)
    if not alternating:
        assert radius == pytest.approx(analysis.spectral_radius(rule, rate, 1j), abs=1e-8)
    steps = 1500
    sizes = play(rule, rate, steps, alternating)
    measured = np.polyfit(np.arange(200, steps), sizes[200:], 1)[0]
    assert measured == pytest.approx(math.log(radius), rel=0.01, abs=1e-5)


def test_games_that_momentum_loses_and_those_that_it_wins():
    assert analysis.stability_limit(rules.optimistic(), 2j) == pytest.approx(1 / math.sqrt(3) / 2, rel=1e-9)
    rates = np.geomspace(1e-3, 3, 200)
    for decay in (-0.5, 0.0, 0.5):
        assert np.all(analysis.bilinear_game(rules.heavy_ball(decay), rates) > 1)
        assert analysis.stability_limit(rules.heavy_ball(decay), 1j) == 0
    # |decay| 0.9 and angle pi/8: the best rate of a fine grid.
    best = analysis.bilinear_game(rules.complex_heavy_ball(0.9, math.pi / 8), np.linspace(0.01, 1, 400)).min()
    assert best == pytest.approx(0.980, abs=2e-3)


# Precision.


@pytest.mark.parametrize(("decay", "velocity"), [(0.9, 0.984), (0.99, 0.805), (0.999, 0.25), (0.9999, 0.031)])
def test_where_an_average_stalls(decay, velocity):
    rule = rules.ema(decay)
    predicted = analysis.precision(rule, mo.storage.bfloat16()).stall
    tx = mo.scale_by_momentum(rule, storage=mo.storage.bfloat16(rounding="nearest"))

    def step(state, _):
        u, state = tx.update(jnp.ones(()), state)
        return state, u

    state, updates = jax.lax.scan(step, tx.init(jnp.zeros(())), None, length=6000)
    assert updates[-1] == updates[-2]
    assert float(updates[-1]) == pytest.approx(predicted, rel=1e-6)
    assert float(mo.velocity(state)[0]) == pytest.approx(velocity, abs=6e-4)


@pytest.mark.parametrize("rule", [rules.ema(0.9), rules.nesterov(0.99), rules.aggregated((0.0, 0.9, 0.99))])
def test_the_noise_of_rounding_is_at_most_what_is_predicted(rule):
    # Spacings are between half of the widest and the widest, for evenly spread logarithms 0.74 of it in the mean.
    predicted = analysis.precision(rule, mo.storage.bfloat16()).noise
    signal = jax.random.normal(jax.random.key(0), (1500, 256))

    def updates(storage):
        tx = mo.scale_by_momentum(rule, storage=storage)
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(signal[0]), signal)[1][500:]

    exact = updates("float32")
    error = jnp.sqrt(jnp.mean((updates("bfloat16") - exact) ** 2) / jnp.mean(exact**2))
    assert 0.65 * predicted < float(error) < 0.85 * predicted


def test_precision_of_other_storages():
    coarse, fine = (analysis.precision(rules.ema(0.99), f()) for f in (mo.storage.int8, mo.storage.float32))
    assert coarse.bytes_per_parameter == 1.0
    assert fine.bytes_per_parameter == 4.0
    assert coarse.noise > 1e4 * fine.noise
    assert 1 - fine.stall < 1e-5
    assert analysis.precision(rules.aggregated(), mo.storage.bfloat16()).bytes_per_parameter == 4.0
    assert analysis.precision(rules.heavy_ball(0.0), mo.storage.int8()) == analysis.Precision(0.0, 1.0, 0.0)
    # Twice the spacing is twice the noise.
    one, two = (SimpleNamespace(step_size=s, bytes_per_parameter=1.0) for s in (0.01, 0.02))
    noises = [analysis.precision(rules.nesterov(0.9), s).noise for s in (one, two)]
    assert noises[1] == pytest.approx(2 * noises[0], rel=1e-12)


# Report and plot.


def test_the_report_prints_a_table_and_returns_its_numbers(capsys):
    rule = rules.heavy_ball(0.9)
    found = analysis.report(rule, learning_rate=0.05, L=2.0, mu=0.1, storage=mo.storage.bfloat16())
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert len(printed.splitlines()) == 19
    assert all(len(line) <= 90 for line in printed.splitlines())
    curvature = np.geomspace(0.1, 2.0, 65)
    kept = analysis.precision(rule, mo.storage.bfloat16())
    expected = {
        "order": 1,
        "dc_gain": 10.0,
        "half_life": math.log(2) / -math.log(0.9),
        "memory": (7.0, 22.0),
        "mean_lag": 9.0,
        "bandwidth": math.acos(1 - 0.01 / 1.8),
        "noise_gain": 1 / 0.19,
        "relative_noise": 0.01 / 0.19,
        "stability_limit": 1.9,
        "energy_limit": 0.1,
        "effective_learning_rate": 0.5,
        "contraction": math.sqrt(0.9),
        "iterations": analysis.iterations(rule, 0.05, curvature).max(),
        "transient_growth": analysis.transient_growth(rule, 0.05, curvature).max(),
        "variance": tuple(analysis.stationary_variance(rule, 0.05, [0.1, 2.0])),
        "bytes_per_parameter": 2.0,
        "stall": kept.stall,
        "rounding_noise": kept.noise,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert found.poles == (pytest.approx(0.9),)
    for name, text in (("largest stable", "1.9"), ("mean lag", "9"), ("effective learning", "0.5")):
        assert [line for line in printed.splitlines() if line.startswith(name) and text in line.split()]


def test_a_report_says_nothing_of_what_it_was_not_told(capsys):
    found = analysis.report(rules.nesterov(0.9))
    assert found.stability_limit is None
    assert found.contraction is None
    assert "stable" not in capsys.readouterr().out
    assert analysis.report(rules.nesterov(0.9), L=1.0).energy_limit is None
    assert analysis.report(rules.chebyshev(1.0, 0.1), step=3).order == 1


@every_rule
def test_every_rule_has_a_report(rule, capsys):
    found = analysis.report(RULES[rule](), learning_rate=0.1, L=1.0, mu=0.5, step=9)
    assert found.order == RULES[rule]().at(9).pruned().order
    assert "poles" in capsys.readouterr().out


def test_the_plot_has_four_panels_of_the_analysis_numbers():
    pytest.importorskip("matplotlib")
    rule = rules.nesterov(0.9)
    figure = analysis.plot(rule, learning_rate=0.3, L=2.0, mu=0.02, steps=50)
    impulse, passed, rate, run_axes = figure.axes
    np.testing.assert_allclose(
        impulse.lines[0].get_ydata(), analysis.impulse_response(rule, len(impulse.lines[0].get_ydata()))
    )
    x, y = passed.lines[0].get_data()
    np.testing.assert_allclose(y, abs(analysis.frequency_response(rule, x)))
    x, y = rate.lines[0].get_data()
    np.testing.assert_allclose(y, analysis.spectral_radius(rule, 0.3, x))
    assert rate.lines[1].get_xdata()[0] == pytest.approx(analysis.stability_limit(rule, 1.0) / 0.3)
    for line, curvature in zip(run_axes.lines, (0.02, 0.2, 2.0), strict=True):
        np.testing.assert_allclose(line.get_ydata(), abs(analysis.error_curve(rule, 0.3, curvature, 50)), rtol=1e-9)
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("rule", ["chebyshev", "grokfast_average"])
def test_scheduled_rules_and_those_of_many_velocities_have_a_plot(rule, tmp_path):
    pytest.importorskip("matplotlib")
    figure = analysis.plot(RULES[rule](), learning_rate=0.1, L=1.0, mu=0.1)
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert notes == (["depends on the step"] * 2 if rule == "chebyshev" else [])
    figure.savefig(tmp_path / "rule.png", dpi=40)
    assert (tmp_path / "rule.png").stat().st_size > 5000


# Errors.

SCHEDULED = rules.nesterov(mo.schedules.fista())
BALL = rules.heavy_ball(0.9)
ERRORS = [
    (lambda: analysis.dc_gain(0.9), TypeError, "rule must be a Filter such as heavy_ball"),
    (lambda: analysis.impulse_response(0.9, 3), TypeError, "rule must be a Filter"),
    (lambda: analysis.dc_gain(SCHEDULED), ValueError, r"A\[0\]\[0\] depends on the step: step must choose"),
    (lambda: analysis.poles(rules.schedule_free()), ValueError, r"A\[0\]\[0\] depends on the step"),
    (lambda: analysis.report(SCHEDULED), ValueError, "depends on the step"),
    (lambda: analysis.dc_gain(BALL, step=-1), ValueError, "step must be at least 0, got -1"),
    (lambda: analysis.dc_gain(BALL, step=1.5), TypeError, "step must be a whole number, got 1.5"),
    (lambda: analysis.impulse_response(BALL, -1), ValueError, "n must be at least 0, got -1"),
    (lambda: analysis.step_response(BALL, 1.5), TypeError, "n must be a whole number"),
    (lambda: analysis.spectral_radius(BALL, -0.1, 1.0), ValueError, r"learning_rate must be in \[0, inf\), got -0.1"),
    (lambda: analysis.spectral_radius(BALL, [0.1, np.nan], 1.0), ValueError, r"learning_rate must be .* got nan"),
    (lambda: analysis.spectral_radius(BALL, "0.1", 1.0), TypeError, "learning_rate must be a real number or an array"),
    (lambda: analysis.spectral_radius(BALL, 1j, 1.0), TypeError, "learning_rate must be a real number"),
    (lambda: analysis.spectral_radius(BALL, True, 1.0), TypeError, "learning_rate must be a real number"),
    (lambda: analysis.spectral_radius(BALL, 0.1, [1.0, np.inf]), ValueError, "curvature must be finite, got inf"),
    (lambda: analysis.spectral_radius(BALL, 0.1, None), TypeError, "curvature must be a number or an array of them"),
    (lambda: analysis.spectral_radius(BALL, 0.1, [[1.0], [1.0, 2.0]]), TypeError, "curvature must be a number"),
    (lambda: analysis.stability_limit(BALL, 0.0), ValueError, r"curvature must be in \(0, inf\), got 0.0"),
    (lambda: analysis.stability_limit(BALL, [1.0, -2.0]), ValueError, r"curvature must be .* got -2.0"),
    (lambda: analysis.stability_limit(BALL, 0j), ValueError, "curvature must be other than 0"),
    (lambda: analysis.contraction(BALL, 0.1, 2.0, 1.0), ValueError, "mu must be at most L, got 2.0 above 1.0"),
    (lambda: analysis.contraction(BALL, 0.1, 0.0, 0.0), ValueError, r"L must be in \(0, inf\)"),
    (lambda: analysis.iterations(BALL, 0.1, 1.0, 0.0), ValueError, r"tolerance must be in \(0, inf\), got 0.0"),
    (lambda: analysis.iterations(BALL, 0.1, 1j), TypeError, "curvature must be a real number"),
    (lambda: analysis.iterations(BALL, 1e-8, 1.0), ValueError, "must settle within 8388608 steps"),
    (lambda: analysis.iterations(BALL, 0.1, 1.0, point="y"), ValueError, "point must be one of 'stored', 'evaluated'"),
    (lambda: analysis.error_curve(BALL, 0.1, 1.0, 3, point="y"), ValueError, "point must be one of"),
    (lambda: analysis.asymptotic_iterations(0.9, 1.0), ValueError, r"tolerance must be in \(0, 1\), got 1.0"),
    (lambda: analysis.stationary_variance(BALL, 0.0, 1.0), ValueError, r"learning_rate must be in \(0, inf\)"),
    (lambda: analysis.stationary_variance(BALL, 0.1, 1.0, -1.0), ValueError, r"noise_variance must be in \[0, inf\)"),
    (lambda: analysis.memory(BALL, 1.0), ValueError, r"fraction must be in \(0, 1\), got 1.0"),
    (lambda: analysis.bandwidth(rules.optimistic(0.0, 1.0)), ValueError, "finite gain other than 0 .* got 0.0"),
    (lambda: analysis.frequency_response(BALL, np.nan), ValueError, "omega must be in"),
    (lambda: analysis.energy_limit(rules.nesterov(0.9), 1.0), ValueError, "rule must be a heavy ball"),
    (lambda: analysis.energy_limit(rules.heavy_ball(-0.5), 1.0), ValueError, "rule must be a heavy ball"),
    (lambda: analysis.energy_limit(rules.aggregated(), 1.0), ValueError, "rule must be a heavy ball"),
    (lambda: analysis.energy_limit(BALL, 0.0), ValueError, r"L must be in \(0, inf\)"),
    (lambda: analysis.energy(BALL, 0.1, [1.0, 2.0], [1.0]), ValueError, "points must have as many entries as values"),
    (lambda: analysis.bilinear_game(BALL, 0.1, 0.0), ValueError, r"strength must be in \(0, inf\)"),
    (lambda: analysis.bilinear_game(BALL, 0.1, alternating=1), TypeError, "alternating must be True or False"),
    (lambda: analysis.precision(BALL, "bfloat16"), TypeError, "storage must be an object with a number step_size"),
    (
        lambda: analysis.precision(BALL, SimpleNamespace(step_size=0.0, bytes_per_parameter=1.0)),
        ValueError,
        r"storage.step_size must be in \(0, inf\), got 0.0",
    ),
    (lambda: analysis.report(BALL, mu=0.1), ValueError, "L must be given where mu is, got mu=0.1 alone"),
    (lambda: analysis.report(BALL, L=1.0, mu=2.0), ValueError, r"mu must be in \(0, 1.0\], got 2.0"),
    (lambda: analysis.report(BALL, learning_rate=0.0), ValueError, r"learning_rate must be in \(0, inf\)"),
    (lambda: analysis.plot(BALL, learning_rate=0.1, L=1.0, mu=2.0), ValueError, r"mu must be in \(0, 1.0\]"),
    (lambda: analysis.plot(BALL, learning_rate=0.1, L=1.0, mu=0.1, steps=0), ValueError, "steps must be at least 1"),
    (lambda: jax.jit(lambda b: analysis.dc_gain(rules.ema(b)))(0.5), TypeError, "value that is known now"),
    (lambda: jax.jit(lambda b: analysis.impulse_response(rules.ema(b), 3))(0.5), TypeError, "known now"),
    (lambda: jax.jit(lambda c: analysis.spectral_radius(BALL, 0.1, c))(0.5), TypeError, "curvature must be a number"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_coefficient_of_the_age_that_never_settles_needs_a_step():
    rule = mo.Filter(mo.filters.PerLeafSchedule(lambda step, age: 0.5 + 0.1 * (age % 3)), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"A\[0\]\[0\] never settles"):
        analysis.dc_gain(rule)
    assert analysis.dc_gain(rule, step=1) == pytest.approx(1 + 1 / 0.4)
