"""The normal forms that docstrings state, and rules that are the same rule."""

import itertools
import re

import numpy as np
import pytest
from conformance import rule_functions

import momentum_optax as mo
from momentum_optax import rules
from tests.rules.oracles import BY_RULE, SYMBOLS, TABLE

PUBLIC = list(rule_functions())


# Rule and (decay, nu, scale), then the white-noise gain and the gain at the highest frequency for a scale of 1.
COMMON_SETTINGS = {
    "heavy ball": (rules.heavy_ball(0.9), (0.9, 1, 10, 0.0526, 0.053)),
    "Nesterov": (rules.nesterov(0.9), (0.9, 0.9, 10, 0.0706, 0.147)),
    "PyTorch's Nesterov": (rules.torch_nesterov(0.9), (0.9, 0.9, 10, 0.0706, 0.147)),
    "Lion": (rules.lion_mix(), (0.99, 0.909, 1, 0.0141, 0.095)),
    "Muon": (rules.muon_mix(), (0.95, 0.95, 1, 0.0304, 0.074)),
    "Grokfast": (rules.grokfast().at(1), (0.98, 0.667, 3, 0.124, 0.340)),
    "MARS": (rules.mars_mix(), (0.95, 0.975, 1, 0.0274, 0.050)),
    "QHM": (rules.quasi_hyperbolic(0.999, 0.7), (0.999, 0.7, 1, 0.0907, 0.300)),
    "AccSGD": (rules.accelerated(), (0.98818, 0.77922, 4.529, 0.0564, 0.225)),
    "MaSS": (rules.mass(), (0.90476, 0.25, 1.333, 0.601, 0.763)),
}


@pytest.mark.parametrize("name", COMMON_SETTINGS)
def test_common_settings_have_these_quasi_hyperbolic_numbers(name):
    rule, expected = COMMON_SETTINGS[name]
    form = rule.normal_form()
    numerator, denominator = rule.transfer_function()
    first, second = rule.impulse_response(2)  # later ones are smaller by the decay each
    noise = (first**2 + second**2 / (1 - form.decay**2)) / form.scale**2
    highest = abs(numerator @ [1, -1] / (denominator @ [1, -1])) / form.scale
    for got, stated in zip((form.decay, form.nu, form.scale, noise, highest), expected, strict=True):
        # Correct to the last digit that is printed.
        digits = len(repr(stated).partition(".")[2])
        assert got == pytest.approx(stated, abs=0.5000001 * 10.0**-digits)


def test_every_rule_of_order_one_is_its_normal_form():
    checked = []
    for row in TABLE:
        rule = row.make()
        if rule.is_constant and rule.pruned().order == 1 and row.rule != "optimistic":
            scale, decay, nu = rule.normal_form()
            assert mo.equivalent(rules.quasi_hyperbolic(decay, nu).scale(scale), rule, rtol=1e-12), str(row)
            checked.append(row.rule)
    assert len(checked) >= 16
    assert "heavy_ball" in checked


def stated_normal_form(name):
    """The text between the parentheses after "Normal form ...:" in a docstring as a Python expression, or None."""
    text = " ".join(rule_functions()[name].__doc__.split())
    begin = re.search(r"Normal form[^:(]*: (?=\()", text)
    if begin is None:
        return None
    depth = itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in text[begin.end() :])
    length = next(i for i, d in enumerate(depth) if d == 0) + 1
    formula = text[begin.end() : begin.end() + length].replace("^", "**").replace("lambda", "lambda_")
    return re.sub(r"(?<=[\w)]) (?=[\w(])", "*", formula)


def test_the_normal_forms_in_the_docstrings_are_true():
    stated = {name: stated_normal_form(name) for name in PUBLIC}
    assert {name for name, formula in stated.items() if formula} == set(SYMBOLS)
    rng = np.random.default_rng(7)
    for name, symbols in SYMBOLS.items():
        for _ in range(10):
            values = {key: rng.uniform(*ends) for key, ends in BY_RULE[name].ranges.items()}
            # Step 1, for the one that is stated apart from its first step.
            form = BY_RULE[name].make(**values).at(1).normal_form()
            expected = eval(stated[name], {}, symbols(**values))
            # nu is found by dividing by the decay, which is small now and then.
            np.testing.assert_allclose(form, expected, rtol=1e-10, err_msg=name)


# Two rules, each with its learning rate, that are the same rule: what docstrings say in passing.
SAME = {
    "a heavy ball is a sum that an average is, too": (rules.heavy_ball(0.8), 0.2, rules.ema(0.8), 1.0),
    "nu 0 is plain descent": (rules.quasi_hyperbolic(0.9, 0.0), 1.0, rules.heavy_ball(0.0), 1.0),
    "nu 1 is the average": (rules.quasi_hyperbolic(0.9, 1.0), 1.0, rules.ema(0.9), 1.0),
    "nu beta is Nesterov": (rules.quasi_hyperbolic(0.9, 0.9), 1.0, rules.nesterov(0.9), 0.1),
    "at a constant decay there is one Nesterov": (rules.torch_nesterov(0.7), 1.0, rules.nesterov(0.7), 1.0),
    "without look-ahead it is a heavy ball": (rules.synthesized_nesterov(0.7, 0.0), 1.0, rules.heavy_ball(0.7), 1.0),
    "looking ahead by the decay is Nesterov": (rules.synthesized_nesterov(0.7, 0.7), 1.0, rules.nesterov(0.7), 1.0),
    "0.1 and 3 give 0, 0.9, 0.99": (rules.aggregated_exponential(0.1, 3), 1.0, rules.aggregated(), 1.0),
    "least rho": (rules.robust_momentum(4.0, 0.5), 1.0, rules.triple_momentum(4.0, 0.5), 1.0),
    "largest rho": (rules.robust_momentum(4.0, 0.5, 1 - 0.5 / 4), 1.0, rules.heavy_ball(0.0), 1 / 4),
    "the tied pole": (mo.contrib.recht_pid(-1.9, 0.3, 17.0), 1.0, rules.pid(-1.9, 0.3, 17.0, 17 / 18.9), 1.0),
    "the integral alone is plain descent": (rules.pid(0.0, 0.3, 0.0, 0.5), 1.0, rules.heavy_ball(0.0), 0.3),
    "gamma 1 - beta is Nesterov": (rules.mars_mix(0.9, 0.1), 1.0, rules.nesterov(0.9), 0.1),
    "Muon's mix is Nesterov": (rules.muon_mix(0.9), 1.0, rules.nesterov(0.9), 0.1),
    "undampened, the first step is no special one": (
        rules.heavy_ball(0.9, first_step="gradient"),
        1.0,
        rules.heavy_ball(0.9),
        1.0,
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_rules_that_are_said_to_be_the_same_are(name):
    f, rate, g, other = SAME[name]
    assert mo.equivalent(f, g, (rate, other), rtol=1e-12)


def test_recht_pids_way_back_from_the_normal_form_is_right():
    a, b, n = 0.3, 0.9, 0.7
    form = mo.contrib.recht_pid(-a * b * n / (1 - b), a, a * n * b**2 / (1 - b) ** 2).normal_form()
    np.testing.assert_allclose(form, (a, b, n), rtol=1e-12)
