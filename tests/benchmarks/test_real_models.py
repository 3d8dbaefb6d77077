"""Costs of optimizers on the trees of real models."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import _moved_bytes, real_models

ROOT = pathlib.Path(__file__).parents[2]
# Leaves and parameters, as published: Radford et al., 2019; He et al., 2015; Zhang et al., 2024.
SIZES = {
    "GPT-2 small": (148, 124_439_808),
    "ResNet-50": (161, 25_557_032),
    "1B, scanned": (12, 1_100_048_384),
    "300 leaves": (300, 300 * 4096),
    "1000 leaves": (1000, 1000 * 4096),
}


@pytest.mark.parametrize("tree", real_models.TREES)
def test_the_trees_have_the_published_sizes(tree):
    shapes = real_models.shapes_of(real_models.trees(quick=False)[tree])
    assert tuple(real_models.size_of(shapes).values()) == SIZES[tree]


def test_leaves_of_64_by_64_are_compressed():
    shapes = real_models.shapes_of(real_models.trees(quick=True)["300 leaves"])
    for name, codes in (("int8", "int8"), ("int4", "int4")):
        state = jax.eval_shape(real_models.optimizers(small_leaves=True)[name].init, shapes)
        assert [x.dtype.name for x in jax.tree.leaves(state) if x.shape == (64, 64)] == [codes] * 3


@pytest.mark.parametrize(
    ("optimizer", "most"),
    [("optax.sgd", 12), ("bfloat16", 84), ("int8", 325), ("int4", 325), ("adamw, int8 and uint8", 650)],
)
def test_the_step_of_a_leaf_has_few_operations(optimizer, most):
    """Which is what compiling many leaves costs. As JAX hands them to XLA, the same in versions 0.7.2 to 0.12.0."""
    params = {"leaf": jax.ShapeDtypeStruct((768, 768), jnp.float32)}
    tx = real_models.optimizers(small_leaves=False)[optimizer]
    text = _moved_bytes.lowered(tx, params, jax.devices("cpu")[0]).as_text("hlo")
    assert len(re.findall(r"^ +(?:ROOT )?\S+ = ", text, re.MULTILINE)) <= most


def test_the_table_of_the_documentation_is_that_of_the_committed_results_once_there_are_any(committed):
    lines = []
    if (ROOT / "benchmarks" / "real_models.json").exists():
        lines = real_models.markdown(committed("real_models"))
    text = (ROOT / "docs" / "storage.md").read_text()
    assert [line for line in lines if f"{line}\n" not in text] == [], "benchmarks.real_models prints these rows"


@pytest.mark.slow
def test_every_tree_and_optimizer_has_a_row(run_quick, numbers):
    result, printed = run_quick("real_models")
    rows = {(row["tree"], row["optimizer"]): row for row in result["rows"]}
    assert list(rows) == list(itertools.product(real_models.TREES, real_models.OPTIMIZERS))
    for (_, name), row in rows.items():
        values = {key: x for key, x in row.items() if key not in ("target", "tree", "optimizer")}
        assert len(numbers(values)) == 14
        assert min(row["trace_seconds"], row["compile_seconds"], row["init_seconds"]) > 0
        assert row["kernels"] >= row["leaves"] > 0
        if name == real_models.baseline_of(name):
            assert row["trace_ratio"] == row["compile_ratio"] == row["kernels_ratio"] == 1
            assert row["state_bytes"] == pytest.approx(4 if name == "optax.sgd" else 8, abs=1e-3)
    small = [rows["300 leaves", name] for name in ("float32", "bfloat16", "int8", "int4")]
    assert [round(row["state_bytes"]) for row in small] == [4, 2, 1, 1]
    # The compiled program of Optax, leaf by leaf.
    assert rows["300 leaves", "float32"]["kernels_ratio"] == 1
    assert all(line in printed for line in real_models.markdown(result["rows"]))
