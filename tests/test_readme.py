"""The README's code runs, and its numbers are those of the code."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import momentum_optax as mo

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_the_code_blocks_run_and_show_what_their_comments_say():
    block, _ = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["rule"].dc_gain() == pytest.approx(1.0, rel=1e-12)
    assert mo.nesterov(0.9).normal_form() == pytest.approx((10, 0.9, 0.9))
    assert mo.equivalent(mo.heavy_ball(0.9), mo.ema(0.9), learning_rates=(0.01, 0.1))
    (velocity,) = mo.velocity(names["state"])
    assert velocity["w"].dtype == jnp.float32


def test_the_code_for_many_devices_runs():
    _, block = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    states, workers = block.split("\n\n")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jnp.ones((8, 4))}
    split = {"w": NamedSharding(mesh, PartitionSpec("data"))}
    names = {"mo": mo, "jax": jax, "mesh": mesh, "params": params, "params_shardings": split, "tx": mo.sgd(0.1, 0.9)}
    exec(states, names)
    assert mo.velocity(names["state"])[0]["w"].sharding.is_equivalent_to(split["w"], 2)
    spread = jax.jit(names["tx"].init)({"w": jax.device_put(params["w"], NamedSharding(mesh, PartitionSpec()))})
    assert mo.velocity(spread)[0]["w"].sharding.is_equivalent_to(split["w"], 2)

    def meet(params):
        exec(workers.splitlines()[0], names)
        here = names | {"params": params, "outer_state": names["outer"].init(params)}
        exec(workers.splitlines()[1], here)
        return here["params"]

    np.testing.assert_array_equal(jax.vmap(meet, axis_name="workers")({"w": jnp.ones((2, 8, 4))})["w"], 1)


def test_the_table_of_workers_is_that_of_the_committed_file():
    rows = json.loads((ROOT / "benchmarks" / "outer_quality.json").read_text())["rows"]
    for row in rows:
        losses = np.array(row["losses"])
        cells = (
            f"{row['way']} | {row['bytes']:.2f} | {np.median(losses):.3f} ({losses.min():.3f} to {losses.max():.3f})"
        )
        assert f"| {cells} |" in TEXT
    medians = {row["way"]: np.median(row["losses"]) for row in rows}
    assert medians["DiLoCo"] <= 1.05 * medians["every step"], "what rare meetings may cost"


def test_the_diff_at_the_top_is_code():
    for line in re.findall(r"^\+ tx = (.*?)(?:  +#.*)?$", TEXT, re.M):
        assert callable(eval(line, {"mo": mo, "optax": optax}).update)


def test_every_public_rule_and_schedule_is_listed():
    table = TEXT[TEXT.index("| group | rules |") : TEXT.index("## What is different")]
    listed = set(re.findall(r"`(?:schedules\.)?(\w+)`", table))
    public = {n for m in (mo.schedules,) for n, f in vars(m).items() if getattr(f, "__module__", "") == m.__name__}
    rules = {n for n, f in vars(mo).items() if getattr(f, "__module__", "") == "momentum_optax.rules"}
    assert listed == {n for n in public if n[0] != "_"} | rules


def test_the_oldest_versions_are_those_of_the_package():
    root = pathlib.Path(__file__).parents[1]
    pins = dict(re.findall(r"^(\w+)==([\d.]+)$", (root / "tests" / "oldest.txt").read_text(), re.M))
    for name in ("jax", "optax"):
        assert f"{name} {pins[name]}" in TEXT
        assert f'"{name}>={pins[name]}"' in (root / "pyproject.toml").read_text()


def test_the_report_is_what_its_command_prints(capsys):
    command, printed = re.search(r'```sh\npython -c "(.*?)"\n```\n\n```text\n(.*?)```', TEXT, re.S).groups()
    exec(command, {})
    assert capsys.readouterr().out == printed


def test_the_worth_of_suggestions_is_that_of_the_committed_run():
    root = pathlib.Path(__file__).parents[1]
    rows = json.loads((root / "benchmarks" / "suggested_settings.json").read_text())["rows"]
    *usual, worst = sorted(rows, key=lambda row: row["ratio"])
    text = " ".join(TEXT.split())
    assert f"{usual[0]['ratio']:.2f} to {usual[-1]['ratio']:.2f} times the steps" in text
    assert (
        f"in {len(usual)} of {len(rows)} cases; in one, {worst['steps']} steps instead of {worst['best_steps']}" in text
    )
