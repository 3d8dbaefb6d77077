"""The race with its curves."""

import numpy as np
import pytest


@pytest.mark.slow
def test_race_writes_every_rule(tmp_path, run_quick):
    for package in ("matplotlib", "sklearn", "tqdm", "tyro"):
        pytest.importorskip(package)
    result, text = run_quick("race", "--plot", tmp_path / "race.png")
    assert [np.shape(row["errors"]) for row in result["rows"]] == [(2, 2)] * 5
    for row in result["rows"]:
        assert f"{np.median(np.array(row['errors'])[:, -1]):.3f} (" in text
    assert (tmp_path / "race.png").stat().st_size > 10_000
