"""The race of the demo with tiny settings: every rule has its rates, the best on validation images is reported."""

import numpy as np
import pytest

from examples.demo import race
from examples.demo.rules import RULES

# In one process, where they share what is trained.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.mark.slow
def test_every_rule_races_with_as_many_rates_of_its_own(results):
    assert [result.rule for result in results] == ["sgd", "nesterov", "aggregated"]
    for result in results:
        np.testing.assert_allclose(result.rates * RULES[result.rule].dc_gain(), (np.inf, 0.25, 0.5), rtol=1e-6)
        assert result.validation.shape == (3, 2)
        assert result.test.shape == (3, 2, 2)
        assert np.unique(result.validation[1:]).size == 4


@pytest.mark.slow
def test_errors_are_finite_and_a_run_that_diverges_gets_the_worst_and_is_not_chosen(results):
    for result in results:
        assert (result.validation[0] == 64).all()
        assert result.choice in (1, 2)
        # The error of the mean image is about 4.7.
        assert (result.validation[1:] < 6).all()
        assert (result.curves < 6).all()


@pytest.mark.slow
def test_the_table_reports_the_rate_of_least_mean_validation_error(results):
    lines = race.table(results).splitlines()
    for result, line in zip(results, lines[1:], strict=False):
        means = [(a + b) / 2 for a, b in result.validation]
        best = means.index(min(means))
        _, rate, _, median, *_ = line.split()
        assert rate == f"{float(result.rates[best]):.4g}"
        assert median == f"{np.median(result.test[best, :, -1]):.3f}"


def test_the_table_says_which_ranges_overlap_and_which_rates_lie_at_an_edge(made_up):
    text = race.table([made_up("a", (1.0, 2.0)), made_up("b", (1.9, 3.0)), made_up("c", (2.1, 9.0), choice=2)])
    assert "Least median: a." in text
    assert "below all seeds of: c." in text
    assert "overlaps that of: b;" in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("*")] == ["c"]
