"""The tables of the documentation are those of the committed results, and what the text says of them holds."""

import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo

ROOT = pathlib.Path(__file__).parents[1]


def page(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def prose(name):
    return " ".join(page(name).split())


def rows(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["rows"]


def row_of(*cells):
    return f"| {' | '.join(cells)} |\n"


def test_bytes_moved_by_a_step():
    counted = {(row["row"], tuple(row["shape"])): row for row in rows("compiled_bytes")}
    square = (8192, 4096)

    def moved(name, shape=square):
        return [counted[name, shape][target]["bytes"] for target in ("tpu", "h200")]

    def cells(title, floors, *names):
        each = [", ".join(f"{x:.2f}" for x in of_target) for of_target in zip(*map(moved, names), strict=True)]
        return row_of(title, floors, *each)

    text = page("storage")
    assert cells("`optax.trace` and float32", "20", "optax.trace") in text
    assert moved("optax.trace") == moved("nesterov, float32")
    rules = ("heavy_ball", "ema", "nesterov", "quasi_hyperbolic")
    for storage, title in (("bfloat16", "bfloat16"), ("int8", "int8: heavy ball, EMA, Nesterov, quasi-hyperbolic"),
                           ("int4", "int4: the same rules")):  # fmt: skip
        floor = f"{counted[f'heavy_ball, {storage}', square]['floor']:g}"
        for rule in rules:
            assert cells(title, floor, f"{rule}, {storage}") in text
    for storage, floor in (("int8", "14"), ("int4", "13")):
        awkward = [
            shape for name, shape in counted if name.startswith(f"nesterov, {storage}, weight") and shape != square
        ]
        assert len(awkward) == 4
        worst = np.max([moved(f"{rule}, {storage}, weight decay and schedule", shape)
                        for shape in awkward for rule in ("nesterov", "heavy_ball")], 0)  # fmt: skip
        assert row_of(f"{storage}, worst of four awkward shapes", floor, *(f"{x:.2f}" for x in worst)) in text
    several = [f"aggregated, {name}" for name in ("float32", "int8", "int4")]
    assert cells("two velocities of AggMo: float32, int8, int4", "28, 16, 14", *several) in text
    assert cells("`optax.adamw`, with `mu` in int8", "28, 22", "optax.adamw", "adamw, mu in int8") in text
    one_pass, two_passes = moved("adamw, mu in int8, nu in uint8")
    assert row_of("and with `nu` in uint8 as well", "16", f"{one_pass:.2f}", f"{two_passes:.2f}, not one pass") in text


def test_bytes_moved_behind_an_optimizer_and_by_averages():
    counted = {row["row"]: row for row in rows("compiled_bytes")}

    def cells(title, names):
        each = [", ".join(f"{counted[name][target]['bytes']:.1f}" for name in names) for target in ("tpu", "h200")]
        return row_of(title, ", ".join(f"{counted[name]['floor']:g}" for name in names), *each)

    text = page("storage")
    for rule in ("primal_averaging", "ema_nesterov", "outer_nesterov", "lookahead"):
        names = [f"adamw, {rule} in {storage}" for storage in ("float32", "bfloat16", "int8")]
        assert cells(f"`mo.{rule}` behind `optax.adamw`", names) in text
    names = [f"sgd, average in {storage}, every=100" for storage in ("float32", "bfloat16", "int8")]
    assert cells("`mo.average_params` behind `optax.sgd(momentum=)`", names) in text
    said = inspect.getdoc(mo.average_params)
    found = [counted[name]["tpu"]["bytes"] - counted["optax.trace"]["tpu"]["bytes"] for name in names]
    assert "8 bytes a parameter beside the 20" in said.replace("\n", " ")
    assert "looks at the weights twice: 18 and 15 bytes" in said.replace("\n", " ")
    assert [round(x) for x in found] == [8, 18, 15]


@pytest.mark.parametrize("storage", [mo.storage.int8, mo.storage.int4, mo.storage.uint8])
def test_docstrings_say_the_size_of_a_row(storage):
    """The docstring names `storage.ROW_SIZE`, the least length at which each row of a matrix has a scale."""
    assert "`storage.ROW_SIZE`" in inspect.getdoc(storage)
    said = mo.storage.ROW_SIZE

    def has_a_scale_for_each_row(length):
        leaf = jax.ShapeDtypeStruct((7, length), jnp.float32)
        state = jax.eval_shape(lambda leaf: storage(min_size=1).init(leaf, 1), leaf)
        return any(x.shape == (7, 1) for x in jax.tree.leaves(state))

    assert has_a_scale_for_each_row(said)
    assert not has_a_scale_for_each_row(said - 1)


OPTIMIZERS = (
    "optax.sgd", "optax.adamw", "mo.sgd, float32", "mo.sgd, bfloat16", "mo.sgd, int8", "mo.sgd, int4",
    "torch.optim.SGD(fused)",
)  # fmt: skip


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_times_of_a_step_and_of_its_compilation(optimizer):
    found = {
        (row["tree"], row["optimizer"]): row for name in ("step_time", "step_time_small_leaves") for row in rows(name)
    }

    def cell(tree):
        row = found.get((tree, optimizer))
        if row is None:
            return ""
        ratio, seconds = row["ratio"], row["compile_seconds"]
        digits = 2 if seconds < 1 else 1 if seconds < 10 else 0
        return f"{ratio:.{2 if ratio < 10 else 0}f}" + (f", {seconds:.{digits}f} s" if seconds else "")

    cells = [cell(tree) for tree in ("4000 x 4000", "4096 x 4096", "transformer", "small leaves")]
    assert row_of(f"`{optimizer}`", *cells) in page("storage")


def test_workers_that_meet_rarely():
    for row in rows("outer_quality"):
        losses = np.array(row["losses"])
        low, middle, high = (f"{x:.3f}" for x in (losses.min(), np.median(losses), losses.max()))
        assert row_of(row["way"], f"{row['bytes']:.2f}", f"{middle} ({low} to {high})") in page("distributed")
    medians = {row["way"]: np.median(row["losses"]) for row in rows("outer_quality")}
    assert medians["DiLoCo"] <= 1.05 * medians["every step"], "what rare meetings may cost"


RACED = {
    "sgd": "plain SGD",
    "heavy_ball": "heavy ball 0.9",
    "nesterov": "Nesterov 0.9",
    "quasi_hyperbolic": "quasi-hyperbolic 0.999, 0.7",
    "aggregated": "AggMo 0, 0.9, 0.99",
}


def test_the_race_of_five_rules():
    found = {row["rule"]: row for row in rows("race")}
    assert found.keys() == RACED.keys()
    for rule, title in RACED.items():
        row, final = found[rule], np.array(found[rule]["errors"])[:, -1]
        errors = f"{np.median(final):.3f} ({final.min():.3f} to {final.max():.3f})"
        assert row_of(title, f"{row['effective_rate']:.3g}", errors) in page("guide")
        assert len(final) == 5


def test_the_report_is_what_its_command_prints(capsys):
    command, printed = re.search(r'```sh\npython -c "(.*?)"\n```\n\n```text\n(.*?)```', page("analysis"), re.S).groups()
    exec(command, {})
    assert capsys.readouterr().out == printed


def test_the_worth_of_suggested_settings():
    *usual, worst = sorted(rows("suggested_settings"), key=lambda row: row["ratio"])
    text = prose("analysis")
    assert f"{usual[0]['ratio']:.2f} to {usual[-1]['ratio']:.2f} times the steps" in text
    steps = f"{worst['steps']} steps instead of {worst['best_steps']}"
    assert f"in {len(usual)} of {len(usual) + 1} cases; in one, {steps}" in text


def test_the_difference_of_debiasing():
    decays = (0.5, 0.9)
    v = 0.0
    for decay in decays:
        v = decay * v + (1 - decay)
    assert f"`optax.ema` {v / (1 - decays[-1] ** 2):.2f} at the second" in prose("coming-from")
    tx = mo.scale_by_momentum(mo.ema(lambda step: 0.5 + 0.4 * (step > 0)), debias=True)
    state = tx.init(np.float32(0))
    for _ in decays:
        update, state = tx.update(np.float32(1), state)
        assert update == pytest.approx(1, abs=1e-6)


def test_figures_of_an_accelerator_are_missed_until_there_are_some():
    there = (ROOT / "benchmarks" / "accelerator.json").exists()
    assert ("the script waits for an accelerator" in prose("storage")) != there


def percent(share):
    return f"{100 * share:.0f} %" if share > 0.995 else f"{100 * share:.2g} %"


def weight_averages():
    """The rows of the table of averages of the weights."""
    found = {(r["decay"], r["every"], r["weights"], r["average"]): r for r in rows("weight_averages")}
    kinds = ("float32", "bfloat16", "int8", "nearest bfloat16, by hand")
    for case in dict.fromkeys(key[:3] for key in found):
        decay, every, weights = case
        cells = [found[*case, kind] for kind in kinds]
        texts = [f"{percent(r['error'])} ({percent(r['error_over_distance'])})" for r in cells]
        yield row_of(weights, str(decay), str(every), *texts)


def test_errors_of_averages_of_the_weights():
    assert all(row in page("guide") for row in weight_averages())
    assert len(list(weight_averages())) == 4


def test_what_few_bits_do_to_averages_is_said_where_they_are_chosen():
    found = {(r["decay"], r["every"], r["weights"], r["average"]): r["error"] for r in rows("weight_averages")}
    cases = ((0.999, 1), (0.9999, 1), (0.9999, 100))
    two, one = ([found[*case, "float32", kind] for case in cases] for kind in ("bfloat16", "int8"))
    assert max(two[0], two[2] / 2) <= 0.01
    assert one[0] <= 0.04
    text = " ".join(inspect.getdoc(mo.average_params).split())
    short, long, seldom = ((f"{100 * a:.1g}", f"{100 * b:.2g}") for a, b in zip(two, one, strict=True))
    assert f"{short[0]} % of the average in 2 bytes" in text
    assert f"{long[0]} % and {long[1]} % for 0.9999, {seldom[0]} % and {seldom[1]} % for that with `every=100`" in text
    assert f"{seldom[1]} % of the average at a decay of 0.9999" in prose("guide")


def change(share):
    return "diverges" if share is None else f"{100 * share:+.3g}%"


def test_the_changes_of_a_transfer():
    found = rows("transfer")
    for r in found:
        changes = [", ".join(map(change, r[name])) for name in ("variance", "contraction")]
        numbers = (f"{r['learning_rate']:.3g}", f"{r['decay']:.4g}", *changes, change(r["lag"]))
        assert row_of(f"`{r['base']}`", f"`{r['keep']}`", *numbers) in page("transfer")
    assert len(found) == 10


def test_the_rules_of_transfer_are_those_of_its_page():
    head, *rules = re.findall(r"^\| `(\w+)` \| (?:`|any)", page("transfer").split("## What each")[0], re.M)
    assert head == "keep"
    assert all(f'`"{keep}"`' in inspect.getdoc(mo.tuning.transfer) for keep in rules)
    with pytest.raises(ValueError, match="keep must be one of") as error:
        mo.tuning.transfer(mo.ema(0.9), 0.1, keep="")
    assert re.findall(r"'(\w+)'", str(error.value)) == rules
