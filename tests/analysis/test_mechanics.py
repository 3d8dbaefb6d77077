"""The energy of a heavy ball and its limit on the learning rate, on runs of the transformation."""

import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules
from tests.analysis.runs import run


def landscape(x, t):
    """The slope of x^2/20 + 1 - cos 2x, whose curvature is at most 4.1."""
    return 0.1 * x + 2 * jnp.sin(2 * x)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_below_its_limit_a_heavy_ball_from_rest_never_climbs_above_its_start(decay, x64):
    starts = np.random.default_rng(0).uniform(-12, 12, 400)
    rule = rules.heavy_ball(decay)
    limit = analysis.energy_limit(rule, 4.1)
    assert limit == pytest.approx(2 * (1 - decay) / 4.1, rel=1e-12)
    rises = []
    for factor in (1.0, 1.5):
        points, _ = run(rule, factor * limit, landscape, starts, 400)
        losses = points**2 / 20 + 1 - np.cos(2 * points)
        energies = np.stack(
            [analysis.energy(rule, factor * limit, f, x) for f, x in zip(losses.T, points.T, strict=True)]
        )
        rises.append((np.diff(energies, axis=1).max(), (losses - losses[0]).max()))
    assert rises[0][0] < 1e-13
    assert rises[0][1] < 1e-13
    assert rises[1][0] > 1e-3


def test_the_energy_of_equal_rules_is_equal():
    x = np.random.default_rng(0).normal(size=(6, 3))
    f = np.arange(6.0)
    ball = analysis.energy(rules.heavy_ball(0.9), 0.01, f, x)
    np.testing.assert_allclose(analysis.energy(rules.ema(0.9), 0.1, f, x), ball, rtol=1e-12)
    steps = np.concatenate([[0], np.sum(np.diff(x, axis=0) ** 2, 1)])
    np.testing.assert_allclose(ball, f + 0.9 / (2 * 0.01) * steps, rtol=1e-12)
    assert analysis.energy_limit(rules.ema(0.9), 2.0) == pytest.approx(1.0, rel=1e-12)


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.energy_limit(rules.nesterov(0.9), 1.0), ValueError, "rule must be a heavy ball"),
    (lambda: analysis.energy_limit(rules.heavy_ball(-0.5), 1.0), ValueError, "rule must be a heavy ball"),
    (lambda: analysis.energy_limit(rules.aggregated(), 1.0), ValueError, "rule must be a heavy ball"),
    (lambda: analysis.energy_limit(BALL, 0.0), ValueError, r"L must be in \(0, inf\)"),
    (lambda: analysis.energy(BALL, [0.1, 0.2], [1.0, 2.0], [1.0, 2.0]), TypeError, r"one number, got float64\[2\]"),
    (lambda: analysis.energy_limit(rules.nesterov(mo.schedules.fista()), 1.0), ValueError, r"give rule\.at\(step\)"),
    (lambda: analysis.energy(BALL, 0.1, [1.0, 2.0], [1.0]), ValueError, "points must have as many entries as values"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
