"""Tuned coefficients are the best ones, estimates of curvature are those of known Hessians, suggestions work."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules, tuning


@pytest.fixture
def x64():
    # A context manager of jax itself since 0.8, of jax.experimental before.
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True):
        yield


# From curvatures. That the predicted rates are those of the analysis and of runs is in test_analysis.py.


def test_tuned_coefficients_in_numbers():
    # kappa = 4: the root is 2, so Nesterov's decay is 1/3 and the heavy ball's its square.
    L, mu, root = 8.0, 2.0, math.sqrt(13)
    expected = {
        tuning.gradient_descent: (0.2, 0.0, 0.6),
        tuning.optimal_heavy_ball: (4 / 18, 1 / 9, 1 / 3),
        tuning.smooth_nesterov: (1 / 8, 1 / 3, 1 / 2),
        tuning.quadratic_nesterov: (4 / 26, (root - 2) / (root + 2), 1 - 2 / root),
        tuning.optimal_triple_momentum: (1.0, 0.25 / 1.5, 1 / 2),
        tuning.optimal_chebyshev: (1.0, 1 / 9, 1 / 3),
    }
    for tune, numbers in expected.items():
        tuned = tune(L, mu)
        assert (tuned.learning_rate, tuned.decay, tuned.contraction) == pytest.approx(numbers, rel=1e-12), tune
        if tune is not tuning.optimal_chebyshev and tuned.decay:
            assert analysis.poles(tuned.rule)[0] == pytest.approx(tuned.decay, rel=1e-12)
        assert str(tuned).count("\n  - ") == len(tuned.reasons) >= 2
    assert mo.equivalent(tuning.optimal_triple_momentum(L, mu).rule, rules.triple_momentum(L, mu))
    assert mo.equivalent(tuning.optimal_chebyshev(L, mu).rule, rules.chebyshev(L, mu))


@pytest.mark.parametrize(
    ("tune", "build"),
    [
        (tuning.gradient_descent, lambda b: rules.heavy_ball(0.0)),
        (tuning.optimal_heavy_ball, rules.heavy_ball),
        (tuning.quadratic_nesterov, rules.nesterov),
    ],
)
def test_nothing_near_a_quadratic_optimum_is_better(tune, build):
    tuned = tune(1.0, 0.01)
    best = analysis.contraction(tuned.rule, tuned.learning_rate, 0.01, 1.0)
    for by_rate in (0.98, 1.0, 1.02):
        for by_decay in (0.98, 1.0, 1.02):
            if (by_rate, by_decay) != (1.0, 1.0) and (tuned.decay or by_rate != 1.0):
                near = analysis.contraction(build(tuned.decay * by_decay), tuned.learning_rate * by_rate, 0.01, 1.0)
                assert near > best


def test_equal_curvatures_need_one_step():
    for tune in (tuning.gradient_descent, tuning.optimal_heavy_ball, tuning.smooth_nesterov, tuning.quadratic_nesterov):
        tuned = tune(5.0, 5.0)
        assert tuned.contraction == pytest.approx(0.0, abs=1e-12)
        assert abs(analysis.error_curve(tuned.rule, tuned.learning_rate, 5.0, 2)[2]) < 1e-12


# From memory and noise.


def test_decays_have_the_memory_that_was_asked_for():
    steps = np.array([0.5, 1.0, 7.0, 1000.0])
    for decay, half in zip(tuning.decay_from_half_life(steps), steps, strict=True):
        assert analysis.half_life(rules.ema(decay)) == pytest.approx(half, rel=1e-9)
    for decay, lag in zip(tuning.decay_from_mean_lag(steps), steps, strict=True):
        assert analysis.mean_lag(rules.heavy_ball(decay)) == pytest.approx(lag, rel=1e-9)
    gains = np.array([0.001, 0.05, 0.9])
    for decay, gain in zip(tuning.decay_from_noise_gain(gains), gains, strict=True):
        assert analysis.noise_gain(rules.ema(decay)) == pytest.approx(gain, rel=1e-9)
    assert tuning.decay_from_mean_lag(9) == pytest.approx(0.9)
    assert type(tuning.decay_from_half_life(3)) is np.float64


def test_a_matched_rate_goes_as_far_along_a_lasting_gradient():
    assert tuning.match_learning_rate(0.1, rules.heavy_ball(0.9), rules.heavy_ball(0.99)) == pytest.approx(0.01)
    assert tuning.match_learning_rate(0.1, rules.ema(0.9), rules.heavy_ball(0.99)) == pytest.approx(0.001)
    old, new = rules.nesterov(0.9), rules.aggregated((0.0, 0.9, 0.99))
    rates = tuning.match_learning_rate(np.array([0.1, 0.2]), old, new)
    moves = []
    for rule, rate in ((old, 0.1), (new, rates[0])):
        tx = mo.scale_by_momentum(rule)
        _, updates = jax.lax.scan(
            lambda s, _, tx=tx: tx.update(jnp.ones(()), s)[::-1], tx.init(jnp.zeros(())), None, length=3000
        )
        moves.append(rate * float(updates[-1]))
    assert moves[0] == pytest.approx(moves[1], rel=1e-5)
    assert rates[1] == pytest.approx(2 * rates[0])


# Curvature of a loss.


def bowl(eigenvalues, seed=0, dtype=np.float64):
    """A quadratic loss with a batch that scales it, its parameters in two leaves, and the Hessian's eigenvectors."""
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    hessian = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T, dtype)

    def loss(params, batch):
        x = jnp.concatenate([params["a"].ravel(), params["b"]])
        return batch * (x @ hessian @ x) / 2

    start = np.random.default_rng(seed + 1).normal(size=n).astype(dtype)
    return loss, {"a": jnp.asarray(start[:4]).reshape(2, 2), "b": jnp.asarray(start[4:])}


def test_the_whole_spectrum_of_a_small_hessian(x64):
    loss, params = bowl(np.geomspace(0.01, 3.0, 20))
    found = tuning.estimate_curvature(loss, params, 2.0)
    assert (found.L, found.lowest, found.mu) == pytest.approx((6.0, 0.02, 0.02), rel=1e-9)
    assert found.exact
    assert found.products == 20
    assert found.L_error == found.lowest_error == 0


def test_the_ends_of_a_large_hessian(x64):
    eigenvalues = np.concatenate([np.linspace(0.5, 3.0, 199), [-2.0]])
    loss, params = bowl(eigenvalues)
    found = tuning.estimate_curvature(loss, params, 1.0, iterations=30)
    assert not found.exact
    assert found.products == 30
    assert found.L <= 3.0 + 1e-9
    assert found.L == pytest.approx(3.0, rel=0.01)
    assert abs(eigenvalues - found.L).min() <= found.L_error + 1e-9
    assert found.lowest == pytest.approx(-2.0, rel=1e-6)  # it stands apart
    assert found.lowest_error < 1e-3
    assert found.mu is None


def test_a_smallest_curvature_is_named_only_where_it_is_known(x64):
    dense = np.geomspace(1e-4, 1.0, 300)
    loss, params = bowl(dense)
    few = tuning.estimate_curvature(loss, params, 1.0, iterations=12)
    assert few.mu is None
    assert few.lowest > dense[0]  # never below the true one
    apart = np.concatenate([[0.1], np.linspace(0.5, 1.0, 299)])
    loss, params = bowl(apart)
    found = tuning.estimate_curvature(loss, params, 1.0, iterations=30)
    assert found.mu == found.lowest == pytest.approx(0.1, rel=1e-3)
    assert not found.exact


def test_curvature_below_rounding_is_not_named():
    loss, params = bowl(np.geomspace(1e-7, 1.0, 20), dtype=np.float32)
    found = tuning.estimate_curvature(loss, params, 1.0)
    assert found.L == pytest.approx(1.0, rel=1e-5)
    assert found.mu is None


def test_a_spectrum_of_few_values_is_exhausted_early(x64):
    loss, params = bowl(np.repeat([1.0, 4.0, 9.0], 10))
    found = tuning.estimate_curvature(loss, params, 1.0)
    assert found.products == 3
    assert found.exact
    assert (found.L, found.mu) == pytest.approx((9.0, 1.0), rel=1e-9)
    flat = tuning.estimate_curvature(lambda p, _: jnp.sum(p), jnp.ones(5))
    assert (flat.L, flat.lowest, flat.mu) == (0.0, 0.0, None)


def test_narrow_parameters_are_widened():
    loss, params = bowl(np.geomspace(0.1, 3.0, 20), dtype=np.float32)
    exact = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    found = tuning.estimate_curvature(loss, exact, 1.0)
    assert (found.L, found.mu) == pytest.approx((3.0, 0.1), rel=1e-3)


def test_the_curvature_is_that_of_the_place(x64):
    found = tuning.estimate_curvature(lambda p, _: jnp.sum(p**4) / 12, jnp.array([1.0, -2.0, 3.0]))
    assert (found.L, found.lowest) == pytest.approx((9.0, 1.0), rel=1e-9)


def test_a_batch_may_hold_more_than_arrays(x64):
    def loss(p, batch):
        return batch["scale"] * jnp.sum(p[: batch["count"]] ** 2) * (3.0 if batch["mode"] == "triple" else 1.0)

    batch = {"scale": jnp.float64(0.5), "count": 2, "mode": "triple"}
    found = tuning.estimate_curvature(loss, jnp.ones(4), batch)
    assert (found.L, found.lowest) == pytest.approx((3.0, 0.0), abs=1e-12)
    assert tuning.estimate_curvature(loss, jnp.ones(4), batch | {"scale": np.float64(1.0)}).L == pytest.approx(6.0)


def test_the_seed_starts_elsewhere_and_more_iterations_find_more(x64):
    loss, params = bowl(np.linspace(0.01, 1.0, 200))
    a, b, longer = (
        tuning.estimate_curvature(loss, params, 1.0, iterations=n, seed=s).L for n, s in ((8, 0), (8, 1), (16, 0))
    )
    assert a != b
    assert longer > max(a, b)


# Suggestions.


def test_on_a_quadratic_the_suggestion_is_nesterovs_theorem(x64):
    loss, params = bowl(np.geomspace(0.01, 1.0, 20))
    got = tuning.suggest(loss, params, 1.0)
    assert got.learning_rate == pytest.approx(1.0, rel=1e-6)
    assert got.decay == pytest.approx(9 / 11, rel=1e-6)
    assert got.contraction == pytest.approx(0.9, rel=1e-6)
    assert mo.equivalent(got.rule, rules.nesterov(got.decay))
    text = str(got)
    for words in (
        "largest curvature",
        "condition number is 100",
        "whole spectrum was seen",
        "twice the learning rate is no better",
    ):
        assert words in text
    # It converges at the rate it says, and its trials are runs of the rule.
    tx = mo.scale_by_momentum(got.rule)

    def step(carry, _):
        x, state = carry
        u, state = tx.update(jax.grad(loss)(x, 1.0), state, x)
        x = jax.tree.map(lambda p, d: p - got.learning_rate * d, x, u)
        return (x, state), loss(x, 1.0)

    losses = np.asarray(jax.lax.scan(step, (params, tx.init(params)), None, length=400)[1])
    trial = str(tuning.suggest(loss, params, 1.0, steps=15))
    assert f"after 15 steps from params the loss is {losses[14]:.4g} at learning rate 1 with decay 0.8182" in trial
    # A double root: t times a power.
    measured = (np.log(losses[399] / losses[199]) / 2 - math.log(2)) / 200
    assert measured == pytest.approx(math.log(0.9), rel=0.03)


def test_where_curvature_is_negative_the_decay_is_the_default():
    def loss(p, batch):
        return jnp.sum(jnp.cos(p) + 0.05 * p**2)

    got = tuning.suggest(loss, jnp.array([0.001, 3.0, -2.5]), steps=4)
    assert got.decay == 0.9
    assert got.contraction is None
    assert "negative" in str(got)
    assert "contraction per step unknown" in str(got)


def test_curvature_that_falls_on_the_way_allows_a_larger_rate(x64):
    # Logistic regression: steepest curvature at zero coefficients.
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 10)) * np.geomspace(0.3, 2, 10)
    y = np.sign(x @ rng.normal(size=10) + 0.3 * rng.normal(size=200))

    def loss(w, batch):
        return jnp.mean(jax.nn.softplus(-batch[1] * (batch[0] @ w))) + 0.5e-2 * w @ w

    found = tuning.estimate_curvature(loss, jnp.zeros(10), (x, y))
    known = np.linalg.eigvalsh(x.T @ x / 800 + 1e-2 * np.eye(10))
    assert (found.lowest, found.L) == pytest.approx((known[0], known[-1]), rel=1e-9)
    got = tuning.suggest(loss, jnp.zeros(10), (x, y))
    assert got.learning_rate > 1.5 / found.L
    assert "within 100 steps" in str(got)


def test_curvature_that_explodes_on_the_way_halves_the_rate(x64):
    def loss(p, _):
        return jnp.sum(jnp.exp(5 * p) - 5 * p)

    start = jnp.array([-0.8])
    # Where the run ends, at the minimum, the curvature is 25.
    assert tuning.suggest(loss, start).learning_rate == pytest.approx(1 / 25, rel=1e-3)
    assert tuning.estimate_curvature(loss, start).L == pytest.approx(25 * math.exp(-4), rel=1e-9)


def test_rates_are_doubled_while_a_trial_gains(x64):
    # A slope with ripples: their curvature says nothing about the long way down.
    def loss(p, _):
        return jnp.sum(jnp.sqrt(1 + p**2) + 1e-3 * jnp.cos(30 * p))

    start = jnp.array([3000.0, 3000.1])
    got = tuning.suggest(loss, start, steps=20)
    assert str(got).count("twice the learning rate is better") == 4
    L = tuning.estimate_curvature(loss, start).L
    assert got.learning_rate > 8 / L
    with pytest.raises(dataclasses.FrozenInstanceError):
        got.decay = 0.5


def test_options_of_the_suggestion_act(x64):
    def loss(p, _):
        return jnp.sum(jnp.sqrt(1 + p**2) * jnp.linspace(0.01, 1, p.size))

    start = jnp.linspace(-3.0, 3.0, 60)
    base = tuning.suggest(loss, start, iterations=6, steps=10)
    assert tuning.suggest(loss, start, iterations=6, steps=10).learning_rate == base.learning_rate
    for options in ({"iterations": 12}, {"steps": 40}, {"seed": 1}):
        assert tuning.suggest(loss, start, **({"iterations": 6, "steps": 10} | options)) != base


# Errors.


def square(p, _):
    return jnp.sum(p**2)


ONES = jnp.ones(3)
ERRORS = [
    (lambda: tuning.smooth_nesterov(0.0, 1.0), ValueError, r"L must be in \(0, inf\), got 0.0"),
    (lambda: tuning.optimal_heavy_ball(1.0, 2.0), ValueError, r"mu must be in \(0, 1.0\], got 2.0"),
    (lambda: tuning.gradient_descent(1.0, 0.0), ValueError, "mu must be in"),
    (lambda: tuning.quadratic_nesterov("1", 0.1), TypeError, "L must be a number, got '1'"),
    (lambda: tuning.optimal_triple_momentum(1.0, 1.0), ValueError, r"mu must be in \(0, 1.0\)"),
    (lambda: tuning.optimal_chebyshev(1.0, jnp.float32(0.5)), TypeError, "mu must be a number"),
    (lambda: tuning.decay_from_half_life(0.0), ValueError, r"steps must be in \(0, inf\), got 0.0"),
    (lambda: tuning.decay_from_mean_lag([1.0, np.inf]), ValueError, "steps must be in .* got inf"),
    (lambda: tuning.decay_from_noise_gain(1.0), ValueError, r"gain must be in \(0, 1\), got 1.0"),
    (lambda: tuning.decay_from_noise_gain("0.1"), TypeError, "gain must be a real number"),
    (
        lambda: tuning.match_learning_rate(0.1, rules.ema(0.9), rules.optimistic(0.0, 1.0)),
        ValueError,
        "new must have a finite gain other than 0 .* got 0.0",
    ),
    (
        lambda: tuning.match_learning_rate(0.1, rules.ema(0.9), rules.ema(0.9).scale(-1.0)),
        ValueError,
        "old and new must have gains of one sign",
    ),
    (
        lambda: tuning.match_learning_rate(0.1, rules.nesterov(mo.schedules.fista()), rules.ema(0.9)),
        ValueError,
        "depends on the step",
    ),
    (lambda: tuning.estimate_curvature(3.0, ONES), TypeError, "loss must be a function of params and batch, got 3.0"),
    (lambda: tuning.estimate_curvature(lambda p, _: p, ONES), ValueError, r"loss must give a scalar, got shape \(3,\)"),
    (lambda: tuning.estimate_curvature(lambda p, _: 3, ONES), TypeError, "loss must give a real floating-point scalar"),
    (
        lambda: tuning.estimate_curvature(square, {"w": jnp.arange(3)}),
        TypeError,
        r"params\['w'\] must be real floating point, got int32",
    ),
    (lambda: tuning.suggest(square, {"w": ONES + 1j}), TypeError, r"params\['w'\] .* got complex64"),
    (lambda: tuning.estimate_curvature(square, {}), ValueError, "params must have at least one element"),
    (lambda: tuning.estimate_curvature(square, ONES * jnp.nan), ValueError, "params must be finite"),
    (lambda: tuning.estimate_curvature(lambda p, _: jnp.sum(jnp.sqrt(p)), 0 * ONES), ValueError, "finite derivatives"),
    (lambda: tuning.estimate_curvature(square, ONES, iterations=1), ValueError, "iterations must be at least 2, got 1"),
    (lambda: tuning.estimate_curvature(square, ONES, seed=-1), ValueError, "seed must be at least 0, got -1"),
    (lambda: jax.jit(lambda p: tuning.estimate_curvature(square, p).L)(ONES), TypeError, "values that are known now"),
    (lambda: jax.jit(lambda b: tuning.suggest(square, ONES, b).decay)(ONES), TypeError, "params and batch must have"),
    (lambda: tuning.suggest(square, ONES, steps=1), ValueError, "steps must be at least 2, got 1"),
    (lambda: tuning.suggest(square, ONES, steps=2.5), TypeError, "steps must be a whole number"),
    (
        lambda: tuning.suggest(lambda p, _: -jnp.sum(p**2), ONES),
        ValueError,
        "must curve upwards somewhere .* got a largest curvature of -",
    ),
    (lambda: tuning.suggest(lambda p, _: jnp.sum(p), ONES), ValueError, "must curve upwards somewhere"),
    (lambda: tuning.suggest(square, 0 * ONES), ValueError, "100 steps must lower the loss"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
