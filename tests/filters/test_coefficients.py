"""Coefficients: numbers, schedules and first steps of a leaf."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo


def test_at_an_integer_gives_python_floats_and_at_a_tracer_jax_values():
    rule = mo.chebyshev(10.0, 1.0)
    assert all(isinstance(c, float) for c in rule.at(3).coefficients())
    traced = jax.jit(lambda t: jnp.stack([jnp.asarray(c) for c in rule.at(t).coefficients()]))(3)
    np.testing.assert_allclose(traced, rule.at(3).coefficients(), rtol=3e-7)


def test_a_leaf_has_its_own_first_step():
    rule = mo.grokfast(0.9, 2.0)
    assert rule.reads_age
    assert not rule.reads_step
    assert rule.at(7, age=0).D == 3.0
    assert rule.at(0, age=7).D == pytest.approx(1.2)
    damped = mo.heavy_ball(0.9, dampening=lambda t: 0.1 * t, first_step="gradient")
    assert damped.reads_step
    assert damped.at(5, age=1).D == pytest.approx(0.5)


def test_a_scheduled_look_ahead_makes_a_rule_neither_constant_nor_free_of_the_step():
    rule = mo.Filter(0.9, 1.0, 0.9, 1.0, lookahead=lambda t: 0.9 * t)
    assert not rule.is_constant
    assert rule.reads_step
    assert rule.period is None
    assert rule.at(3).is_constant


def test_what_is_made_of_a_first_step_that_follows_a_schedule_follows_it_too():
    rule = mo.heavy_ball(0.9, dampening=lambda t: 0.5 / (t + 1), first_step="gradient")
    other = rule.change_basis(2.0).scale(1.0)  # makes every coefficient anew
    assert other.reads_step
    assert other.reads_age
    signal = jnp.asarray([1.0, -2.0, 0.5])
    v, expected = 0.0, []
    for t, g in enumerate(signal.tolist()):
        v = 0.9 * v + g * (1 - 0.5 / (t + 1) if t else 1.0)
        expected.append(v)
    tx, got = mo.scale_by_momentum(other), []
    state = tx.init(signal[0])
    for g in signal:
        u, state = tx.update(g, state)
        got.append(float(u))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_optax_schedules_serve_as_coefficients():
    rule = mo.heavy_ball(optax.linear_schedule(0.5, 0.9, 4))
    assert [round(float(rule.at(t).C[0]), 4) for t in range(6)] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]


def test_the_algebra_needs_no_jax_values():
    rule = mo.heavy_ball(np.float32(0.9))
    assert rule.is_constant
    assert type(rule.A[0][0]) is float
