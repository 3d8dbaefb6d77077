"""The transfer on a language model: settings are those of the rules, the page is what the file says."""

import json
import pathlib

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

import momentum_optax as mo
from benchmarks import _language, _page
from benchmarks import transfer_lm as bench
from benchmarks._paired import difference
from examples.lm import data

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "transfer_lm.json"


@pytest.mark.parametrize(
    ("name", "keep", "rate", "decay", "second"),
    [
        ("AdamW", "trajectory", 2, 0.95**4, 0.99**4),
        ("AdamW", "square_root_rate", 2, 1 - 4 * 0.05, 1 - 4 * 0.01),
        ("AdamW", "half_life_tokens", 1, 0.95**4, 0.99**4),
        ("SGD", "trajectory", 4, 0.9**4, 0),
        ("SGD", "linear_rate", 4, 0.9, 0),
        ("Lion", "bound", 4, 1 - 4 * 0.02, 0),
        ("Lion", "bound_fixed_decay", 2, 0.98, 0),
    ],
)
def test_a_batch_four_times_as_large_has_the_settings_of_the_rule(name, keep, rate, decay, second):
    base = bench.BASES[name]
    new = bench.moved(base, base.old, keep, 4)
    assert new.rate == pytest.approx(rate * base.old.rate)
    assert new.decay == pytest.approx(decay)
    assert new.second == pytest.approx(second)
    # The weights that decay leaves behind after as many examples.
    assert 1 - new.rate * new.weight_decay == pytest.approx((1 - base.old.rate * base.old.weight_decay) ** 4)


def test_the_grid_has_both_decays_and_the_weight_decay_of_the_rules():
    base = bench.BASES["Lion"]
    old = base.old._replace(rate=1e-3)
    tried = bench.grid(base, old, 16)
    rates = np.array([one.rate for one in tried]).reshape(2, 6)
    np.testing.assert_allclose(rates, [1e-3 * 2.0 ** np.arange(-1, 5)] * 2)
    np.testing.assert_allclose([one.decay for one in tried], [0.98] * 6 + [0.98**16] * 6)
    np.testing.assert_allclose([1 - one.rate * one.weight_decay for one in tried], 0.999**16)
    assert all(one == base.old._replace(rate=one.rate) for one in bench.grid(base, base.old, 1))


def test_the_numbers_of_a_run_are_those_of_its_rule():
    old = bench.BASES["SGD"].old
    given = {name: x[0] for name, x in bench.numbers([old]).items()}
    again = mo.Filter(*(float(given[name]) for name in "ABCD"))
    np.testing.assert_allclose(again.impulse_response(5), old.rule.impulse_response(5), rtol=1e-6)
    np.testing.assert_allclose([given[name] for name in ("rate", "weight_decay", "second")], [0.1, 0, 0], rtol=1e-6)


def test_a_larger_batch_has_the_same_windows_in_the_same_order():
    tokens = np.arange(2 * 8 * 3 * 5).reshape(2, 8, 3, 5)
    larger = bench.merged(_language.Problem({}, tokens), 4).batches
    assert larger.shape == (2, 2, 12, 5)
    np.testing.assert_array_equal(larger.reshape(2, -1, 5), tokens.reshape(2, -1, 5))


class Recorder:
    """A trainer that trains nothing: of many settings the fifth is the best on validation text, the last on test."""

    def __init__(self, seen):
        self.seen = seen

    def curves(self, given, problem, windows):
        texts = data.splits()
        on_validation = np.array_equal(windows, _language.held_out(bench.TOY, texts.validation))
        assert on_validation or np.array_equal(windows, _language.held_out(bench.TOY, texts.test))
        count = len(given["rate"])
        self.seen.append((on_validation, problem.batches, given))
        return abs(np.arange(count) - (4 if on_validation else count))[:, None] + 1.0


def test_what_is_tuned_is_chosen_on_validation_text_with_another_seed(monkeypatch):
    def numbered(setting, seeds):
        return _language.Problem({}, np.reshape(seeds, (-1, 1, 1, 1)) * np.ones((1, setting.steps, 1, 1)))

    seen = []
    monkeypatch.setattr(bench, "problems", numbered)
    monkeypatch.setattr(bench, "trainer_of", lambda base, setting: Recorder(seen))
    base = bench.BASES["Lion"]
    rows = bench.measure("Lion", 4, bench.TOY, 3, base.old)
    assert [row["way"] for row in rows] == [bench.TUNED, *base.keeps]
    assert rows[0]["learning_rate"] == pytest.approx(8 * base.old.rate)
    assert rows[0]["decay"] == pytest.approx(0.98)
    (chosen, tried, _), *results = seen
    assert chosen
    assert np.all(tried == bench.SELECTION_SEED)
    for (on_validation, batches, _), row in zip(results, rows, strict=True):
        assert not on_validation
        np.testing.assert_array_equal(batches[:, 0, 0, 0], [0, 1, 2])
        assert row["losses"] == [4, 3, 2]


def test_the_page_is_what_the_file_says(committed):
    rows = committed("transfer_lm")
    assert _page.written(bench.PAGE, bench.COMMAND) == bench.markdown(rows)
    settings = json.loads(PATH.read_text())["settings"]
    assert all(len(row["losses"]) == settings["seeds"] >= 4 for row in rows)
    for row in rows:
        if row["way"] == bench.TUNED:
            old = bench.tuned_of(rows, {"base": row["base"], "batch": 1})
            base = bench.BASES[row["base"]]
            start = base.old if row["batch"] == 1 else base.old._replace(rate=old["learning_rate"])
            best = bench.grid(base, start, row["batch"])[int(np.argmin(row["validation"]))]
            assert (row["learning_rate"], row["decay"]) == pytest.approx((best.rate, best.decay))


def test_what_the_page_says_of_adamw_is_what_was_measured(committed):
    prose = " ".join(bench.PAGE.read_text().split())
    found = {(row["batch"], row["way"]): row for row in committed("transfer_lm") if row["base"] == "AdamW"}
    mean = {key: np.mean(row["losses"]) for key, row in found.items()}

    def lost(batch, way):
        return mean[batch, way] - mean[batch, bench.TUNED]

    assert f"it loses {lost(4, 'trajectory'):.3f} nats to the best of twelve" in prose
    settings = [(row["learning_rate"], row["decay"]) for row in (found[16, "trajectory"], found[16, bench.TUNED])]
    assert settings[0] == pytest.approx(settings[1])
    assert f"it loses {lost(16, 'square_root_rate'):.3f} nats" in prose
    assert abs(lost(4, "square_root_rate") - lost(4, "trajectory")) < 0.01
    few, many = (lost(batch, "half_life_tokens") for batch in (4, 16))
    assert f"it loses {few:.2f} and {many:.2f} nats" in prose
    old = mean[1, bench.TUNED]
    assert f"the best of twelve is {mean[16, bench.TUNED] - old:.2f} nats worse" in prose
    assert f"at four times it is {old - mean[4, bench.TUNED]:.3f} nats better" in prose


def test_what_the_page_says_of_lion_is_what_was_measured(committed):
    prose = " ".join(bench.PAGE.read_text().split())
    rows = [row for row in committed("transfer_lm") if row["base"] == "Lion" and row["batch"] > 1]
    gaps = {way: [] for way in bench.BASES["Lion"].keeps}
    for row in rows:
        if row["way"] != bench.TUNED:
            gaps[row["way"]].append(difference(row["losses"], bench.tuned_of(rows, row)["losses"]))
    assert all(gap.low < 0 < gap.high for gap in gaps["bound"])
    said = [gap.mean for way in ("bound", "bound_fixed_decay", "half_life_tokens") for gap in gaps[way]]
    pairs = ["{:.3f} and {:.3f}".format(*said[:2]), *("{:.2f} and {:.2f}".format(*said[i : i + 2]) for i in (2, 4))]
    assert f"it loses {pairs[0]} nats. Keeping" in prose
    assert f"costs {pairs[1]} nats, and the rate left alone, by `half_life_tokens`, {pairs[2]}. ##" in prose


@pytest.mark.slow
def test_a_toy_writes_every_row_and_repeats_to_the_bit(tmp_path, run_quick):
    pytest.importorskip("matplotlib")
    first, text = run_quick("transfer_lm", "--seeds", 2, "--plot", tmp_path / "transfer.png")
    (tmp_path / "rows.json").unlink()
    second, _ = run_quick("transfer_lm", "--seeds", 2)
    assert first["rows"] == second["rows"]
    ways = sum(1 + len(base.keeps) * (batch > 1) for base in bench.BASES.values() for batch in bench.BATCHES)
    assert len(first["rows"]) == ways == len(text.splitlines()) - 2
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
