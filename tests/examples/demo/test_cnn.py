"""The CNN of the demo with tiny settings: it learns, the same seed gives the same numbers, telemetry is recorded."""

import jax
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from flax import nnx

import momentum_optax as mo
from examples.demo import cnn
from examples.demo.data import load_digits
from examples.demo.rules import RULES

# In one process, where they share what is trained.
pytestmark = pytest.mark.xdist_group("demo")


def train_on_digits(seed=0):
    return cnn.train_cnn(load_digits(0), RULES["nesterov"], 0.025, epochs=3, batch_size=32, seed=seed)


@pytest.fixture(scope="module")
def history():
    return train_on_digits()


# Measured for four seeds: 0.866 to 0.897 in the demo, 0.404 to 0.643 with the velocity ignored.
@pytest.mark.slow
def test_the_cnn_learns_the_digits_in_three_epochs(history):
    assert history.accuracy[-1] > 0.82


@pytest.mark.slow
def test_the_cnn_falls_short_of_that_when_the_velocity_is_ignored(monkeypatch):
    scale_by_momentum = mo.scale_by_momentum
    monkeypatch.setattr(mo, "scale_by_momentum", lambda rule: scale_by_momentum(RULES["sgd"]))
    assert train_on_digits().accuracy[-1] < 0.72


@pytest.mark.slow
def test_the_same_seed_gives_the_identical_history(history):
    assert train_on_digits() == history


@pytest.mark.slow
def test_another_seed_gives_another_history(history):
    assert train_on_digits(seed=1).loss[0] != history.loss[0]


def test_every_tenth_step_is_measured_and_shown(history):
    # 1437 images in batches of 32, three times.
    assert [round(44 * figures["epoch"]) for figures in history.telemetry] == list(range(1, 133, 10))
    assert all(-1 <= figures["cosine"] <= 1 for figures in history.telemetry)
    first, last = history.telemetry[0], history.telemetry[-1]
    # Warming up from nothing, and the last of a cosine's fall.
    assert first["effective_learning_rate"] == first["cosine"] == 0
    assert 0 < last["effective_learning_rate"] < 1e-3
    assert cnn.in_short(
        last
    ) == "rate {effective_learning_rate:.2g}, |v| {velocity_norm:.2g}, cos {cosine:+.2f}".format(**last)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("side", "count"), [(28, 105_866), (8, 13_706)])
def test_the_cnn_has_the_stated_number_of_parameters(side, count):
    model = cnn.build_cnn(side, seed=0)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert f"{count:,}" in cnn.build_cnn.__doc__
