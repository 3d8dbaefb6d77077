"""Stall and noise of rounded velocities, against runs in those storages."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules


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


@pytest.mark.one_in(2)
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


# A rounded velocity comes to rest, or into a cycle, whose length is given.
CYCLES = [
    (rules.heavy_ball(-0.9), 2),
    (rules.heavy_ball(-0.99), 2),
    (rules.complex_heavy_ball(0.99, 0.3), None),
    (mo.outer_nesterov(3, 0.7, 0.9), None),
]


@pytest.mark.parametrize(("rule", "length"), CYCLES)
def test_where_a_velocity_is_rounded_into_a_cycle_its_mean_counts(rule, length):
    k = rule.period
    steps = [rule.at(t).matrices() for t in range(k)]
    v, updates, seen = np.zeros(rule.order), [], {}
    while v.tobytes() not in seen:
        seen[v.tobytes()] = len(updates)
        for A, B, C, D in steps:
            updates.append(C @ v + D)
            v = np.asarray(jnp.asarray(A @ v + B, jnp.bfloat16), np.float64)
    cycle = updates[seen[v.tobytes()] :]
    assert length is None or len(cycle) == length
    predicted = analysis.precision(rule, mo.storage.bfloat16()).stall
    assert predicted == pytest.approx(np.mean(cycle) / analysis.dc_gain(rule), rel=1e-12)


def test_a_rule_that_never_forgets_has_no_limit_to_stall_at():
    for pole in (1.0, -1.0, 1.5):
        found = analysis.precision(mo.Filter(pole, 1.0, 1.0, 1.0), mo.storage.bfloat16())
        assert np.isnan(found.stall)
        assert found.noise == np.inf


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.precision(BALL, "bfloat16"), TypeError, "storage must be an object with a number step_size"),
    (
        lambda: analysis.precision(BALL, SimpleNamespace(step_size=0.0, bytes_per_parameter=1.0)),
        ValueError,
        r"storage.step_size must be in \(0, inf\), got 0.0",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
