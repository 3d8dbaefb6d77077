"""Suggested settings: theory where it applies, better than it where curvature changes on the way."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import rules, tuning
from tests.tuning.losses import ONES, bowl, square


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


def test_the_last_of_ten_halvings_counts():
    # Two steps along a slope of 1 go twice the learning rate, and a wall stands between 2^-9 and 2^-8.
    wall = 2.0**-8.5

    def loss(p, _):
        return jnp.sum(-p + p**2 / 2 + wall * jnp.exp(20 * (p / wall - 1)))

    got = tuning.suggest(loss, jnp.zeros(1), steps=2)
    assert got.learning_rate == pytest.approx(2**-10, rel=1e-3)
    assert "halved, as 2 steps" in str(got)


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


ERRORS = [
    (lambda: tuning.suggest(square, {"w": ONES + 1j}), TypeError, r"params\['w'\] .* got complex64"),
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
