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


def test_a_half_life_in_tokens_or_epochs_is_one_in_steps():
    by_tokens = tuning.decay_from_half_life(tokens=8e6, batch_size=np.array([1e5, 4e5]))
    np.testing.assert_allclose(by_tokens, [0.5 ** (1 / 80), 0.5 ** (1 / 20)], rtol=1e-14)
    assert by_tokens[1] == pytest.approx(by_tokens[0] ** 4, rel=1e-12)
    assert tuning.decay_from_half_life(epochs=0.5, epoch_size=1000, batch_size=50) == pytest.approx(0.5 ** (1 / 10))


@pytest.mark.parametrize("every", [1, 2])
def test_an_average_of_the_weights_takes_a_half_life(every):
    tx = mo.average_params(tuning.decay_from_half_life(tokens=400, batch_size=100), every=every)
    state = tx.init(jnp.zeros(()))
    for t in range(4):  # the weights jump to 1 in the first step and stay: 4 steps later half of them is in the average
        _, state = tx.update(jnp.float32(t == 0), state, jnp.float32(t > 0))
    assert float(mo.averaged_params(state, jnp.ones(()))) == pytest.approx(0.5, rel=1e-6)


def test_a_schedule_takes_half_lives():
    start, end = (tuning.decay_from_half_life(tokens=tokens, batch_size=100) for tokens in (400, 2000))
    schedule = mo.schedules.half_life_ramp(start, end, 4)
    lives = [analysis.half_life(rules.ema(float(schedule(t)))) for t in range(5)]
    np.testing.assert_allclose(lives, [8, 12, 16, 20, 20], rtol=1e-9)


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
    (tuning.decay_from_half_life, TypeError, "one of steps, tokens and epochs must be given, got none"),
    (lambda: tuning.decay_from_half_life(3, tokens=4, batch_size=1), TypeError, "got steps and tokens"),
    (lambda: tuning.decay_from_half_life(3, batch_size=1), TypeError, "batch_size must be left out with steps, got 1"),
    (lambda: tuning.decay_from_half_life(tokens=3), TypeError, "batch_size must be given with tokens, got None"),
    (
        lambda: tuning.decay_from_half_life(epochs=3, batch_size=1),
        TypeError,
        "epoch_size must be given with epochs, got None",
    ),
    (
        lambda: tuning.decay_from_half_life(tokens=3, batch_size=0),
        ValueError,
        r"batch_size must be in \(0, inf\), got 0",
    ),
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
