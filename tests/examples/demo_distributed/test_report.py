"""The words and the figure of the distributed demo."""

import re

import pytest

pytest.importorskip("matplotlib")

from examples.demo_distributed import report
from examples.demo_distributed.launcher import Result


def reported(round_, **changes):
    values = {"meetings": round_, "collectives": round_, "planned": 2e6, "compiled": 2e6 * round_, "measured": 2.5e6}
    found = {"accuracy": 0.5, "loss": 1.0, "averaged accuracy": 0.25, "averaged loss": 2.0}
    return {"round": round_, "seconds": 1.0, **found, **values, **changes}


def test_the_table_and_the_picture_show_what_was_reported(tmp_path):
    data_parallel = Result({1: reported(1), 2: reported(2, planned=8e6, accuracy=0.75)})
    changed = {"accuracy": 0.625, "averaged accuracy": 0.875, "averaged loss": 0.5}
    local_steps = Result({1: reported(1), 2: reported(2, measured=float("nan"), **changed)})
    text = report.table(data_parallel, local_steps)
    assert re.search(r"arrays' sizes +8\.000 +2\.000 +4\.0$", text, re.M)
    assert re.search(r"held-out accuracy +75\.0% +62\.5%", text)
    assert re.search(r"held-out accuracy, averaged +25\.0% +87\.5%", text)
    assert re.search(r"held-out cross-entropy, averaged +2\.0000 +0\.5000", text)
    assert "kernel" in text
    nobody = Result({1: reported(1, measured=float("nan"))})
    assert "kernel" not in report.table(nobody, nobody)
    report.plot(data_parallel, local_steps, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_came_of_the_kill_is_said(capsys):
    assert report.survived(1, [])
    assert "bit for bit" in capsys.readouterr().out
    assert not report.survived(1, ["worker-1.npz: ['w']"])
    assert re.search(r"FAILED: not what .*\n +worker-1.npz: \['w'\]", capsys.readouterr().out)
    assert not report.survived(0, [])
    assert "FAILED: the run was over before" in capsys.readouterr().out
