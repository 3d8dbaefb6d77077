"""A decay of 1: sums take it and forget nothing; averages refuse it, since the gradient would have weight 0.

Which arguments of rules and dialects are decays, and of which kind, is read off their filters: a decay is the modulus
of a pole, and the gain for a constant gradient grows with the decay of a sum alone.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import finished_optimizers
from dialects import CALLS

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS
from tests.rules.oracles import BY_RULE, INTERVALS

LATE = 10**6  # past every special first step
PROBE = 0.6137  # where a pole of this modulus is an argument of this value and no coincidence
STEPS = 5


def is_decay(rule_of):
    """Whether the argument of `rule_of` is the modulus of a pole of its rule."""
    rule = rule_of(PROBE)
    return rule is not None and PROBE in abs(np.linalg.eigvals(rule.at(LATE, LATE).matrices()[0])).round(9)


def is_sum(rule_of):
    return not np.isclose(*(rule_of(decay).at(LATE, LATE).dc_gain() for decay in (0.5, 0.75)), rtol=1e-3)


def rules_by_decay():
    """Every rule as a function of one of its decays, by the names of both."""
    for rule, intervals in INTERVALS.items():
        for name, interval in intervals.items():
            if interval[:-1].endswith(", 1"):
                yield (rule, name), lambda d, rule=rule, name=name: BY_RULE[rule].make(**{name: d})


def _with_entry(arguments, name, i, value):
    """Arguments with one of another value; `i` is the entry of a tuple, or None."""
    if i is not None:
        value = (*arguments[name][:i], value, *arguments[name][i + 1 :])
    return {**arguments, name: value}


def arguments_by_decay():
    """The arguments of every dialect as a function of one of its decays, at learning rate 1, without weight decay."""
    for dialect, record in DIALECTS.items():
        plain = {**record.defaults, **CALLS[dialect][0]} | ({record.learning_rate: 1.0} if record.learning_rate else {})
        plain.pop("weight_decay", None)
        for name, value in plain.items():
            for i, entry in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
                if isinstance(entry, float) and 0 < entry < 1:
                    yield (dialect, name, i), partial(_with_entry, plain, name, i)


def described(key, arguments):
    return lambda d: DIALECTS[key[0]].describe(**arguments(d)).rule


RULES = {key: rule for key, rule in rules_by_decay() if is_decay(rule)}
CALLED = {key: arguments for key, arguments in arguments_by_decay() if is_decay(described(key, arguments))}

# The finished optimizers, whose decays are those of the rules that they hold.
SUMS = {
    "sgd": lambda d: mo.sgd(1.0, d),
    "sgd, nesterov": lambda d: mo.sgd(1.0, d, nesterov=True),
    "relativistic": lambda d: mo.contrib.relativistic(1.0, d, 0.0),
}
AVERAGES = {
    "lion": lambda d: mo.lion(0.1, b2=d),
    "signum": lambda d: mo.signum(0.1, d),
    "muon": lambda d: mo.muon(0.1, d),
    "normuon": lambda d: mo.normuon(0.1, d),
    "normuon, squares": lambda d: mo.normuon(0.1, b2=d),
    "normalized_sgd": lambda d: mo.normalized_sgd(0.1, d),
    "yellowfin": lambda d: mo.contrib.yellowfin(decay=d),
    "mars_adamw": lambda d: mo.contrib.mars_adamw(0.1, d),
    "mars_lion": lambda d: mo.contrib.mars_lion(0.1, d),
}
# Without a decay that a user gives.
WITHOUT = {"srsgd", "storm"}

for key, arguments in CALLED.items():
    call = lambda d, name=key[0], arguments=arguments: getattr(mo.interop, name)(**arguments(d))  # noqa: E731
    (SUMS if is_sum(described(key, arguments)) else AVERAGES)[f"interop.{key[0]}, {key[1]} {key[2]}"] = call


def test_every_finished_optimizer_says_what_it_does_at_a_decay_of_1():
    found = {name.split(",")[0] for name in (*SUMS, *AVERAGES) if not name.startswith("interop.")}
    assert found | WITHOUT == set(finished_optimizers())


# Decays of averages inside of a rule, whose poles are others.
INNER = {("ema_nesterov", "decay"), ("outer_nesterov", "decay")}


def test_what_is_called_a_decay_is_found_to_be_one():
    assert {(rule, "decay") for rule, intervals in INTERVALS.items() if "decay" in intervals} <= set(RULES) | INNER
    for name, record in DIALECTS.items():
        if {"momentum", "beta", "betas"} & set(inspect.signature(record.describe).parameters):
            assert name in {key[0] for key in CALLED}


@pytest.mark.parametrize("key", RULES, ids=".".join)
def test_the_interval_of_a_decay_includes_1_for_sums_alone(key):
    rule, name = key
    assert INTERVALS[rule][name].endswith("]") == is_sum(RULES[key])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("key", [key for key in RULES if is_sum(RULES[key])], ids=".".join)
def test_a_rule_that_is_a_sum_is_the_papers_at_a_decay_of_1(key):
    row, constants = BY_RULE[key[0]], BY_RULE[key[0]].constants | {key[1]: 1.0}
    points, _ = row.run(np.ones_like, np.zeros(4), STEPS, lambda _: constants, learning_rate=1.0)
    expected = -np.diff(points[:, 0], prepend=0.0)
    np.testing.assert_allclose(updates(mo.scale_by_momentum(RULES[key](1.0))), expected, rtol=1e-6)


def updates(tx):
    """The updates for a gradient of ones."""
    g, steps = jnp.ones((2, 2)), []
    state, step = tx.init(g), jax.jit(tx.update)
    for _ in range(STEPS):
        u, state = step(g, state, g)
        steps.append(float(u[0, 0]))
    return np.array(steps)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_takes_a_decay_of_1_and_forgets_nothing(name):
    steps = abs(updates(SUMS[name](1.0)))
    if "betas" in name:  # the mean of several velocities: one of them forgets nothing, none loses more than it gets
        assert (np.diff(steps) >= 1 / 3 - 1e-6).all()
    else:
        # The sum of the gradients so far; Nesterov's forms look one ahead.
        np.testing.assert_allclose(steps, np.arange(1, STEPS + 1) + ("nesterov" in name), rtol=1e-6)
    with pytest.raises(ValueError, match=r"must be (a float )?in"):
        SUMS[name](-1.5)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_refuses_a_decay_of_1(name):
    AVERAGES[name](0.5)
    with pytest.raises(ValueError, match=r"must be in [\[(]-?[01], 1\), got 1\.0"):
        AVERAGES[name](1.0)


@pytest.mark.parametrize("key", [*(key for key in RULES if not is_sum(RULES[key])), *sorted(INNER)], ids=".".join)
def test_a_rule_that_is_an_average_refuses_a_decay_of_1(key):
    rule_of = dict(rules_by_decay())[key]
    rule_of(0.5)
    with pytest.raises(ValueError, match=r"must be in [\[(]-?[01], 1\), got 1\.0"):
        rule_of(1.0)


def test_analysis_of_a_sum_that_forgets_nothing_is_infinite_and_silent():
    rule = mo.heavy_ball(1.0)
    assert mo.analysis.dc_gain(rule) == mo.analysis.mean_lag(rule) == np.inf
    assert mo.analysis.stationary_variance(rule, 0.1, 1.0, 1.0) == np.inf
    assert mo.analysis.iterations(rule, 0.1, 1.0) == np.inf
