"""The report: its numbers are those of the functions, and its table prints all of them."""

import dataclasses
import inspect
import math
import re

import numpy as np
import pytest
from conformance import RULES, every_rule

import momentum_optax as mo
from momentum_optax import analysis, rules


def test_the_report_prints_a_table_and_returns_its_numbers(capsys):
    rule = rules.heavy_ball(0.9)
    found = analysis.report(rule, learning_rate=0.05, L=2.0, mu=0.1, storage=mo.storage.bfloat16())
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert len(printed.splitlines()) == sum(value is not None for value in vars(found).values()) >= 19
    assert all(len(line) <= 90 for line in printed.splitlines())
    curvature = np.geomspace(0.1, 2.0, 65)
    kept = analysis.precision(rule, mo.storage.bfloat16())
    expected = {
        "order": 1,
        "dc_gain": 10.0,
        "half_life": math.log(2) / -math.log(0.9),
        "memory": (7.0, 22.0),
        "mean_lag": 9.0,
        "bandwidth": math.acos(1 - 0.01 / 1.8),
        "noise_gain": 1 / 0.19,
        "relative_noise": 0.01 / 0.19,
        "stability_limit": 1.9,
        "energy_limit": 0.1,
        "effective_learning_rate": 0.5,
        "contraction": math.sqrt(0.9),
        "iterations": analysis.iterations(rule, 0.05, curvature).max(),
        "transient_growth": analysis.transient_growth(rule, 0.05, curvature).max(),
        "variance": tuple(analysis.stationary_variance(rule, 0.05, [0.1, 2.0])),
        "bytes_per_parameter": 2.0,
        "stall": kept.stall,
        "rounding_noise": kept.noise,
    }
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9), name
    assert found.poles == (pytest.approx(0.9),)
    for name, text in (("largest stable", "1.9"), ("mean lag", "9"), ("effective learning", "0.5")):
        assert [line for line in printed.splitlines() if line.startswith(name) and text in line.split()]


def test_every_field_of_the_report_is_printed():
    labels = []
    for field in dataclasses.fields(analysis.Report):
        empty = dict.fromkeys(other.name for other in dataclasses.fields(analysis.Report))
        (line,) = str(analysis.Report(**empty | {field.name: 0.5})).splitlines()
        labels.append(line.split("  ")[0])
        assert "0.5" in line, field.name
        assert line.endswith(field.metadata["unit"]), field.name
    assert len(set(labels)) == len(labels)


def test_every_field_of_the_report_is_explained_by_something_that_users_reach():
    explained = dict(re.findall(r"^ {2}(\w+): (.*)$", inspect.getdoc(analysis.Report), re.M))
    assert list(explained) == [field.name for field in dataclasses.fields(analysis.Report)]
    named = {name for text in explained.values() for name in re.findall(r"[Ss]ee `(\w+)`", text)}
    assert len(named) >= 5
    assert {name for name in named if not hasattr(analysis, name)} == set(), "export them from analysis/__init__.py"


def test_a_report_says_nothing_of_what_it_was_not_told(capsys):
    found = analysis.report(rules.nesterov(0.9))
    assert found.stability_limit is None
    assert found.contraction is None
    assert "stable" not in capsys.readouterr().out
    assert analysis.report(rules.nesterov(0.9), L=1.0).energy_limit is None
    assert analysis.report(rules.chebyshev(1.0, 0.1), step=3).order == 1


def test_a_report_leaves_out_what_would_take_too_long_to_count(capsys):
    found = analysis.report(rules.ema(1 - 1e-7), learning_rate=1e-3, L=10.0, mu=1e-6)
    assert found.memory is found.iterations is found.transient_growth is None
    assert 1 - found.contraction == pytest.approx(1e-9, rel=0.02)
    assert found.half_life == pytest.approx(math.log(2) * 1e7)
    assert "to 1e-6" not in capsys.readouterr().out


def test_counts_are_printed_in_full():
    empty = dict.fromkeys(field.name for field in dataclasses.fields(analysis.Report))
    assert str(analysis.Report(**empty | {"period": 12345})).split() == [
        "coefficients",
        "repeat",
        "after",
        "12345",
        "steps",
    ]


@pytest.mark.one_in(4)
@every_rule
def test_every_rule_has_a_report(rule, capsys):
    found = analysis.report(RULES[rule](), learning_rate=0.1, L=1.0, mu=0.5, step=9)
    assert found.order == RULES[rule]().at(9).pruned().order
    # At a meeting of Lookahead, and after the last step of OGM-G, nothing of the past is read.
    assert ("poles" in capsys.readouterr().out) == (found.order > 0)


SCHEDULED = rules.nesterov(mo.schedules.fista())


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.report(SCHEDULED), ValueError, "depends on the step"),
    (lambda: analysis.report(BALL, mu=0.1), ValueError, "L must be given where mu is, got mu=0.1 alone"),
    (lambda: analysis.report(BALL, L=1.0, mu=2.0), ValueError, r"mu must be in \(0, 1.0\], got 2.0"),
    (lambda: analysis.report(BALL, learning_rate=0.0), ValueError, r"learning_rate must be in \(0, inf\)"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
