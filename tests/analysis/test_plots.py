"""The plot: its lines are the numbers of the analysis."""

import numpy as np
import pytest
from conformance import RULES

from momentum_optax import analysis, rules


def test_the_plot_has_four_panels_of_the_analysis_numbers():
    pytest.importorskip("matplotlib")
    rule = rules.nesterov(0.9)
    figure = analysis.plot(rule, learning_rate=0.3, L=2.0, mu=0.02, steps=50)
    impulse, passed, rate, run_axes = figure.axes
    np.testing.assert_allclose(
        impulse.lines[0].get_ydata(), analysis.impulse_response(rule, len(impulse.lines[0].get_ydata()))
    )
    x, y = passed.lines[0].get_data()
    np.testing.assert_allclose(y, abs(analysis.frequency_response(rule, x)))
    x, y = rate.lines[0].get_data()
    np.testing.assert_allclose(y, analysis.spectral_radius(rule, 0.3, x))
    assert rate.lines[1].get_xdata()[0] == pytest.approx(analysis.stability_limit(rule, 1.0) / 0.3)
    for line, curvature in zip(run_axes.lines, (0.02, 0.2, 2.0), strict=True):
        np.testing.assert_allclose(line.get_ydata(), abs(analysis.error_curve(rule, 0.3, curvature, 50)), rtol=1e-9)
    assert all(axes.get_title() and axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rule", ["chebyshev", "grokfast_average"])
def test_scheduled_rules_and_those_of_many_velocities_have_a_plot(rule, tmp_path):
    pytest.importorskip("matplotlib")
    figure = analysis.plot(RULES[rule](), learning_rate=0.1, L=1.0, mu=0.1)
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert notes == (["depends on the step"] * 2 if rule == "chebyshev" else [])
    figure.savefig(tmp_path / "rule.png", dpi=40)
    assert (tmp_path / "rule.png").stat().st_size > 5000


def test_a_memory_too_long_to_count_is_drawn_as_far_as_the_run():
    pytest.importorskip("matplotlib")
    figure = analysis.plot(rules.ema(1 - 1e-8), learning_rate=0.1, L=1.0, mu=0.1)
    assert len(figure.axes[0].lines[0].get_xdata()) == 2000


def test_several_rules_are_drawn_over_each_other_each_with_its_rate():
    pytest.importorskip("matplotlib")
    known = {"ball": rules.heavy_ball(0.9), "Nesterov": rules.nesterov(0.8), "Lookahead": rules.lookahead(5, 0.5)}
    rates = {"ball": 0.1, "Nesterov": 0.3, "Lookahead": 0.5}
    figure = analysis.plot(known, learning_rate=rates, L=2.0, mu=0.02, steps=50)
    impulse, passed, rate, run_axes = figure.axes
    for one, line in zip(known, impulse.lines, strict=True):
        assert line.get_label() == one
        np.testing.assert_allclose(line.get_ydata(), analysis.impulse_response(known[one], len(line.get_xdata())))
    for one, line in zip(known, rate.lines, strict=False):
        x, y = line.get_data()
        np.testing.assert_allclose(y, analysis.spectral_radius(known[one], rates[one], x))
    for one, line in zip(known, run_axes.lines, strict=True):
        errors = abs(analysis.error_curve(known[one], rates[one], np.array([0.02, 0.2, 2.0]), 50))
        np.testing.assert_allclose(line.get_ydata(), errors.max(1), rtol=1e-9)
    assert len(passed.lines) == 2
    assert len({line.get_color() for line in run_axes.lines}) == 3
    notes = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert notes == ["Lookahead depends on the step"], "it has a contraction, but no frequency response"


BALL = rules.heavy_ball(0.9)


ERRORS = [
    (lambda: analysis.plot({}, learning_rate=0.1, L=1.0, mu=0.1), ValueError, "mapping of up to 6, got 0"),
    (
        lambda: analysis.plot(dict.fromkeys("abcdefg", BALL), learning_rate=0.1, L=1.0, mu=0.1),
        ValueError,
        "mapping of up to 6, got 7",
    ),
    (
        lambda: analysis.plot({"a": BALL}, learning_rate={"b": 0.1}, L=1.0, mu=0.1),
        ValueError,
        r"names of the rules, \['a'\], got \['b'\]",
    ),
    (
        lambda: analysis.plot({"a": BALL}, learning_rate={"a": 0.0}, L=1.0, mu=0.1),
        ValueError,
        r"learning_rate\['a'\] must be in \(0, inf\), got 0.0",
    ),
    (lambda: analysis.plot({"a": 0.9}, learning_rate=0.1, L=1.0, mu=0.1), TypeError, "rule must be a Filter"),
    (lambda: analysis.plot(BALL, learning_rate=0.1, L=1.0, mu=2.0), ValueError, r"mu must be in \(0, 1.0\]"),
    (lambda: analysis.plot(BALL, learning_rate=0.1, L=1.0, mu=0.1, steps=0), ValueError, "steps must be at least 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
