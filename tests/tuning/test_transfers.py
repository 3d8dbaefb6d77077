"""Settings for other batch sizes and lengths of the run, against loops, closed forms and a minimised bound."""

import math

import numpy as np
import pytest
from conformance import RULES
from scipy import optimize

import momentum_optax as mo
from momentum_optax import analysis, tuning

SPECTRUM = np.array([0.01, 0.1, 1.0])
RATE, DECAY, K = 0.02, 0.9, 4


def variance_of_a_loop(decay, rate, noise):
    """The stationary variance of v' = decay v + g, theta' = theta - rate v' at each curvature, by propagation."""
    tt, tv, vv = (np.zeros(3) for _ in range(3))
    for _ in range(12_000):
        # w = v' = decay v + curvature theta + noise
        tw = decay * tv + SPECTRUM * tt
        ww = decay**2 * vv + 2 * decay * SPECTRUM * tv + SPECTRUM**2 * tt + noise
        tt, tv, vv = tt - 2 * rate * tw + rate**2 * ww, tw - rate * ww, ww
    return tt


def convergence(decay, rate):
    """The logarithm of the larger root of z^2 - (1 + decay - rate curvature) z + decay."""
    half = (1 + decay - rate * SPECTRUM) / 2
    return np.log(abs(half + np.sqrt(half**2 - decay + 0j)))


def test_the_power_rule_keeps_the_variance_to_known_shares():
    found = tuning.transfer(mo.heavy_ball(DECAY), RATE, batch=K, curvatures=SPECTRUM)
    decay = DECAY**K
    rate = K * RATE * (1 - decay) / (1 - DECAY)  # k times the effective rate
    assert mo.equivalent(found.rule, mo.heavy_ball(decay), (found.learning_rate, rate))
    before, after = variance_of_a_loop(DECAY, RATE, 1.0), variance_of_a_loop(decay, rate, 1 / K)
    np.testing.assert_allclose(found.defects.variance, after / before - 1, rtol=1e-7)
    np.testing.assert_allclose(found.defects.variance, [0.0008, 0.008, 0.085], rtol=0.03)
    expected = convergence(decay, rate) / (K * convergence(DECAY, RATE)) - 1
    np.testing.assert_allclose(found.defects.contraction, expected, atol=1e-9)
    lag = K * decay / (1 - decay) / (DECAY / (1 - DECAY)) - 1
    assert found.defects.lag == pytest.approx(lag, rel=1e-9)
    assert "curvature 1: variance +8.48%, convergence per example" in str(found)


def mean_of_two(a, b):
    """5 and 50 times the averages of two decays, gains that the mean of heavy balls of 0.9 and 0.99 has."""
    return mo.Filter(((a, 0.0), (0.0, b)), (1 - a, 1 - b), (5 * a, 50 * b), 5 * (1 - a) + 50 * (1 - b))


# A rule, and the same by its name with decay^k.
MAPPED = {
    "plain": (mo.heavy_ball(0.0), lambda k: mo.heavy_ball(0.0)),
    "heavy ball": (mo.heavy_ball(0.9), lambda k: mo.heavy_ball(0.9**k).scale((1 - 0.9**k) / 0.1)),
    "average": (mo.ema(0.9), lambda k: mo.ema(0.9**k)),
    "mixture": (mo.quasi_hyperbolic(0.9, 0.7), lambda k: mo.quasi_hyperbolic(0.9**k, 0.7)),
    "Nesterov": (mo.nesterov(0.9), lambda k: mo.quasi_hyperbolic(0.9**k, 0.9).scale(10.0)),
    "primal averaging": (mo.primal_averaging(0.9, 0.7), lambda k: mo.primal_averaging(0.9**k, 0.7)),
    "EMA-Nesterov": (mo.ema_nesterov(0.9, 0.5), lambda k: mo.primal_averaging((1 - 0.1 * 0.5) ** k, 0.5).scale(2.0)),
    "two averages": (
        mo.aggregated((0.9, 0.99)).change_basis([[1.0, 2.0], [0.5, -1.0]]),
        lambda k: mean_of_two(0.9**k, 0.99**k),
    ),
}


@pytest.mark.parametrize("k", [0.25, 3, 4.0])
@pytest.mark.parametrize("name", MAPPED)
def test_every_memory_keeps_its_share_of_the_update(name, k):
    rule, named = MAPPED[name]
    found = tuning.transfer(rule, 0.02, keep="half_life_tokens", base="norm", batch=k)
    assert found.learning_rate == 0.02
    n = 12
    np.testing.assert_allclose(found.rule.impulse_response(n), named(k).impulse_response(n), rtol=1e-9, atol=1e-12)
    back = tuning.transfer(found.rule, 0.02, keep="half_life_tokens", batch=1 / k).rule
    np.testing.assert_allclose(back.impulse_response(n), rule.impulse_response(n), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(back.dc_gain(), found.rule.dc_gain(), rtol=1e-9)


def test_the_evaluated_point_of_primal_averaging_is_that_of_its_own_decay():
    found = tuning.transfer(mo.primal_averaging(0.9, 0.7), 0.02, batch=4)
    curves = [
        analysis.error_curve(rule, 0.08, SPECTRUM, 30, point="evaluated")
        for rule in (found.rule, mo.primal_averaging(0.9**4, 0.7))
    ]
    np.testing.assert_allclose(*curves, rtol=1e-9)


# The table: base, choice, new decay and factor of the rate for an average at k = 4 and the same number of examples.
TABLE = [
    ("sgd", "trajectory", 0.9**4, 4),
    ("adam", "trajectory", 0.9**4, 2),
    ("sgd", "half_life_tokens", 0.9**4, 1),
    ("adam", "half_life_tokens", 0.9**4, 1),
    ("norm", "half_life_tokens", 0.9**4, 1),
    ("sgd", "linear_rate", 0.9, 4),
    ("sgd", "square_root_rate", 0.9, 2),
    ("adam", "square_root_rate", 0.6, 2),
    ("norm", "bound", 0.6, 4),
    ("norm", "bound_fixed_decay", 0.9, 2),
]


@pytest.mark.parametrize(("base", "keep", "decay", "factor"), TABLE)
def test_a_choice_gives_the_published_rate_and_decay(base, keep, decay, factor):
    found = tuning.transfer(mo.ema(0.9), 0.02, base=base, keep=keep, batch=4)
    assert mo.equivalent(found.rule, mo.ema(decay))
    assert found.learning_rate == pytest.approx(0.02 * factor)
    assert "arXiv" in found.source
    assert found.invariant


def test_the_laws_for_norms_minimise_the_bound():
    def least(K, B):
        """The decay and the learning rate of the least bound, with numbers of our choice in it."""
        found = optimize.minimize(
            lambda x: math.log(
                2 / (math.exp(x[0]) * K) + 3 * math.exp(x[0] - x[1]) + 5 * math.exp(x[1] / 2) / math.sqrt(B)
            ),
            x0=(-8.0, -2.0),
            options={"xatol": 1e-9, "fatol": 1e-15, "maxiter": 2000},
            method="Nelder-Mead",
        )
        return 1 - math.exp(found.x[1]), math.exp(found.x[0])

    decay, rate = least(1e6, 8.0)
    found = tuning.transfer(mo.ema(decay), rate, base="norm", keep="bound", batch=4, steps=0.5)
    after, later = least(0.5e6, 32.0)
    assert analysis.poles(found.rule)[0].real == pytest.approx(after, rel=1e-5)
    assert found.learning_rate == pytest.approx(later, rel=1e-4)
    # At one decay the learning rate alone: 2/(rate K) + 3 rate/(1 - decay) is least where both terms are equal.
    fixed = tuning.transfer(mo.ema(0.9), rate, base="norm", keep="bound_fixed_decay", batch=4, steps=0.5)
    assert fixed.learning_rate / rate == pytest.approx(math.sqrt((2.0 / 0.5e6 / 3.0) / (2.0 / 1e6 / 3.0)))


def test_weight_decay_forgets_the_same_share_of_a_run():
    old = 1 - 0.02 * 0.3
    for settings, steps in (({"batch": 4}, 25), ({"steps": 3}, 300), ({"batch": 4, "keep": "linear_rate"}, 25)):
        found = tuning.transfer(mo.ema(0.9), 0.02, weight_decay=0.3, **settings)
        assert (1 - found.learning_rate * found.weight_decay) ** steps == pytest.approx(old**100, rel=1e-12)
    assert tuning.transfer(mo.ema(0.9), 0.02, batch=4).weight_decay == 0


def test_the_square_root_of_adam_does_not_depend_on_the_length_of_the_run():
    found = tuning.transfer(mo.ema(0.9), 0.02, base="adam", keep="square_root_rate", batch=4, steps=1)
    assert mo.equivalent(found.rule, mo.ema(0.6))


def test_nothing_changes_without_a_change():
    found = tuning.transfer(mo.nesterov(0.9), 0.02, weight_decay=0.1, curvatures=SPECTRUM)
    assert mo.equivalent(found.rule, mo.nesterov(0.9))
    assert (found.learning_rate, found.weight_decay) == pytest.approx((0.02, 0.1))
    np.testing.assert_allclose([*found.defects.variance, *found.defects.contraction, found.defects.lag], 0, atol=1e-12)


def test_a_loop_that_converges_at_once_still_does():
    found = tuning.transfer(mo.heavy_ball(0.0), 1.0, batch=1, curvatures=[1.0, 0.5])
    assert list(found.defects.contraction) == [0, 0]
    faster = tuning.transfer(mo.heavy_ball(0.0), 0.5, batch=2, curvatures=[1.0])
    assert list(faster.defects.contraction) == [np.inf]


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_two_equal_decays_in_a_row_are_moved_in_any_basis(decay):
    # An average of an average, also as one recurrence of two steps, whose equal poles come out as a complex pair.
    row = mo.Filter(((decay, 0.0), (1 - decay, decay)), (1.0, 0.0), (0.0, 1 - decay), 0.0)
    recurrence = mo.Filter(((2 * decay, -(decay**2)), (1.0, 0.0)), (1.0, 0.0), (0.0, (1 - decay) ** 2), 0.0)
    assert mo.equivalent(row, recurrence)
    moved = [tuning.transfer(rule, 0.1, batch=4).rule for rule in (row, recurrence)]
    assert mo.equivalent(*moved)
    assert mo.analysis.poles(moved[1]).real == pytest.approx([decay**4] * 2, rel=1e-6)


def test_a_gradient_over_the_size_of_its_noise_needs_the_root():
    sgd, adam = (tuning.transfer(mo.ema(0.9), 0.02, base=b, batch=4, curvatures=SPECTRUM) for b in ("sgd", "adam"))
    np.testing.assert_allclose(adam.defects.variance, sgd.defects.variance, rtol=1e-12)
    np.testing.assert_allclose(adam.defects.contraction, sgd.defects.contraction, rtol=1e-9, atol=1e-12)
    # A norm divides by the noise of the average, whose variance is (1 - decay)/(1 + decay) of the gradient's over k.
    norm = tuning.transfer(mo.ema(0.9), 0.02, base="norm", keep="bound", batch=4, curvatures=SPECTRUM)
    rate = 0.08 * math.sqrt((0.1 / 1.9) / (0.4 / 1.6 / 4))
    before, after = variance_of_a_loop(0.9, 0.02 * 0.1, 1.0), variance_of_a_loop(0.6, rate * 0.4, 1 / 4)
    np.testing.assert_allclose(norm.defects.variance[1:], (after / before - 1)[1:], rtol=1e-6)
    # The linear rate alone remembers four times as many examples.
    assert tuning.transfer(mo.ema(0.9), 0.02, keep="linear_rate", batch=4).defects.lag == pytest.approx(3.0)


# Rules of the table of conformance that have no half-life to keep, or change with the step or the age of a leaf.
REFUSED = {
    *("adan_mix", "ademamix_mix", "chebyshev", "complex_heavy_ball", "grokfast", "grokfast_average", "heavy_ball"),
    *("implicit_transport", "lookahead", "nadam_mix", "optimistic", "optimized_gradient", "optimized_gradient_norm"),
    *("outer_nesterov", "pid", "positive_negative", "schedule_free"),
}


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_of_the_catalogue_is_mapped_or_refused_with_a_sentence(name):
    rule = RULES[name]()
    if name in REFUSED:
        with pytest.raises(ValueError, match=r"rule must have (constant coefficients|poles in)"):
            tuning.transfer(rule, 0.02, batch=3)
        return
    found = tuning.transfer(rule, 0.02, batch=3).rule
    np.testing.assert_allclose(found.dc_gain(), rule.dc_gain(), rtol=1e-9)
    before, after = (np.sort_complex(analysis.poles(rule.pruned())) for rule in (rule, found))
    np.testing.assert_allclose(after, before**3, atol=1e-12)


def transfer(**changes):
    arguments = {"rule": mo.ema(0.9), "learning_rate": 0.02, "batch": 4} | changes
    return tuning.transfer(arguments.pop("rule"), arguments.pop("learning_rate"), **arguments)


# An average of an average.
TWICE = mo.Filter(((0.9, 0.0), (0.1, 0.9)), (0.1, 0.0), (0.0, 1.0), 0.0)

ERRORS = [
    ({"rule": 0.9}, TypeError, "rule must be a Filter such as"),
    ({"learning_rate": 0.0}, ValueError, r"learning_rate must be in \(0, inf\), got 0.0"),
    ({"batch": -1}, ValueError, r"batch must be in \(0, inf\), got -1"),
    ({"steps": 0}, ValueError, r"steps must be in \(0, inf\), got 0"),
    ({"weight_decay": 50.0}, ValueError, r"weight_decay must be in \[0, 50.0\), got 50.0"),
    ({"base": "lion"}, ValueError, "base must be one of 'sgd', 'adam', 'norm', got 'lion'"),
    ({"keep": "variance"}, ValueError, "keep must be one of 'trajectory', .* got 'variance'"),
    ({"base": "norm"}, ValueError, "one of 'half_life_tokens', 'bound', 'bound_fixed_decay' for base 'norm'"),
    ({"rule": mo.nesterov(mo.schedules.fista())}, ValueError, "rule must have constant coefficients"),
    ({"rule": mo.Filter(0.9, 1.0, 0.9, 1.0, lambda t: 1.0)}, ValueError, "rule must have constant coefficients"),
    ({"rule": mo.heavy_ball(1.0)}, ValueError, r"rule must have poles in \(0, 1\)"),
    (
        {"rule": mo.ema(0.7), "base": "adam", "keep": "square_root_rate"},
        ValueError,
        r"decays above 0.75 to become 1 - 4 \(1 - decay\), got 0.7",
    ),
    ({"rule": TWICE, "batch": 2.5}, ValueError, "batch must be a whole number .* got 2.5"),
    ({"curvatures": [1.0, 0.0]}, ValueError, "curvatures must be in"),
    ({"curvatures": [1.0, 1e4]}, ValueError, "curvatures must be such that the old settings converge, got 10000.0"),
    (
        {"rule": mo.nesterov(mo.schedules.fista()), "keep": "linear_rate", "curvatures": [1.0]},
        ValueError,
        "curvatures must be left out",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(changes, error, message):
    with pytest.raises(error, match=message):
        transfer(**changes)


def test_a_scheduled_rule_can_take_another_rate():
    found = transfer(rule=mo.nesterov(mo.schedules.fista()), keep="linear_rate")
    assert found.learning_rate == pytest.approx(0.08)
    assert math.isnan(found.defects.lag)
