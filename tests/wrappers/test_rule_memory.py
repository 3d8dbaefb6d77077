"""Gain, mean lag and ages of `monitor`, against sums over impulse responses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import RULES
from monitored import BALL, PLAIN, SIGNAL, run

import momentum_optax as mo


def test_gain_mean_lag_and_age_of_the_heavy_ball_and_of_fista():
    ball, fista = [], []
    schedule = mo.nesterov(mo.schedules.fista())
    for _, _, _, after in run(PLAIN):
        ball.append(mo.telemetry(after))
    for _, _, _, after in run(mo.monitor(mo.scale_by_momentum(schedule), schedule)):
        fista.append(mo.telemetry(after))
    # Beck and Teboulle's two sequences for a unit gradient at each step s; the move of y at step t is a weight.
    n, t_k = len(SIGNAL), 1.0
    x = y = np.zeros(n)
    for t in range(n):
        weights = 0.9 ** np.arange(t + 1.0)
        lag = weights @ np.arange(t + 1.0) / weights.sum()
        for name, value in (("gain", weights.sum()), ("mean_lag", lag), ("age", lag)):
            np.testing.assert_allclose(ball[t][name], value, rtol=1e-6)
        t_next = (1 + math.sqrt(1 + 4 * t_k**2)) / 2
        new = y - np.eye(n)[t]
        ahead = new + (t_k - 1) / t_next * (new - x)
        h, x, y, t_k = y - ahead, new, ahead, t_next
        np.testing.assert_allclose(fista[t]["gain"], h.sum(), rtol=1e-5)
        np.testing.assert_allclose(fista[t]["mean_lag"], h @ (t - np.arange(n)) / h.sum(), rtol=1e-5, atol=1e-6)


# Two velocities, coefficients of ages, and of the step.
SOME = ("adan_mix", "heavy_ball", "nadam_mix")


@pytest.mark.parametrize("names", [SOME, pytest.param(RULES, marks=pytest.mark.slow)], ids=["some rules", "every rule"])
def test_gain_and_mean_lag_are_sums_over_impulse_responses(names):
    rules = {name: RULES[name]() for name in names}
    txs = {name: mo.monitor(mo.scale_by_momentum(rule), rule, every=4) for name, rule in rules.items()}

    def step(states, g):
        states = {name: tx.update(g, states[name])[1] for name, tx in txs.items()}
        return states, {name: mo.telemetry(state) for name, state in states.items()}

    n = 9
    states = {name: tx.init(jnp.zeros(())) for name, tx in txs.items()}
    _, got = jax.jit(lambda s: jax.lax.scan(step, s, jnp.ones(n)))(states)
    ages = np.subtract.outer(np.arange(n), np.arange(n))
    for name, rule in rules.items():
        h = rule.response(np.eye(n))  # of step t to a gradient at step s
        scale = abs(h).sum(axis=1)
        gain, moment = h.sum(axis=1), (h * np.maximum(ages, 0)).sum(axis=1)
        np.testing.assert_allclose(got[name]["gain"], gain, rtol=0, atol=2e-6 * scale.max(), err_msg=name)
        lag = got[name]["mean_lag"] * gain
        np.testing.assert_allclose(lag, moment, rtol=0, atol=2e-5 * n * scale.max(), err_msg=name)


def test_in_the_long_run_they_are_those_of_the_analysis():
    rule = mo.nesterov(0.8)
    tx = mo.monitor(mo.sgd(0.05, rule), rule, every=199)
    step, start = (lambda state, g: (tx.update(g, state)[1], None)), tx.init(0.0)
    got = mo.telemetry(jax.jit(lambda: jax.lax.scan(step, start, jnp.ones(200))[0])())
    assert got["gain"] == pytest.approx(mo.analysis.dc_gain(rule), rel=1e-5)
    assert got["mean_lag"] == pytest.approx(mo.analysis.mean_lag(rule), rel=1e-5)
    assert got["effective_learning_rate"] == pytest.approx(mo.analysis.effective_learning_rate(rule, 0.05), rel=1e-5)
    assert got["cosine"] == pytest.approx(1.0)


def test_debiased_updates_have_unit_gain_and_the_same_lag():
    rule = mo.ema(0.9)
    (*_, first), *_, (*_, last) = run(mo.monitor(mo.scale_by_momentum(rule, debias=True), rule))
    assert mo.telemetry(first)["gain"] == mo.telemetry(last)["gain"] == 1
    assert mo.telemetry(last)["mean_lag"] == pytest.approx(np.average(np.arange(6), weights=0.9 ** np.arange(6)))


def test_the_memory_begins_anew_after_a_restart():
    tx = mo.monitor(mo.adaptive_restart(BALL), BALL)
    turned = [jax.tree.map(jnp.negative, g) for g in SIGNAL[:1]]
    rows = run(tx, [SIGNAL[0], SIGNAL[0], *(3 * turned), SIGNAL[1]])
    ages = [mo.telemetry(after)["age"] for *_, after in rows]
    restarts = [int(after.inner.restarts) for *_, after in rows]
    # v = 1, 1.9, 0.71, -0.36: the third gradient meets a velocity along it, and the velocity is dropped.
    assert restarts == [0, 0, 1, 1, 1, 1]
    for age, since in zip(ages, (1, 2, 3, 1, 2, 3), strict=True):
        assert age == pytest.approx(np.average(np.arange(since), weights=0.9 ** np.arange(since)), abs=1e-6)


def test_after_a_restart_a_schedule_begins_anew_as_that_of_the_rule_does():
    rule = mo.nesterov(mo.schedules.fista())
    g = SIGNAL[0]
    rows = run(mo.monitor(mo.adaptive_restart(rule), rule), [g, g, jax.tree.map(lambda x: -3 * x, g), g, g, g, g])
    restarts = [int(after.inner.restarts) for *_, after in rows]
    begin = restarts.index(1) + 1
    assert restarts[begin:] == [1] * 3, "the steps up to here, and no other, belong to the first run"
    gains = [mo.telemetry(after)["gain"] for *_, after in rows]
    np.testing.assert_allclose(gains[:begin], rule.response(np.ones(begin)), rtol=1e-6)
    np.testing.assert_allclose(gains[begin:], rule.response(np.ones(3)), rtol=1e-6)
