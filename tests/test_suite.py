"""The suite itself: without pytest-xdist and from any folder, its markers choose the rows that they say."""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

TESTS = pathlib.Path(__file__).parent

ROWS = """
import pytest

@pytest.mark.rare_storages("int8")
@pytest.mark.parametrize("rule", ["heavy_ball", "ema"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_storages(rule, storage): ...

@pytest.mark.xdist_group("together")
@pytest.mark.one_in(4)
@pytest.mark.parametrize("row", range(400))
def test_table(row): ...
"""


def collected(*arguments, cwd):
    """The names that pytest collects, in a separate process without pytest-xdist."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    env = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    run = subprocess.run([*command, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return [line.split("::")[-1] for line in run.stdout.splitlines() if "::" in line]


@pytest.fixture
def small(tmp_path):
    """A folder with the suite's configuration, and tests of which nothing but the markers matters."""
    for name, text in (
        ("pyproject.toml", (TESTS.parent / "pyproject.toml").read_text()),
        ("tests/conftest.py", (TESTS / "conftest.py").read_text()),
        ("tests/test_rows.py", textwrap.dedent(ROWS)),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_markers_leave_the_rows_that_they_say_to_the_slow_tests(small, tmp_path_factory):
    fast = collected("-m", "not slow", cwd=small)
    slow = collected("-m", "slow", str(small), cwd=tmp_path_factory.mktemp("elsewhere"))
    table = [f"test_table[{row}]" for row in range(400)]
    assert [name for name in fast if "storages" in name] == [
        f"test_storages[{storage}-{rule}]"
        for storage, rule in (
            ("float32", "heavy_ball"),
            ("float32", "ema"),
            ("bfloat16", "heavy_ball"),
            ("int8", "heavy_ball"),
            ("int4", "heavy_ball"),
        )
    ]
    assert sorted(name for name in fast + slow if "table" in name) == sorted(table), "the same rows each time"
    # A hundred are expected of a fair draw; five standard deviations.
    assert abs(sum("table" in name for name in fast) - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5
    assert len(fast) + len(slow) == 8 + 400
