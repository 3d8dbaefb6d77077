"""The README is short, its code runs, its links lead somewhere, and its numbers are those of the committed results."""

import inspect
import json
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PROSE = " ".join(re.sub(r"^```.*?^```", "", TEXT, flags=re.S | re.M).split())


def rows(name):
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["rows"]


@pytest.fixture(scope="module")
def names():
    """What the blocks define, run one after another as a reader does."""
    found = {}
    for block in re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M):
        exec(compile(block, "README.md", "exec"), found)
    return found


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150
    assert len(PROSE.split()) <= 1200


def test_the_code_blocks_run_and_show_what_their_comments_say(names):
    assert names["rule"].dc_gain() == pytest.approx(1.0, rel=1e-12)
    assert mo.nesterov(0.9).normal_form() == pytest.approx((10, 0.9, 0.9))
    assert mo.equivalent(mo.heavy_ball(0.9), mo.ema(0.9), learning_rates=(0.1, 1))
    assert mo.analysis.stability_limit(mo.nesterov(0.9), curvature=1.0) == pytest.approx(1.357, abs=5e-4)
    (velocity,) = mo.velocity(names["state"])
    assert velocity["w"].dtype == jnp.float32


def test_the_training_step_trains_with_velocities_of_one_byte():
    block = re.search(r"^```python\n(.*?)^```", TEXT, re.S | re.M)[1]
    names = {}
    exec(block, names)
    codes = names["state"][2].velocity.codes
    assert codes[0]["w"].dtype == jnp.int8
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 64)).astype(np.float32)
    target = rng.normal(size=(64, 64)).astype(np.float32)
    params, state = names["params"], names["state"]
    for _ in range(300):
        params, state = names["step"](params, state, x, x @ target)
    assert np.abs(params["w"] - target).max() < 1


def test_the_table_tells_the_two_optimizers_apart():
    """bfloat16 parameters, float32 gradients, and one leaf that gets none."""
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.bfloat16)}
    gradients = {"a": jnp.ones(2), "b": jnp.ones(2)}
    theirs, ours = optax.sgd(0.1, 0.9), mo.sgd(0.1, momentum=0.9)
    before, state = theirs.init(params), ours.init(params)
    assert before[0].trace["a"].dtype == jnp.bfloat16
    assert mo.velocity(state)[0]["a"].dtype == jnp.float32
    _, after = theirs.update(gradients, before)
    assert after[0].trace["a"].dtype == jnp.float32
    _, after = theirs.update(gradients | {"b": None}, after)
    assert after[0].trace["b"] is None
    _, state = ours.update(gradients, state)
    _, state = ours.update(gradients | {"b": None}, state)
    np.testing.assert_array_equal(mo.velocity(state)[0]["b"], 1)
    scheduled = optax.sgd(0.1, lambda step: 0.9)
    with pytest.raises(TypeError):
        scheduled.update(params, scheduled.init(params))
    mo.sgd(0.1, momentum=lambda step: 0.9).init(params)
    assert {"dampening", "weight_decay", "maximize"} <= inspect.signature(mo.sgd).parameters.keys()


def test_the_arguments_that_it_names_are_optaxs_in_its_order():
    """Their defaults and the updates for them: `tests/test_dropin.py`."""
    first, then = re.search(r"^\| arguments \| (.*) \| (.*) \|$", TEXT, re.M).groups()
    named = re.findall(r"`(\w+)`", first)
    assert named == list(inspect.signature(optax.sgd).parameters)
    ours = list(inspect.signature(mo.sgd).parameters.values())
    assert named == [p.name for p in ours[: len(named)]]
    assert then == "the same, in the same order, and more by keyword"
    assert all(p.kind == p.KEYWORD_ONLY for p in ours[len(named) :])


def test_momentum_matters_in_the_committed_race():
    final = {row["rule"]: np.array(row["errors"])[:, -1] for row in rows("race")}
    assert final["nesterov"].max() < final["sgd"].min()
    assert "every seed of Nesterov ends below every seed of plain SGD" in PROSE
    assert final["nesterov"].max() > final["heavy_ball"].min()
    assert "Nesterov and the heavy ball overlap" in PROSE


def test_the_bytes_of_a_step_are_those_that_were_counted():
    counted = {row["row"]: row["tpu"]["bytes"] for row in rows("compiled_bytes") if row["shape"] == [8192, 4096]}
    full, half, byte, nibble = (counted[f"nesterov, {name}"] for name in ("float32", "bfloat16", "int8", "int4"))
    said = (
        f"{full:.2f} bytes per parameter in float32, {half:.2f} in bfloat16, {byte:.2f} in int8, {nibble:.2f} in int4"
    )
    assert said in PROSE


@pytest.mark.parametrize("base", ["AdamW", "Muon", "Lion", "AdamW, constant rate"])
def test_the_losses_of_the_language_model_are_those_of_the_board(base):
    pytest.importorskip("scipy")
    pytest.importorskip("flax")
    pytest.importorskip("tyro")
    from benchmarks.board import summary

    found = [line for line in summary.lines(rows("board"), 600) if line.cell.base == base and line.gap is not None]
    shown = {summary.name(line.cell): (line.gap.mean, summary.is_clear(line)) for line in found}
    head, *lines = re.findall(r"^  \| (.*) \|$", TEXT[TEXT.index("small language model") :], re.M)
    (row,) = (line.split(" | ") for line in lines if line.startswith(f"{base} |"))
    for name, cell in list(zip(head.split(" | "), row, strict=True))[1:]:
        if name in shown:
            gap, is_clear = shown[name]
            text = f"{gap:+.4f}"
            assert cell == (f"**{text}**" if is_clear else text)
        else:
            assert not cell.strip()


def test_the_times_are_those_that_were_measured():
    found = {
        (row["tree"], row["optimizer"]): row for name in ("step_time", "step_time_small_leaves") for row in rows(name)
    }
    seconds = {name: found["transformer", f"mo.sgd, {name}"]["compile_seconds"] for name in ("int8", "float32")}
    assert f"{seconds['int8']:.1f} s instead of {seconds['float32']:.2f} s" in PROSE
    least, most = sorted(found[tree, "mo.sgd, int8"]["ratio"] for tree in ("4000 x 4000", "transformer"))
    assert f"a step in int8 takes {least:.1f} to {most:.1f} times as long" in PROSE
    assert f"{found['small leaves', 'mo.sgd, int8']['compile_seconds']:.0f} s for 1000 small ones" in PROSE


def test_the_agreement_with_other_libraries_is_that_of_their_page():
    page = (ROOT / "docs" / "coming-from.md").read_text()
    table = re.findall(r"^\| [^|]*\d\.\d[^|]* \| \d+ \| (\S+) \| (\S*) *\|$", page, re.M)
    single, double = (max((x for x in column if x), key=float) for column in zip(*table, strict=True))
    assert f"{len(table) - 3:d}" == "4"
    assert f"PyTorch, Keras, timm and four others agree to {single} or better in float32, and to {double}" in PROSE


def test_the_oldest_versions_are_those_of_the_package():
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.M))
    for name in ("jax", "optax"):
        assert f"{name} {pins[name]}" in TEXT


def anchors(page):
    """The addresses of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_its_links_lead_to_files_and_headings():
    links = re.findall(r"\]\(([^)\s]+)\)", TEXT)
    assert len(links) > 15
    for link in links:
        if link.startswith("https://"):
            assert link == "https://github.com/google-deepmind/optax", "no other address is known"
            continue
        path, _, heading = link.partition("#")
        assert (ROOT / path).is_file(), link
        assert not heading or heading in anchors(ROOT / path), link


def test_its_install_lines_need_no_index_that_has_the_package():
    commands = re.findall(r"^pip install (.*?)(?: +#.*)?$", TEXT, re.M)
    pages = (ROOT / "docs" / "getting-started.md").read_text()
    commands += re.findall(r"^pip install (.*?)(?: +#.*)?$", pages, re.M)
    assert len(commands) == 4
    assert set(commands) <= {".", "'.[demo]'"}
    assert not re.search(r"pip install '?momentum", TEXT + pages)


def test_its_targets_are_those_of_the_makefile_and_share_an_environment():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)", TEXT)) - {"help"}:
        assert re.search(rf"^{target}: ", makefile, re.M), target
    for target in ("demo", "test", "docs", "notebooks"):
        assert re.search(rf"^{target}: \$\(VENV\)/", makefile, re.M), target
    assert re.search(r"^VENV := \.venv$", makefile, re.M)
