"""The committed results of benchmarks, and runs of benchmarks with small settings."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def committed():
    """A function from the name of a benchmark to the rows in its committed file."""
    return lambda name: json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["rows"]


@pytest.fixture
def run_quick(tmp_path):
    """A function that runs a benchmark with its small settings; its JSON document and what it printed."""

    def run(name, *options):
        output = tmp_path / "rows.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--output", str(output), *map(str, options)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(output.read_text()), done.stdout

    return run


@pytest.fixture(scope="session")
def numbers():
    """A function to all numbers in what JSON holds; None, which stands for a number that is not finite, fails."""
    return lambda tree: np.array(jax.tree.leaves(jax.tree.map(float, tree, is_leaf=lambda x: x is None)))
