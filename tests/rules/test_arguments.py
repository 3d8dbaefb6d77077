"""The ranges of the arguments of every rule: checked, documented and included at their closed ends."""

import fractions
import math
import re

import numpy as np
import pytest
from conformance import rule_functions

import momentum_optax as mo
from momentum_optax import rules
from tests.rules.oracles import BY_RULE, INTERVALS, START, TABLE, gradient
from tests.rules.oracles.row import FINITE
from tests.rules.trajectories import points

PUBLIC = list(rule_functions())


ARGUMENTS = [(rule, name) for rule, names in INTERVALS.items() for name in names]


every_argument = pytest.mark.parametrize(("rule", "name"), ARGUMENTS, ids=[".".join(pair) for pair in ARGUMENTS])


def ends(rule, name):
    """The values at the ends of an argument's interval, as (end, whether it belongs, outward direction)."""
    allowed = INTERVALS[rule][name]
    if allowed.startswith("at least"):
        return [(int(allowed.split()[-1]), True, -1)]
    low, high = (eval(end, {"inf": math.inf, "sqrt": math.sqrt}, BY_RULE[rule].constants) for end in _split(allowed))
    return [(low, allowed[0] == "[", -1), (high, allowed[-1] == "]", 1)]


def _split(interval):
    return interval[1:-1].split(", ")


def _called(name):
    """What messages call an argument of a row."""
    return f"decays[{name[1]}]" if name in ("b0", "b1", "b2") else name


def test_every_number_of_every_rule_has_its_interval_here():
    for rule in PUBLIC:
        given = set().union(*(row.constants for row in TABLE if row.rule == rule))
        assert set(INTERVALS[rule]) == given - {"first_step"}, rule


@every_argument
def test_a_number_out_of_range_is_an_error_that_names_argument_and_value(rule, name):
    for end, belongs, outward in ends(rule, name):
        outside = end if not belongs else end + outward * (1 if isinstance(end, int) else 1e-9)
        # For whole numbers NaN is a TypeError, see below.
        for value in (outside,) if isinstance(end, int) else (outside, math.nan):
            with pytest.raises(ValueError, match=re.escape(_message_name(rule, name))) as error:
                BY_RULE[rule].make(**{name: value})
            assert repr(value) in str(error.value)


def _message_name(rule, name):
    return _called(name) if rule == "aggregated" else name


@every_argument
def test_the_docstring_states_the_interval_that_is_checked(rule, name):
    name, allowed = ("decays" if rule == "aggregated" else name), INTERVALS[rule][name]
    doc = rule_functions()[rule].__doc__
    entry = re.search(rf"^ +{name}: (.*?)(?=^ +\w+: |^\s*$)", doc, re.MULTILINE | re.DOTALL).group(1)
    assert ("finite" if allowed == FINITE else allowed) in " ".join(entry.split())


@every_argument
def test_a_string_is_no_number(rule, name):
    with pytest.raises(TypeError, match=re.escape(_message_name(rule, name))):
        BY_RULE[rule].make(**{name: "0.9"})


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("aggregated_exponential", "count"),
        ("grokfast_average", "window"),
        ("lookahead", "period"),
        ("outer_nesterov", "period"),
        ("optimized_gradient", "steps"),
        ("optimized_gradient_norm", "steps"),
        ("schedule_free", "warmup_steps"),
    ],
)
def test_a_fraction_is_no_whole_number(rule, name):
    for value in (2.5, math.nan, lambda step: 3):
        with pytest.raises(TypeError, match=name):
            BY_RULE[rule].make(**{name: value})


def test_fractions_are_numbers():
    half, tenth = fractions.Fraction(1, 2), fractions.Fraction(1, 10)
    assert rules.triple_momentum(half, tenth).A == rules.triple_momentum(0.5, 0.1).A
    assert mo.schedules.cyclical(tenth, half, 4)(1) == mo.schedules.cyclical(0.1, 0.5, 4)(1)
    with pytest.raises(ValueError, match=r"mu must be in \(0, 0\.5\), got Fraction\(1, 1\)"):
        rules.triple_momentum(half, fractions.Fraction(1))


def test_other_wrong_arguments_are_errors_too():
    with pytest.raises(ValueError, match="first_step must be one of 'zero', 'gradient', got 'one'"):
        rules.heavy_ball(0.9, first_step="one")
    with pytest.raises(ValueError, match="decays must have at least one entry"):
        rules.aggregated(())
    with pytest.raises(TypeError, match=r"decays must be a tuple or list of decays, got 0\.9"):
        rules.aggregated(0.9)
    with pytest.raises(TypeError, match="decay must be a number or a scalar array, got a schedule"):
        rules.nadam_mix(mo.schedules.fista())
    with pytest.raises(TypeError, match="psi must be a number"):
        rules.nadam_mix(0.9, psi=mo.schedules.fista())


@every_argument
def test_a_rule_is_the_papers_at_the_closed_ends_of_its_ranges_too(rule, name):
    # Where a decay is 0, velocities vanish from the filter.
    row = BY_RULE[rule]
    for end, belongs, _ in ends(rule, name):
        if belongs:
            constants = row.constants | {name: end}
            steps = 20
            stored = row.reference(gradient, START, steps, row.learning_rate, lambda t, constants=constants: constants)
            expected = np.array([point[0] if row.evaluates else point for point in stored])
            got = points(row.make(**{name: end}), row.learning_rate, steps, gradient, START)
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
