"""The comparison of YellowFin."""

import numpy as np
import pytest


@pytest.mark.slow
def test_yellowfin_writes_every_row(run_quick, numbers):
    pytest.importorskip("sklearn")
    rows = run_quick("yellowfin")[0]["rows"]
    assert [row["task"] for row in rows[::6]] == ["quadratic, kappa 10, L 1", "autoencoder", "classifier"]
    assert len(rows) == 18
    assert np.all(np.isfinite(numbers([row["setting"] for row in rows])))
    # The best heavy ball on a grid of rates and decays, by another loop.
    best = rows[3]
    x, v, steps = np.ones(20), 0.0, 0
    while np.linalg.norm(x) > 1e-3 * np.sqrt(20):
        v = best["setting"][1] * v + np.geomspace(0.1, 1, 20) * x
        x, steps = x - best["setting"][0] * v, steps + 1
    assert best["steps"] == steps
