"""The timing of steps."""

import importlib.util
import itertools
import math

import jax
import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from conformance import STORAGES

from benchmarks import step_time


def test_the_transformer_has_the_stated_number_of_parameters():
    shapes = jax.tree.leaves(step_time.trees(quick=False)["transformer"], is_leaf=lambda x: isinstance(x, tuple))
    assert round(sum(map(math.prod, shapes)) / 1e6, 1) == 28.3


def test_every_storage_is_timed():
    assert set(step_time.STORAGES) == set(STORAGES)


@pytest.mark.slow
def test_step_time_writes_every_row(run_quick, numbers):
    result, _ = run_quick("step_time")
    names = list(step_time.optimizers()) + ([step_time.TORCH] if importlib.util.find_spec("torch") else [])
    found = [(row["tree"], row["optimizer"]) for row in result["rows"]]
    assert found == list(itertools.product(step_time.trees(quick=True), names))
    for row in result["rows"]:
        values = numbers({key: value for key, value in row.items() if key not in ("tree", "optimizer")})
        assert np.all(np.isfinite(values))
        assert min(row["ratio_quartiles"]) > 0
