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
