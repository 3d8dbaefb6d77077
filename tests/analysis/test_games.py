"""The bilinear game, against rounds that the transformation plays."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import analysis, rules


def play(rule, rate, steps, alternating, strength=1.0):
    """The log of the distance of both players from the equilibrium, by the transformation itself."""
    tx = mo.scale_by_momentum(rule)

    def one_round(carry, _):
        (x, y), (of_x, of_y) = carry
        u, of_x = tx.update(strength * y, of_x, x)
        new = x - rate * u
        u, of_y = tx.update(-strength * (new if alternating else x), of_y, y)
        y = y - rate * u
        return ((new, y), (of_x, of_y)), jnp.log(jnp.hypot(new, y))

    x, y = jnp.float64(1.0), jnp.float64(0.5)
    return np.asarray(jax.lax.scan(one_round, ((x, y), (tx.init(x), tx.init(y))), None, length=steps)[1])


GAMES = [
    (rules.optimistic(1.0, 1.0), 0.5, False, math.sqrt(0.5), 1e-8),
    (rules.heavy_ball(-0.5), 0.5, True, 0.9626, 1e-4),
    (rules.heavy_ball(0.0), 0.5, True, 1.0, 1e-12),
    (rules.complex_heavy_ball(0.9, math.pi / 8), 0.5, False, None, None),
    (rules.complex_heavy_ball(0.667, 0.396 * math.pi), 0.6, False, 0.900, 2e-3),
    (rules.heavy_ball(-0.5), 0.5, False, None, None),
]


@pytest.mark.parametrize("game", GAMES)
def test_the_bilinear_game(game, x64):
    rule, rate, alternating, known, tolerance = game
    radius = analysis.bilinear_game(rule, rate, alternating=alternating)
    if known is not None:
        assert radius == pytest.approx(known, abs=tolerance)
    if not alternating:
        assert radius == pytest.approx(analysis.spectral_radius(rule, rate, 1j), abs=1e-8)
    steps = 1500
    sizes = play(rule, rate, steps, alternating)
    measured = np.polyfit(np.arange(200, steps), sizes[200:], 1)[0]
    assert measured == pytest.approx(math.log(radius), rel=0.01, abs=1e-5)


def test_games_that_momentum_loses_and_those_that_it_wins():
    assert analysis.stability_limit(rules.optimistic(), 2j) == pytest.approx(1 / math.sqrt(3) / 2, rel=1e-9)
    rates = np.geomspace(1e-3, 3, 200)
    for decay in (-0.5, 0.0, 0.5):
        assert np.all(analysis.bilinear_game(rules.heavy_ball(decay), rates) > 1)
        assert analysis.stability_limit(rules.heavy_ball(decay), 1j) == 0
    # Zero is a crossing of these, found to the root of the rounding.
    for decays in ((0.0, 0.9, 0.99), (0.0, 0.9, 0.99, 0.999), (0.5, 0.9)):
        assert analysis.stability_limit(rules.aggregated(decays), 1j) == 0
    # |decay| 0.9 and angle pi/8: the best rate of a fine grid.
    best = analysis.bilinear_game(rules.complex_heavy_ball(0.9, math.pi / 8), np.linspace(0.01, 1, 400)).min()
    assert best == pytest.approx(0.980, abs=2e-3)


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.bilinear_game(BALL, 0.1, 0.0), ValueError, r"strength must be in \(0, inf\)"),
    (lambda: analysis.bilinear_game(BALL, 0.1, alternating=1), TypeError, "alternating must be True or False"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
