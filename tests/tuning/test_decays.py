"""Decays from memory and noise, and learning rates that match."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules, tuning


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


ERRORS = [
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
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
