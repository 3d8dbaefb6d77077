"""The script for accelerators, which runs on CPU too."""

import itertools
import json
import sys

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


def test_a_run_that_ends_early_keeps_its_rows(monkeypatch, tmp_path):
    def rows(*_):
        yield {"tree": "one leaf", "optimizer": "optax.sgd"}
        yield "one leaf, another: OSError"
        raise KeyboardInterrupt

    monkeypatch.setattr(accelerator, "measure", rows)
    monkeypatch.setattr(accelerator, "numbers", lambda storage: {"storage": storage})
    monkeypatch.setattr(accelerator, "copy_speed", lambda side, pairs: 1e9)
    output = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["accelerator", "--quick", "--output", str(output)])
    with pytest.raises(KeyboardInterrupt):
        accelerator.main()
    result = json.loads(output.read_text())
    assert result["rows"] == [{"tree": "one leaf", "optimizer": "optax.sgd"}]
    assert result["left_out"] == ["one leaf, another: OSError"]


def test_what_another_library_cannot_time_is_left_out_by_name(monkeypatch):
    def fail(steps):
        raise MemoryError

    baseline = accelerator.BASELINE
    monkeypatch.setattr(accelerator, "optimizers", lambda: {baseline: None})
    monkeypatch.setattr(accelerator, "others", lambda: {"another": None})
    subjects = {baseline: lambda steps: 1.0, "another": fail}
    made = {name: accelerator.Subject(timer, 0, 0, None) for name, timer in subjects.items()}
    monkeypatch.setattr(accelerator, "jax_subject", lambda tx, gradients: made[baseline])
    monkeypatch.setattr(accelerator, "torch_subject", lambda gradients, make: made["another"])
    monkeypatch.setattr(accelerator, "summary", lambda *_: {})
    found = list(accelerator.measure(quick=True, pairs=1, copy=1.0, seconds=60))
    assert found[1::2] == ["one leaf, another: MemoryError", "GPT-2 small, another: MemoryError"]
    assert [row["optimizer"] for row in found[::2]] == [baseline, baseline]


def test_a_difference_from_the_cpu_shows(monkeypatch):
    runs = iter([np.ones((4, 4)), np.full((4, 4), 1.5)])
    monkeypatch.setattr(accelerator.mo, "velocity", lambda state: (next(runs),))
    monkeypatch.setattr(accelerator, "STEPS", 0)
    assert accelerator.numbers("float32") == {"storage": "float32", "difference": pytest.approx(1 / 3), "equal": 0}
