"""Responses, gains, delays and memory of a rule, against closed forms, the transformation and `scipy.signal`."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from conformance import RULES, every_rule

import momentum_optax as mo
from momentum_optax import analysis, rules
from momentum_optax.filters.coefficients import Periodic


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


SETTLING = [
    name for name in RULES if name not in ("chebyshev", "schedule_free", "nadam_mix") and RULES[name]().period == 1
]


@pytest.mark.one_in(8)
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


@every_rule
def test_responses_are_those_of_scipys_signal_processing(rule):
    r = RULES[rule]().at(5)
    A, B, C, D = r.pruned().matrices()
    system = scipy.signal.StateSpace(A, B[:, None], C[None], [[D]], dt=1) if len(B) else None
    numerator, denominator = r.pruned().transfer_function()
    signal = np.random.default_rng(0).normal(size=60)
    expected = scipy.signal.lfilter(numerator, denominator, signal)
    np.testing.assert_allclose(r.response(signal), expected, rtol=1e-9, atol=1e-11)
    omega = np.array([0.01, 0.5, 3.0])
    _, waves = scipy.signal.freqz(numerator, denominator, omega)
    np.testing.assert_allclose(analysis.frequency_response(r, omega), waves, rtol=1e-8, atol=1e-10)
    if system is not None:
        _, (impulse,) = scipy.signal.dimpulse(system, n=40)
        np.testing.assert_allclose(analysis.impulse_response(r, 40), impulse[:, 0], rtol=1e-9, atol=1e-12)
        _, (steps,) = scipy.signal.dstep(system, n=40)
        np.testing.assert_allclose(analysis.step_response(r, 40), steps[:, 0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_frequency_response_at_a_pole_of_any_order_is_infinite_or_as_large_as_rounding_leaves_it(order):
    # (1 - 1/z)^-order as one recurrence, whose equal poles are not found to rounding.
    A = np.eye(order, k=-1)
    A[0] = -np.poly(np.ones(order))[1:]
    rule = mo.Filter(A, np.eye(order)[0], A[0], 1.0)
    got = analysis.frequency_response(rule, [0.0, 1.0])
    assert abs(got[0]) > 1e12
    assert got[1] == pytest.approx((1 - np.exp(-1j)) ** -order, rel=1e-9)


def test_poles_come_slowest_first_and_without_those_that_do_nothing():
    np.testing.assert_allclose(analysis.poles(rules.aggregated((0.0, 0.9, 0.99))), [0.99, 0.9], rtol=1e-12)
    got = analysis.poles(rules.complex_heavy_ball(0.9, 0.4))
    np.testing.assert_allclose(sorted(got, key=np.imag), 0.9 * np.exp([-0.4j, 0.4j]), rtol=1e-12)
    assert analysis.half_life(rules.heavy_ball(0.0)) == 0
    assert analysis.half_life(mo.Filter(1.0, 1.0, 1.0, 0.0)) == np.inf


@pytest.mark.parametrize("pole", [1.25, -1.25, 1.0])
def test_what_grows_has_neither_gain_nor_lag(pole):
    rule = mo.Filter(pole, 1.0, pole, 1.0)
    # The rule whose update grows, one that reads no such velocity, and one that does so over a period.
    assert rule.dc_gain() == analysis.dc_gain(rule) == analysis.mean_lag(rule) == np.inf
    unread = mo.Filter(((pole, 0.0), (0.0, 0.5)), (1.0, 1.0), (0.0, 1.0), 0.0)
    assert unread.dc_gain() == pytest.approx(2)
    now_and_then = mo.heavy_ball(Periodic(lambda t: pole if t % 2 else 1.0, 2))
    assert analysis.dc_gain(now_and_then) == analysis.mean_lag(now_and_then) == np.inf
    with pytest.raises(ValueError, match="finite gain other than 0 at zero frequency, got inf"):
        analysis.bandwidth(rule)


def test_the_gain_of_what_swings_for_ever_is_its_middle():
    rule = mo.Filter(-1.0, 1.0, 1.0, 0.0)
    assert rule.dc_gain() == pytest.approx(np.mean(rule.response(np.ones(100))))


def test_what_has_no_end_is_infinite():
    sum_of_gradients = mo.Filter(1.0, 1.0, 1.0, 1.0)
    for function in (analysis.dc_gain, analysis.half_life, analysis.memory, analysis.mean_lag, analysis.noise_gain):
        assert function(sum_of_gradients) == np.inf
    assert np.isinf(analysis.frequency_response(sum_of_gradients, 0.0))
    assert math.isnan(analysis.mean_lag(rules.optimistic(0.0, 1.0)))
    assert analysis.bandwidth(rules.ema(0.1)) == np.inf


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.impulse_response(BALL, -1), ValueError, "n must be at least 0, got -1"),
    (lambda: analysis.step_response(BALL, 1.5), TypeError, "n must be a whole number"),
    (lambda: analysis.memory(BALL, 1.0), ValueError, r"fraction must be in \(0, 1\), got 1.0"),
    (lambda: analysis.bandwidth(rules.optimistic(0.0, 1.0)), ValueError, "finite gain other than 0 .* got 0.0"),
    (lambda: analysis.frequency_response(BALL, np.nan), ValueError, "omega must be in"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
