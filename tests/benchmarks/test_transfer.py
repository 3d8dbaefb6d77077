"""The committed changes of transfers are those that the code computes now, and the program draws its figure."""

import pytest

from benchmarks import transfer


def test_the_committed_rows_are_those_of_the_code(committed):
    rows = committed("transfer")
    assert [(row["base"], row["keep"]) for row in rows] == transfer.CASES
    for row in rows:
        now = transfer.row(row["base"], row["keep"])
        for name in ("decay", "learning_rate", "variance", "contraction", "lag"):
            assert now[name] == pytest.approx(row[name], rel=1e-6, abs=1e-8), (row["base"], row["keep"], name)
        assert (now["invariant"], now["source"]) == (row["invariant"], row["source"])


@pytest.mark.slow
def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    transfer.plot(tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
