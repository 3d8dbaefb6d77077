"""Momentum schedules, against the papers' own recurrences and case distinctions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from schedule_cases import CASES, FISTA

import momentum_optax as mo
from momentum_optax import schedules

# Where a case distinction lies, and beside it.
STEPS = [0, 1, 2, 9, 10, 19, 30, 39, 40, 41, 49, 50, 60, 99, 100, 101, 249, 250, 300, 950, 970, 999, 1000]
STEPS += [1023, 1024, 1025, 30_000]


def made(name):
    return getattr(schedules, name)(*CASES[name][0])


def public_schedules():
    return {n for n, f in vars(schedules).items() if getattr(f, "__module__", "") == schedules.__name__ and n[0] != "_"}


def test_every_schedule_has_a_case():
    assert public_schedules() == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_integer_step_gives_the_papers_value_in_float64(name):
    schedule, paper = made(name), CASES[name][1]
    values = [schedule(t) for t in STEPS]
    assert all(isinstance(v, int | float) for v in values)
    np.testing.assert_allclose(values, [paper(t) for t in STEPS], rtol=1e-13, atol=1e-15)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_gives_the_same_in_float32(name):
    schedule, paper = made(name), CASES[name][1]
    values = jax.jit(lambda t: schedule(t) * jnp.float32(1))(jnp.asarray(STEPS, jnp.int32))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, [paper(t) for t in STEPS], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_traced_step_gives_float64_where_it_is_enabled(name, x64):
    schedule, paper = made(name), CASES[name][1]
    values = jax.jit(lambda t: schedule(t) * jnp.float64(1))(jnp.asarray(STEPS, jnp.int32))
    np.testing.assert_allclose(values, [paper(t) for t in STEPS], rtol=1e-13, atol=1e-15)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", CASES)
def test_every_schedule_serves_as_a_decay(name):
    schedule, paper = made(name), CASES[name][1]
    rule = mo.Filter(schedule, 1.0, schedule, 1.0)
    tx = mo.scale_by_momentum(rule)
    state, update = tx.init(jnp.zeros(())), jax.jit(tx.update)
    v = 0.0
    for t in range(40):
        u, state = update(jnp.ones(()), state)
        v = paper(t) * v + 1
        assert float(u) == pytest.approx(v, rel=2e-5)
    assert update._cache_size() == 1


def test_fista_is_exact_far_beyond_its_table():
    schedule = schedules.fista()
    worst = max(abs(schedule(t) - FISTA[t]) for t in range(900, 200_000, 997))
    assert worst < 1e-13


def test_fista_forgets_like_three_over_k():
    assert 1 - schedules.fista()(10**6) == pytest.approx(3e-6, rel=1e-3)


def test_sutskever_drops_at_the_end():
    schedule = schedules.sutskever(0.995, stage=100, drop_at=5000)
    assert schedule(4999) == pytest.approx(min(1 - 0.5 / 50, 0.995))
    assert schedule(5000) == 0.9
    assert schedules.sutskever(0.6, stage=1, drop_at=1)(5) == 0.6


def test_restart_by_period_begins_anew():
    schedule = schedules.restarted(schedules.nesterov_convex(), 7)
    assert [schedule(t) for t in (0, 6, 7, 8, 14)] == [0, 6 / 9, 0, 1 / 4, 0]


def test_a_restarted_nesterov_forgets_its_velocity():
    tx = mo.scale_by_momentum(mo.nesterov(schedules.restarted(schedules.nesterov_convex(), 5)))
    state = tx.init(jnp.zeros(3))
    for t in range(6):
        u, state = tx.update(jnp.full(3, 2.0), state)
        assert bool(jnp.all(u == 2.0)) == (t in (0, 5))


def test_muons_momentum_stays_high_where_the_length_of_the_run_is_not_given():
    schedule = schedules.muon_momentum()
    assert [schedule(t) for t in (0, 150, 300, 10**6)] == pytest.approx([0.85, 0.9, 0.95, 0.95], rel=1e-15)


def test_the_correction_ends_the_history_where_the_rate_is_zero():
    rates = jnp.array([0.0, 0.1, 0.2, 0.0, 0.1])
    schedule = schedules.momentum_correction(0.5, lambda t: rates[t])
    np.testing.assert_allclose([float(schedule(t)) for t in range(5)], [0, 0, 0.25, 0, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: schedules.sutskever(1.0), ValueError, r"max_decay must be in \[0, 1\), got 1.0"),
        (lambda: schedules.sutskever(0.9, stage=0), ValueError, "stage must be at least 1, got 0"),
        (lambda: schedules.sutskever(0.9, drop_at=-1), ValueError, "drop_at must be at least 0, got -1"),
        (lambda: schedules.sutskever(0.9, drop_to=2), ValueError, "drop_to must be in"),
        (lambda: schedules.sutskever("0.9"), TypeError, "max_decay must be a number, got '0.9'"),
        (lambda: schedules.nesterov_convex(0), ValueError, r"offset must be in \(0, inf\), got 0"),
        (lambda: schedules.demon(0.9, 0), ValueError, "total_steps must be at least 1"),
        (lambda: schedules.demon(1.0, 10), ValueError, "decay must be in"),
        (lambda: schedules.restarted(0.9, 10), TypeError, "schedule must be a function"),
        (lambda: schedules.restarted(schedules.fista(), 0), ValueError, "at must be at least 1"),
        (lambda: schedules.restarted(schedules.fista(), ()), ValueError, "at must name at least one step"),
        (lambda: schedules.restarted(schedules.fista(), (5, 5)), ValueError, r"at\[1\] must be at least 6, got 5"),
        (lambda: schedules.restarted(schedules.fista(), (0, 5)), ValueError, r"at\[0\] must be at least 1, got 0"),
        (lambda: schedules.restarted(schedules.fista(), (2.5,)), TypeError, r"at\[0\] must be a whole number"),
        (lambda: schedules.cyclical(0.9, 0.8, 10), ValueError, r"high must be in \[0.9, 1\), got 0.8"),
        (lambda: schedules.cyclical(0.8, 0.9, 1), ValueError, "period must be at least 2"),
        (lambda: schedules.one_cycle(1), ValueError, "total_steps must be at least 2"),
        (lambda: schedules.one_cycle(10, peak=1.0), ValueError, "peak must be in"),
        (lambda: schedules.ramp(float("nan"), 1), ValueError, "value must be in"),
        (lambda: schedules.ramp(5.0, 0), ValueError, "steps must be at least 1, got 0"),
        (lambda: schedules.half_life_ramp(0.0, 0.9, 5), ValueError, "start must be in"),
        (lambda: schedules.half_life_ramp(0.9, 1.0, 5), ValueError, "end must be in"),
        (lambda: schedules.fsgdm(299), ValueError, "total_steps must be at least 300, got 299"),
        (lambda: schedules.fsgdm(1000, stages=0), ValueError, "stages must be at least 1"),
        (lambda: schedules.fsgdm(1000, scaling=0.0), ValueError, r"scaling must be in \(0, inf\), got 0.0"),
        (lambda: schedules.muon_momentum(349), ValueError, "total_steps must be at least 350, got 349"),
        (lambda: schedules.muon_momentum(low=0.96), ValueError, r"high must be in \[0.96, 1\), got 0.95"),
        (lambda: schedules.muon_momentum(warmup_steps=0), ValueError, "warmup_steps must be at least 1"),
        (lambda: schedules.muon_momentum(cooldown_steps=0.5), TypeError, "cooldown_steps must be a whole number"),
        (lambda: schedules.momentum_correction(0.9, 0.1), TypeError, "learning_rate must be a schedule"),
        (lambda: schedules.momentum_correction(1.1, lambda t: 1.0), ValueError, "decay must be in"),
    ],
)
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
