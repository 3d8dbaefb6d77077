"""The comparison of storages: its codec does what it is there for, its figure shows what its file says."""

import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks.storage_quality import __main__ as quality
from benchmarks.storage_quality.figure import draw
from benchmarks.storage_quality.reference import Reference
from benchmarks.storage_quality.tasks import TASKS
from benchmarks.storage_quality.tracked import relative_errors


def encoded(storage, v, stamp):
    parts = storage.init(v, 1)
    return storage.encode((v,), parts, SimpleNamespace(stamp=stamp))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("shape", [(7, 600), (3, 4, 16, 40), (30,), ()])
def test_the_reference_scale_of_a_row_is_its_exact_maximum(shape):
    v = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    axes = {(7, 600): (1,), (3, 4, 16, 40): (2, 3), (30,): (0,), (): ()}[shape]
    (scale,) = encoded(Reference(), v, np.uint32(3)).scale
    np.testing.assert_array_equal(scale, abs(v).max(axes, keepdims=True))


def test_the_reference_rounding_has_no_bias():
    """z of each element's mean over 4000 stamps: of 1200 normal ones, some |z| is beyond 6 in two of a million sets."""
    stamps = 4000
    v = np.random.default_rng(1).standard_normal((2, 600)).astype(np.float32) ** 3
    storage = Reference()
    draw = jax.jit(jax.vmap(lambda stamp: storage.state_type.decode(encoded(storage, v, stamp))[0]))
    values = np.asarray(draw(jnp.arange(stamps, dtype=jnp.uint32)), np.float64)
    scale = abs(v.astype(np.float64)).max(1, keepdims=True)
    level = 127 * np.sqrt(abs(v) / scale)
    low = np.minimum(np.floor(level), 126)
    up = (level**2 - low**2) / (2 * low + 1)
    deviation = np.sqrt(up * (1 - up) / stamps) * (2 * low + 1) / 127**2 * scale
    # Of choices rarer than 40 draws in 4000 the mean is not normal.
    usual = up * (1 - up) > 0.01
    z = (values.mean(0) - v)[usual] / deviation[usual]
    assert len(z) > 1000
    assert abs(z).max() < 6
    assert 0.9 < z.std() < 1.1


def test_the_reference_keeps_zeros_and_signs():
    v = np.array([[0.0, 1e-20, -1e-20, 2.0, -3.0]], np.float32)
    storage = Reference()
    (value,) = storage.state_type.decode(encoded(storage, v, np.uint32(0)))
    np.testing.assert_array_equal(np.asarray(value)[:, [0, 4]], v[:, [0, 4]])
    assert np.all(np.asarray(value) * v >= 0)
    (silent,) = storage.state_type.decode(encoded(storage, np.zeros((1, 5), np.float32), np.uint32(0)))
    np.testing.assert_array_equal(silent, np.zeros((1, 5)))


def test_relative_errors_are_those_of_the_leaves_and_of_the_whole():
    stored = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0]), "silent": jnp.zeros(3)}
    exact = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([2.0]), "silent": jnp.zeros(3)}
    leaf, tree = relative_errors(stored, exact)
    np.testing.assert_allclose(leaf, (4 / 3 + 1 / 2 + 0) / 3, rtol=1e-6)
    np.testing.assert_allclose(tree, math.sqrt((16 + 1) / (9 + 4)), rtol=1e-6)


def test_the_figure_of_qualities_shows_what_seeds_differ_by_and_what_was_not_compressed(committed):
    pytest.importorskip("matplotlib")
    rows = committed("storage_quality")
    figure = draw(rows)
    columns = {axes.get_title().partition(":")[0]: axes.get_title() for axes in figure.axes if axes.get_title()}
    assert set(columns) == set(TASKS)
    assert "int8 and int4 by default: no leaf is large enough,\nnothing was compressed" in columns["autoencoder"]
    assert "nothing was compressed" not in columns["gru"] + columns["cnn"]
    assert len(figure.axes) == len(TASKS) * len(quality.DECAYS)
    for axes, (decay, task) in zip(figure.axes, itertools.product(quality.DECAYS, TASKS), strict=True):
        here = {row["storage"]: row["losses"] for row in rows if (row["task"], row["decay"]) == (task, decay)}
        names = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
        low, high = axes.get_ylim()
        bar = {
            names[round(np.mean(lines.get_segments()[0][:, 0]))]: lines.get_segments()[0][0, 1]
            for lines in axes.collections
        }
        for name in ("float32", "bfloat16", next(name for name in names if name.startswith("int8"))):
            assert bar[name] == pytest.approx(np.median(here[name]), rel=1e-6)
            # The seeds of float32 fill half of the panel, so that a difference of their size can be seen.
            assert low < min(here[name]) < max(here[name]) < high
        assert max(here["float32"]) - min(here["float32"]) > 0.2 * (high - low), (task, decay)
        far = {text.get_text() for text in axes.texts if text.get_text()}
        assert len(bar) + len(far) == len(names)


@pytest.mark.slow
def test_storage_quality_writes_every_row(tmp_path, run_quick, numbers):
    for package in ("flax", "matplotlib", "mlxtend"):
        pytest.importorskip(package)
    result, text = run_quick("storage_quality", "--plot", tmp_path / "losses.png")
    rows = {(row["task"], row["storage"]): row for row in result["rows"]}
    assert set(rows) == {(task, name) for task in TASKS for name in quality.storages(task)}
    assert len(text.splitlines()) == 1 + len(result["rows"])
    for (_, name), row in rows.items():
        assert len(row["losses"]) == 2
        assert np.all(np.isfinite(numbers([row[key] for key in ("losses", "leaf_errors", "tree_errors")])))
        assert name != "float32" or max(row["tree_errors"]) < 1e-5
    assert 0 < np.mean(rows["autoencoder", "reference"]["tree_errors"]) < 0.1
    assert (tmp_path / "losses.png").stat().st_size > 10_000
