"""Rules and numbers that the analysis accepts: limits of age-dependent coefficients, scalar arrays, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules


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


def test_scalar_arrays_count_as_numbers():
    rule = rules.heavy_ball(jnp.float32(0.5))
    assert analysis.dc_gain(rule) == 2.0
    assert analysis.poles(rules.heavy_ball(np.float64(0.9)))[0] == 0.9


def test_a_coefficient_of_the_age_that_never_settles_needs_a_step():
    rule = mo.Filter(mo.filters.PerLeafSchedule(lambda step, age: 0.5 + 0.1 * (age % 3)), 1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"A\[0\]\[0\] never settles"):
        analysis.dc_gain(rule)
    assert analysis.dc_gain(rule, step=1) == pytest.approx(1 + 1 / 0.4)


SCHEDULED = rules.nesterov(mo.schedules.fista())


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.dc_gain(0.9), TypeError, "rule must be a Filter such as heavy_ball"),
    (lambda: analysis.impulse_response(0.9, 3), TypeError, "rule must be a Filter"),
    (lambda: analysis.dc_gain(SCHEDULED), ValueError, r"A\[0\]\[0\] depends on the step: step must choose"),
    (lambda: analysis.poles(rules.schedule_free()), ValueError, r"A\[0\]\[0\] depends on the step"),
    (lambda: analysis.dc_gain(BALL, step=-1), ValueError, "step must be at least 0, got -1"),
    (lambda: analysis.dc_gain(BALL, step=1.5), TypeError, "step must be a whole number, got 1.5"),
    (lambda: jax.jit(lambda b: analysis.dc_gain(rules.ema(b)))(0.5), TypeError, "value that is known now"),
    (lambda: jax.jit(lambda b: analysis.impulse_response(rules.ema(b), 3))(0.5), TypeError, "known now"),
    (lambda: jax.jit(lambda c: analysis.spectral_radius(BALL, 0.1, c))(0.5), TypeError, "curvature must be a number"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
