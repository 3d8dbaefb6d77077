"""The benchmark of outer methods: every way that it can measure is among the committed results."""

import json
import pathlib

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import outer_quality

ROWS = json.loads((pathlib.Path(outer_quality.__file__).parent / "outer_quality.json").read_text())["rows"]


def test_every_way_is_measured():
    found = {row["way"] for row in ROWS}
    assert found == outer_quality.ways().keys()
    assert {"DiLoCo", "MuLoCo", "MuLoCo, int8 exchange", "every step, Muon"} <= found


def test_the_table_has_a_line_for_each_row():
    lines = outer_quality.table(ROWS).splitlines()
    assert len(lines) == len(ROWS) + 1
    assert lines[1].split()[-1] == "1.000"
