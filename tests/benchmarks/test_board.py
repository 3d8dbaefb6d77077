"""The board: rates are chosen on validation text, seeds are paired, rows are kept, the page is what the file says."""

import json
import math
import pathlib
import sys

import jax
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("scipy")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import _language, _page
from benchmarks.board import __main__ as board
from benchmarks.board import summary
from benchmarks.board.cells import BASES, FACTORS, Cell, cells
from examples.lm import data
from examples.lm.model import loss

TOY = board.CONFIGS["toy"]
PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "board.json"


@pytest.fixture(scope="module")
def toy():
    """The problems of three seeds."""
    return _language.problems(TOY, (5, 3, 7))


class Recorder:
    """A trainer that trains nothing: the best rate is the second, or on other text the last."""

    calls = ()

    def __init__(self, make, setting):
        self.marks = setting.marks

    def curves(self, numbers, problem, windows):
        Recorder.calls += ((np.array(numbers), problem, windows),)
        on_validation = np.array_equal(windows, _language.held_out(TOY, data.splits().validation))
        final = abs(np.arange(len(numbers)) - (1 if on_validation else len(numbers)))
        return np.full((self.marks, len(numbers)), final, np.float64).T


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(board, "Trainer", Recorder)
    monkeypatch.setattr(Recorder, "calls", ())
    return Recorder


def test_the_rate_is_chosen_on_validation_text_and_the_result_is_of_test_text(recorder, toy):
    selection, problem = jax.tree.map(lambda x: x[:1], toy), jax.tree.map(lambda x: x[1:], toy)
    cell = Cell("AdamW", "none", "float32")
    row = board.measure(cell, TOY, selection, problem)
    assert row["learning_rate"] == cell.rates[1]
    assert row["validation"] == [1, 0, 1, 2, 3, 4]
    assert row["curves"] == [[2, 2], [1, 1]]
    (rates, tried, first), (runs, reported, second) = recorder.calls
    texts = data.splits()
    np.testing.assert_allclose(rates, cell.rates, rtol=1e-7)
    np.testing.assert_array_equal(first, _language.held_out(TOY, texts.validation))
    np.testing.assert_array_equal(second, _language.held_out(TOY, texts.test))
    np.testing.assert_array_equal(runs, np.float32([cell.rates[1]] * 2))
    # One seed for all rates, and other ones for the result.
    assert all(np.array_equal(batches, selection.batches[0]) for batches in tried.batches)
    assert reported is problem


def test_a_seed_is_the_same_run_whatever_runs_beside_it(toy):
    others = _language.problems(TOY, (3, 8, 9))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[1], y[0]), toy, others)
    assert not np.array_equal(toy.batches[0], toy.batches[1])
    embeddings = toy.weights["tokens"]["embedding"]
    assert not np.array_equal(embeddings[0], embeddings[1])
    assert toy.batches.shape == (3, TOY.steps, TOY.batch, TOY.length + 1)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["board", "--config", "toy", *map(str, arguments)])
    board.main()


def test_a_run_goes_on_after_its_last_row(recorder, monkeypatch, tmp_path):
    no_batches = np.zeros((2, 1))
    monkeypatch.setattr(board, "problems", lambda setting, seeds: _language.Problem({}, no_batches[: len(seeds)]))
    output = tmp_path / "rows.json"
    options = ("--output", output, "--seeds", 2)
    run(monkeypatch, *options, "--limit", 2)
    first = json.loads(output.read_text())["rows"]
    assert [summary.cell_of(row) for row in first] == cells()[:2]
    assert len(recorder.calls) == 4
    run(monkeypatch, *options, "--limit", 1)
    rows = json.loads(output.read_text())["rows"]
    assert rows[:2] == first
    assert [summary.cell_of(row) for row in rows] == cells()[:3]
    assert len(recorder.calls) == 6
    with pytest.raises(SystemExit):
        run(monkeypatch, "--output", output, "--seeds", 3, "--limit", 1)
    assert json.loads(output.read_text())["rows"] == rows


def test_every_memory_is_in_float32_and_every_storage_without_memory():
    found = cells()
    assert len(set(found)) == len(found) == 5 * 8 + 3 + 3 * 2
    assert all(cell.memory == "none" or cell.storage == "float32" for cell in found)
    assert all(cell.reference in found[: i + 1] for i, cell in enumerate(found))


def test_steps_to_a_loss_are_those_of_the_line_between_marks():
    assert summary.steps_to(2.0, [3.0, 2.5, 1.5, 1.0], 400) == pytest.approx(250)
    assert summary.steps_to(2.0, [2.0], 10) == 10
    assert summary.steps_to(3.0, [2.0], 10) == pytest.approx(10 * (_language.WORST - 3) / (_language.WORST - 2))
    assert summary.steps_to(1.0, [3.0, 2.0], 10) is None


def fake_row(cell, finals, rate=None):
    return {**cell._asdict(), "learning_rate": rate or cell.rates[2], "curves": [[3.0, x] for x in finals]}


def test_differences_are_to_the_base_from_the_same_seeds():
    base, memory, storage = (Cell("Lion", *rest) for rest in
                             (("none", "float32"), ("Lookahead", "float32"), ("none", "int8")))  # fmt: skip
    # The base's seeds differ by more than what a memory changes: only pairs show it.
    finals = np.array([1.0, 1.5, 2.0, 2.5])
    gaps = np.array([0.10, 0.11, 0.09, 0.10])
    rows = [fake_row(base, finals), fake_row(memory, finals - gaps, memory.rates[0]), fake_row(storage, finals[::-1])]
    rows.append(fake_row(Cell("SGD", "Lookahead", "float32"), finals))  # its base was not run
    first, second, third = summary.lines(rows, 100)
    assert (first.gap, first.adjusted, first.at_edge) == (None, None, False)
    assert second.gap.mean == pytest.approx(-0.1)
    # Student's distribution of three degrees of freedom; the smaller of two p-values is doubled.
    x = 0.1 / (np.std(gaps, ddof=1) / 2) / math.sqrt(3)
    assert second.adjusted == pytest.approx(2 * (1 - 2 / math.pi * (x / (1 + x * x) + math.atan(x))))
    assert second.at_edge
    assert summary.is_clear(second)
    assert not summary.is_clear(third)
    text = summary.markdown(rows, 100)
    assert "| Lookahead | 0.0001 (edge) | 1.6500 ± 0.6" in text
    assert "**-0.1000 (-0.1130 to -0.0870)** | < 0.001 |" in text
    assert "SGD" not in text


def test_the_committed_rates_are_the_best_of_the_grid_on_validation_text(committed):
    settings = json.loads(PATH.read_text())["settings"]
    for row in committed("board"):
        cell = summary.cell_of(row)
        assert len(row["validation"]) == len(FACTORS)
        assert row["learning_rate"] == cell.rates[int(np.argmin(row["validation"]))]
        assert np.shape(row["curves"]) == (settings["seeds"], settings["marks"])
        assert settings["seeds"] >= 8


def test_the_page_is_what_the_file_says(committed):
    steps = json.loads(PATH.read_text())["settings"]["steps"]
    assert _page.written(board.PAGE, board.COMMAND) == summary.markdown(committed("board"), steps)


@pytest.fixture(scope="module")
def found():
    """The results by base and name."""
    document = json.loads(PATH.read_text())
    lines = summary.lines(document["rows"], document["settings"]["steps"])
    return {base: {summary.name(x.cell): x for x in lines if x.cell.base == base} for base in BASES}


@pytest.fixture(scope="module")
def prose():
    return " ".join(board.PAGE.read_text().split())


def clear(found, base, sign):
    """The names of what differs from the base in this direction."""
    return {name for name, x in found[base].items() if summary.is_clear(x) and sign * x.gap.mean > 0}


def test_the_board_is_full(found):
    assert {x.cell for lines in found.values() for x in lines.values()} == set(cells())


def test_what_the_page_says_of_memories_is_what_was_measured(found, prose):
    slow = {"EMA-Nesterov, 5 %", "primal averaging, 5 %"}
    better = {base: clear(found, base, -1) for base in BASES}
    assert better == {
        "AdamW": {"outer Nesterov"},
        **{base: set() for base in ("Muon", "SGD", "Lion")},
        "AdamW, constant rate": {"average", "EMA-Nesterov, 5 %", "Lookahead", "outer Nesterov"},
    }
    assert {base: clear(found, base, 1) for base in BASES} == {
        "AdamW": {"average", "EMA-Nesterov", "primal averaging", "primal averaging, 5 %"},
        **{base: {"average", "EMA-Nesterov", "primal averaging", *slow} for base in ("Muon", "Lion")},
        "SGD": {"average"},
        "AdamW, constant rate": {"primal averaging"},
    }
    adamw, constant = found["AdamW"], found["AdamW, constant rate"]
    assert f"lower AdamW's test loss by {-adamw['outer Nesterov'].gap.mean:.3f} nats per byte" in prose
    gains = [-constant[name].gap.mean for name in ("average", "EMA-Nesterov, 5 %", "Lookahead", "outer Nesterov")]
    assert (
        "the average by {:.3f} nats, EMA-Nesterov at the longer half-life by {:.3f}, Lookahead by {:.3f}, outer".format(
            *gains
        )
        in prose
    )
    assert f"outer Nesterov steps by {gains[-1]:.3f}" in prose
    lowest = min(x.losses.mean() for x in (*adamw.values(), *constant.values()))
    assert lowest == constant["average"].losses.mean()
    assert (
        f"at {lowest:.3f}; with the fall and without an average it is {adamw['the base itself'].losses.mean():.3f}"
        in prose
    )
    averages = [found[base]["average"].gap.mean for base in BASES if base != "AdamW, constant rate"]
    assert f"it is worse by {min(averages):.4f} to {max(averages):.4f} nats" in prose
    steps = [f"{found[base][name].steps:.0f}" for base in ("AdamW", "Muon") for name in ("average", "the base itself")]
    assert "AdamW needs {} steps instead of {} to the stated loss, Muon {} instead of {}".format(*steps) in prose


def test_what_the_page_says_of_harm_is_what_was_measured(found, prose):
    harmed = ("AdamW", "Muon", "Lion")
    quick = [found[base]["EMA-Nesterov"].gap.mean for base in harmed]
    assert f"by {min(quick):.2f} to {max(quick):.2f} nats, and with 30 steps to Muon" in prose
    names = "primal averaging", "primal averaging, 5 %"
    both = [[found[base][name].gap.mean for base in harmed] for name in names]
    assert f"by {np.min(both):.2f} to {np.max(both):.2f} nats, and to AdamW and Muon more at 2 % than at 5 %" in prose
    assert both[0][0] > both[1][0]
    assert both[0][1] > both[1][1]
    assert f"the loss of {both[1][0]:.2f} nats that remains" in prose


def test_what_the_page_says_of_storages_is_what_was_measured(found, prose):
    def bound(base):
        kept = [x.gap for x in found[base].values() if x.cell.storage != "float32"]
        return math.ceil(1000 * max(max(-gap.low, gap.high) for gap in kept)) / 1000

    bounds = [f"{bound(base):.3f}" for base in ("AdamW", "Lion", "Muon")]
    assert "within ±{} nats, Lion's within ±{} and Muon's within ±{}".format(*bounds) in prose
    scatter = [x.losses.std(ddof=1) for x in found["SGD"].values()]
    assert f"scatter between seeds by {min(scatter):.2f} to {max(scatter):.2f} nats" in prose


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_run_is_that_of_a_plain_loop(base, toy):
    cell = Cell(base, "average", "float32")
    trainer = _language.Trainer(lambda rate: cell.optimizer(rate, TOY), TOY)
    windows = _language.held_out(TOY, data.splits().test)
    rate = np.float32(cell.rates[3])
    found = trainer.curves(np.full(3, rate), toy, windows)
    tx, read = cell.optimizer(rate, TOY)
    for seed, curve in enumerate(found):
        weights, batches = jax.tree.map(lambda x: x[seed], toy)  # noqa: B023
        state, expected = tx.init(weights), []
        for t, tokens in enumerate(batches):
            updates, state = jax.jit(tx.update)(jax.grad(loss)(weights, tokens), state, weights)
            weights = optax.apply_updates(weights, updates)
            if (t + 1) % (TOY.steps // TOY.marks) == 0:
                expected.append(float(loss(read(state, weights), windows)))
        np.testing.assert_allclose(curve, np.minimum(expected, _language.WORST), rtol=2e-5)


@pytest.mark.slow
def test_a_toy_board_runs_repeats_to_the_bit_and_draws_its_figure(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    # Muon warns in int8.
    wanted = [cell for cell in cells() if cell.base in ("AdamW", "SGD")]
    monkeypatch.setattr(board, "cells", lambda: wanted)
    documents = []
    for name in ("one", "two"):
        output = tmp_path / f"{name}.json"
        run(monkeypatch, "--output", output, "--seeds", 2, "--plot", tmp_path / "board.png")
        documents.append(json.loads(output.read_text())["rows"])
    assert documents[0] == documents[1]
    assert [summary.cell_of(row) for row in documents[0]] == wanted
    final = np.array([row["curves"] for row in documents[0]])[..., -1]
    assert np.all(final > 3)
    assert np.all(final < _language.WORST)
    assert (tmp_path / "board.png").stat().st_size > 10_000
