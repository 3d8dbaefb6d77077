"""The figure of the demo."""

import pytest

pytest.importorskip("matplotlib")

from examples.demo import figure
from examples.demo.cnn import History


def test_curves_of_runs_that_diverged_are_drawn_without_a_warning(tmp_path, made_up):
    lost = History([float("nan")] * 2, [0.1, 0.1], 1)
    figure.plot(lost, [made_up("a", (64.0, 64.0))], tmp_path / "lost.png")
    figure.plot(lost, [], tmp_path / "alone.png")
    assert (tmp_path / "lost.png").stat().st_size > (tmp_path / "alone.png").stat().st_size > 0


def test_the_figure_says_when_the_best_rule_is_where_the_first_one_ends(made_up):
    from matplotlib.figure import Figure

    first, best, middle = (made_up(rule, (1.0, 1.0)) for rule in ("sgd", "heavy_ball", "nesterov"))
    first.test[1] = [3.0, 2.0]
    best.test[1] = [[2.9, 0.5], [2.7, 0.7]]
    axes = Figure().add_subplot()
    figure._mark_lead([first, middle, best], axes)
    assert [text.get_text() for text in axes.texts] == ["heavy ball at epoch 2 of 2\nis where sgd ends"]
    ahead = Figure().add_subplot()
    figure._mark_lead([best, first], ahead)
    assert [*ahead.texts, *ahead.lines] == []
