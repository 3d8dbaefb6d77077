"""The command line of the demo: it prints and draws what it trained, and refuses wrong options."""

import importlib.util
import re
import sys

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from examples import command_line
from examples.demo import __main__ as demo
from examples.demo.data import PACKAGES
from examples.demo.race import table
from examples.demo.rules import RULES

# In one process, where they share what is trained.
pytestmark = pytest.mark.xdist_group("demo")


def test_main_writes_a_png_and_prints_what_it_did(tmp_path, capsys, monkeypatch, results):
    monkeypatch.setattr(demo, "race", lambda **sizes: results)
    path = tmp_path / "curves.png"
    backend = sys.modules.get("matplotlib.pyplot")
    assert demo.main(["--data", "digits", "--epochs", "1", "--rule", "sgd", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "13,706 parameters" in printed
    assert table(results) in printed
    assert str(path) in printed
    assert sys.modules.get("matplotlib.pyplot") is backend


@pytest.mark.parametrize("package", sorted({*PACKAGES["mnist"]} - {"tyro"}))
def test_a_missing_package_is_one_line_that_says_what_to_install(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what Python makes of a package that cannot be imported
    assert demo.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert package in err
    assert "pip install 'momentum-optax[demo]'" in err


def test_a_missing_library_for_command_lines_is_one_line_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    spec = importlib.util.spec_from_file_location("fresh", command_line.__file__)
    with pytest.raises(SystemExit, match=r"The demo needs tyro: pip install 'momentum-optax\[demo\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
def test_the_default_run_shows_what_the_readme_says(tmp_path, capsys):
    pytest.importorskip("mlxtend")
    output = tmp_path / "demo.png"
    assert demo.main(["--output", str(output)]) == 0
    printed = capsys.readouterr().out
    accuracy = [float(x) for x in re.findall(r"accuracy ([\d.]+)%", printed)]
    assert len(accuracy) == 8
    assert accuracy[-1] > 96
    rows = re.findall(r"^  (\w+) +[\d.]+ +[\d.]+ +([\d.]+) \(([\d.]+) to ([\d.]+)\)", printed, re.M)
    errors = {rule: [float(x) for x in numbers] for rule, *numbers in rows}
    assert set(errors) == set(RULES)
    assert errors["nesterov"][2] < errors["sgd"][1], "every seed of Nesterov ends below every seed of SGD"
    assert output.read_bytes()[:4] == b"\x89PNG"
