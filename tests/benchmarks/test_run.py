"""The frame of the benchmarks: what it records beside the results."""

import dataclasses
import json
import os
import pathlib
import platform
import re
import shlex

import jax
import optax
import pytest

pytest.importorskip("tyro")

import momentum_optax as mo
from benchmarks import _run

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"


def test_a_run_records_its_command_versions_and_device(tmp_path, monkeypatch):
    output = tmp_path / "a b.json"
    monkeypatch.setattr("sys.argv", ["/anywhere/name.py", "--output", str(output)])
    run = _run.Run("name", "What it measures.", _run.Options)
    run.write({"rows": [1.5, None]}, versions={"libtpu": "9"})
    document = json.loads(output.read_text())
    assert document.pop("command") == f"python -m benchmarks.name --output {shlex.quote(str(output))}"
    versions = document.pop("versions")
    assert (versions["python"], versions["libtpu"]) == (platform.python_version(), "9")
    assert (versions["jax"], versions["optax"]) == (jax.__version__, optax.__version__)
    assert versions["momentum_optax"] == mo.__version__
    assert document == {"device": "cpu", "cpu_cores": os.cpu_count(), "rows": [1.5, None]}


def test_without_an_option_the_committed_file_is_written(monkeypatch):
    monkeypatch.setattr("sys.argv", ["name.py"])
    assert _run.Run("race", "", _run.Options).path == FOLDER / "race.json"


def test_a_wrong_option_ends_the_program_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["name.py", "--output", "no/such/folder/x.json"])
    assert "Error parsing --output: must be a file in a directory" in refused(
        capsys, _run.Run, "name", "", _run.Options
    )


def refused(capsys, function, *arguments):
    """The message with which a program ends, on one line."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


@dataclasses.dataclass(frozen=True)
class Quick(_run.Options):
    """Options with a small setting."""

    quick: bool = False


def test_small_settings_never_overwrite_the_committed_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["name.py", "--quick"])
    assert "Error parsing --output: must be given with --quick" in refused(capsys, _run.Run, "race", "", Quick)
    monkeypatch.setattr("sys.argv", ["name.py", "--quick", "--output", str(tmp_path / "x.json")])
    assert _run.Run("race", "", Quick).path == tmp_path / "x.json"


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"settings": 1}'])
def test_a_file_of_something_else_is_refused_by_name(text, capsys, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    assert f"Error parsing --output: {path} must be a file of this benchmark" in refused(
        capsys, _run.rows_before, path, {}
    )


def test_rows_are_taken_up_again_if_the_settings_are_the_same(capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert _run.rows_before(path, {"seeds": 2}) == []
    path.write_text(json.dumps({"settings": {"seeds": 2}, "rows": [{"a": 1}]}))
    assert _run.rows_before(path, {"seeds": 2}) == [{"a": 1}]
    assert "has results of other settings" in refused(capsys, _run.rows_before, path, {"seeds": 3})


def test_a_table_has_texts_on_the_left_and_numbers_on_the_right():
    rows = [{"name": "a", "x": 1.5}, {"name": "longer", "x": -10.25}]
    assert _run.table({"name": "{name}", "value": "{x:.1f}", "wide column": "{x!s}"}, rows).splitlines() == [
        "name    value  wide column",
        "a         1.5          1.5",
        "longer  -10.2       -10.25",
    ]


def programs():
    """The names of the benchmarks."""
    files = [path for path in FOLDER.glob("*.py") if not path.name.startswith("_")]
    return sorted([path.stem for path in files] + [path.parent.name for path in FOLDER.glob("*/__main__.py")])


def test_every_program_says_its_command_and_is_run_by_make():
    makefile = (ROOT / "Makefile").read_text()
    assert len(programs()) >= 12
    for name in programs():
        path = FOLDER / f"{name}.py" if (FOLDER / f"{name}.py").exists() else FOLDER / name / "__main__.py"
        assert f"    python -m benchmarks.{name}" in path.read_text().split('"""')[1]
        # The plan measures nothing: its tables are part of a page.
        assert (name == "paper_plan") or f"-m benchmarks.{name}" in makefile


def test_every_committed_file_is_that_of_a_program():
    for path in FOLDER.glob("*.json"):
        command = json.loads(path.read_text()).get("command", f"python -m benchmarks.{path.stem}")
        name = re.match(r"python -m benchmarks\.(\w+)", command)[1]
        assert name in programs()
        assert path.stem.startswith(name)
