"""Published settings for quadratics; that a run contracts as predicted is in `tests/analysis/test_convergence.py`."""

import math

import jax.numpy as jnp
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules, tuning


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


ERRORS = [
    (lambda: tuning.smooth_nesterov(0.0, 1.0), ValueError, r"L must be in \(0, inf\), got 0.0"),
    (lambda: tuning.optimal_heavy_ball(1.0, 2.0), ValueError, r"mu must be in \(0, 1.0\], got 2.0"),
    (lambda: tuning.gradient_descent(1.0, 0.0), ValueError, "mu must be in"),
    (lambda: tuning.quadratic_nesterov("1", 0.1), TypeError, "L must be a number, got '1'"),
    (lambda: tuning.optimal_triple_momentum(1.0, 1.0), ValueError, r"mu must be in \(0, 1.0\)"),
    (lambda: tuning.optimal_chebyshev(1.0, jnp.float32(0.5)), TypeError, "mu must be a number"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
