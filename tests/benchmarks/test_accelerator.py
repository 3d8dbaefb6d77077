"""The script for accelerators, which runs on CPU too."""

import itertools

import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import accelerator


@pytest.mark.slow
def test_every_row_is_timed_and_compared_with_the_cpu(run_quick, numbers):
    result, printed = run_quick("accelerator")
    names = [*accelerator.optimizers(), *accelerator.others()]
    found = [(row["tree"], row["optimizer"]) for row in result["rows"]]
    assert found == list(itertools.product(accelerator.trees(quick=True), names))
    for row in result["rows"]:
        assert min(numbers({k: x for k, x in row.items() if k in ("milliseconds", "ratio", "share_of_copy")})) > 0
        if row["optimizer"] in accelerator.optimizers():
            assert row["kernels"] >= row["leaves"]
    assert result["device"] == "cpu"
    assert result["left_out"] == []
    # Here the other device is the same one.
    assert [(check["difference"], check["equal"]) for check in result["against_cpu"]] == [(0, 1)] * 4
    assert "off by 0.0e+00 from the CPU, 100.00% equal" in printed


@pytest.mark.slow
def test_what_has_not_begun_in_time_is_left_out_by_name(run_quick):
    result, _ = run_quick("accelerator", "--seconds", 0)
    assert result["rows"] == []
    assert len(result["left_out"]) == 2 * len([*accelerator.optimizers(), *accelerator.others()])


def test_a_difference_from_the_cpu_shows(monkeypatch):
    runs = iter([np.ones((4, 4)), np.full((4, 4), 1.5)])
    monkeypatch.setattr(accelerator.mo, "velocity", lambda state: (next(runs),))
    monkeypatch.setattr(accelerator, "STEPS", 0)
    assert accelerator.numbers("float32") == {"storage": "float32", "difference": pytest.approx(1 / 3), "equal": 0}
