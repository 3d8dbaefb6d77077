"""The bytes that compiled steps move, on compilers for accelerators that need not be here."""

import collections
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import compiled_bytes

ROOT = pathlib.Path(__file__).parents[2]
FILE = json.loads((ROOT / "benchmarks" / "compiled_bytes.json").read_text())
ROWS = FILE["rows"]
COMMITTED = {(row["row"], tuple(row["shape"])): row for row in ROWS}

# What is promised first; the fast tests count no more, since a row takes seconds.
FIRST = "^(optax.trace|heavy_ball, float32|nesterov, int8|heavy_ball, int4|aggregated, int8|adamw, mu in int8.*)$"

# All rows take many minutes of one compiler: in parts that several processes share, the names with most shapes first.
NAMES = [name for name, _ in collections.Counter(name for name, _ in COMMITTED).most_common()]
PARTS = [f"^({'|'.join(map(re.escape, NAMES[part::4]))})$" for part in range(4)]
IDS = ["first", *(f"part {part}" for part in range(1, 5))]
# The most bytes per parameter where it is more than for one compressed velocity.
MOST = {
    "aggregated, int8": {"tpu": 16.6, "h200": 16.6},
    "adamw, mu in int8": {"tpu": 22.5, "h200": 22.5},
    "adamw, mu in int8, nu in uint8": {"tpu": 16.5, "h200": 17.5},
}
# What is read more than once, as docs/storage.md says: on H200 a quarter of the gradients where rows have short axes;
# for TPU, in other versions of libtpu than that of the file, both fields of AdamW in bytes.
WIDE_WINDOWS = {("h200", (1024, 3, 16, 64)): 15.1}
BY_OTHER_COMPILERS = {"adamw, mu in int8, nu in uint8": 19.2}
# Of one velocity on gradients.
ONE_VELOCITY = tuple(f"{name}, " for name in compiled_bytes.RULES if name != "aggregated")


def most_of(name, shape, target):
    """The most bytes that a row may move: those of the file, where the compiler is that of the file."""
    if target == "tpu" and importlib.metadata.version("libtpu") != FILE["versions"]["libtpu"]:
        return BY_OTHER_COMPILERS.get(name, COMMITTED[name, shape][target]["bytes"])
    return COMMITTED[name, shape][target]["bytes"]


def counted(target, directory, rows=""):
    output = directory / f"{target}.json"
    # In a separate process: the compilers read the environment when they are loaded.
    options = ["--targets", target, "--rows", rows, "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.compiled_bytes", *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads(output.read_text())["rows"]
    if not rows or target not in rows[0]:
        pytest.skip(run.stdout.strip())
    return {(row["row"], tuple(row["shape"])): row[target] for row in rows}


def check_bytes(rows, target):
    """The bounds that the package promises, and that nothing has risen since the file was written."""
    for (name, shape), row in rows.items():
        limit = most_of(name, shape, target)
        assert row["bytes"] <= limit + 0.05, (name, shape)
        assert row["branch"] == 0, "one path for every step"
        if name.endswith(", float32") or name == "optax.trace":
            assert row["bytes"] == pytest.approx(COMMITTED[name, shape]["floor"], abs=0.01), name
        if ("int8" in name or "int4" in name) and name.startswith(ONE_VELOCITY):
            most = WIDE_WINDOWS.get((target, shape), 14.6) - (0 if "int8" in name else 1)
            assert row["bytes"] <= most, (name, shape)
            # Mostly scales, of which small rows have many.
            assert row["temporaries"] <= (0.2 if shape == (8192, 4096) else 0.5), (name, shape)
            # XLA may walk over a leaf of many axes in several parts.
            assert row["passes"] <= COMMITTED[name, shape][target]["passes"], (name, shape)
        if limit <= COMMITTED[name, shape][target]["bytes"]:
            assert row["bytes"] <= MOST.get(name, {}).get(target, math.inf), (name, shape)


def skip_older_compilers():
    if jax.__version_info__ < tuple(map(int, FILE["versions"]["jax"].split("."))):
        pytest.skip("older compilers fuse less, as docs/storage.md says")


@pytest.mark.parametrize("rows", [FIRST, *(pytest.param(rows, marks=pytest.mark.slow) for rows in PARTS)], ids=IDS)
def test_a_step_on_tpu_moves_no_more_than_it_did(rows, tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPU, is not made for this platform")
    skip_older_compilers()
    tpu = counted("tpu", tmp_path, rows)
    assert tpu.keys() == {row for row in COMMITTED if re.search(rows, row[0])}
    check_bytes(tpu, "tpu")


@pytest.mark.slow
@pytest.mark.parametrize("rows", PARTS, ids=IDS[1:])
def test_a_step_on_h200_moves_no_more_than_it_did(rows, tmp_path):
    skip_older_compilers()
    check_bytes(counted("h200", tmp_path, rows), "h200")


def test_the_first_rows_and_the_parts_hold_what_is_promised():
    names = {name for name, _ in COMMITTED}
    assert MOST.keys() <= {name for name in names if re.search(FIRST, name)}
    assert all(sum(bool(re.search(rows, name)) for rows in PARTS) == 1 for name in names)


@pytest.mark.parametrize("storage", compiled_bytes.WIDE_ENOUGH)
def test_an_average_that_is_written_rarely_moves_the_bytes_of_one_that_is_written_often(storage):
    often, rarely = (COMMITTED[f"sgd, average in {storage}, every={n}", (8192, 4096)] for n in (1, 100))
    for target in compiled_bytes.TARGETS:
        assert often[target]["bytes"] == pytest.approx(rarely[target]["bytes"], abs=0.01)


def test_the_committed_file_has_every_row_and_target():
    assert set(COMMITTED) == {(row.name, tuple(row.shape)) for row in compiled_bytes.rows()}
    assert all({"tpu", "h200", "cpu"} <= row.keys() for row in COMMITTED.values())


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_leaf_in_few_bits_is_three_kernels_on_h200_whatever_its_shape(storage):
    """The window's maximum, the pass, and what becomes of the small parts; one-dimensional leaves need no table."""
    program = """
from benchmarks import _moved_bytes, _programs
import sys, jax, jax.numpy as jnp, momentum_optax as mo
device = _moved_bytes.target("h200")
storage = sys.argv[1]
for shape in ((4096, 1024), (8192, 4096), (1024, 3, 16, 64)):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
    tx = mo.sgd(0.1, 0.9, storage=storage)
    one, three = (_programs.kernels_of(_moved_bytes.lowered(tx, shapes[:n], device).compile()) for n in (1, 3))
    print(one, three)
for n in (2**20, 65536, 1_000_003):
    print(_moved_bytes.count(_moved_bytes.compiled(mo.sgd(0.1, 0.9, storage=storage), (n,), device), n).bytes)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, storage], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode and "make_pjrt_topology" in run.stderr:
        pytest.skip("no compiler for an NVIDIA GPU here")
    *counts, even, short, odd = run.stdout.split("\n")[:-1]
    # The first leaf brings the counter of steps with it.
    assert counts == ["4 10"] * 3
    floor = 14 if storage == "int8" else 13
    assert float(even) <= floor + 0.2
    # The codes once more, for their maximum.
    assert max(float(short), float(odd)) <= floor + 1.2
