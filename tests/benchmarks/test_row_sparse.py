"""The timing of row-sparse steps."""

import itertools

import pytest


@pytest.mark.slow
def test_row_sparse_writes_every_share_and_way(run_quick):
    pytest.importorskip("tqdm")
    result, text = run_quick("row_sparse")
    ways = ["dense again", "rows", "BCOO", "dense gradient, mask"]
    assert [(row["share"], row["way"]) for row in result["rows"]] == list(itertools.product((0.01, 1.0), ways))
    assert len(text.splitlines()) == 1 + len(result["rows"])
    assert min(row["quartiles"][0] for row in result["rows"]) > 0
