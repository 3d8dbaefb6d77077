"""Checkpoints: what does not fit is an error that names the field; what fits goes on bit for bit, on any mesh."""

import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import resumable
from conformance import STORAGES, assert_bit_equal
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo
from momentum_optax.state import checkpoint
from momentum_optax.state.checkpoint import CheckpointError, check, describe, fields, from_fields, migrate

P = PartitionSpec
TESTS = pathlib.Path(__file__).parent
PARAMS = {"w": jnp.ones((16, 64)), "b": jnp.ones((64,)), "s": jnp.ones(())}
BYTES, SQUARES = STORAGES["int8"](), mo.storage.uint8(min_size=1)
OPTIMIZERS = {
    **{name: lambda name=name: mo.sgd(0.1, mo.nesterov(0.9), storage=STORAGES[name]()) for name in STORAGES},
    "debiased": lambda: mo.scale_by_momentum(mo.aggregated((0.0, 0.9, 0.99)), storage=BYTES, debias=True),
    "guarded": lambda: mo.guarded(mo.sgd(0.1, mo.nesterov(0.9), storage=BYTES), "leaf"),
    "adaptive_restart": lambda: mo.adaptive_restart(mo.nesterov(mo.schedules.fista()), storage=BYTES),
    "scheduled_restart": lambda: mo.scheduled_restart(mo.sgd(0.1, 0.9, storage=BYTES), 3),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.lion_mix(), storage="bfloat16"), "mean"),
    "compress": lambda: mo.compress(optax.adamw(1e-3), {"mu": BYTES, "nu": SQUARES}),
}
# Seconds each; the others are slow tests.
FAST = {"int8"}
every_optimizer = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)


def abstract(tx, params=PARAMS):
    return jax.eval_shape(tx.init, params)


def gradients(t):
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def placed(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": P("data", "model"), "b": P("model"), "s": P()}
    return mesh, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def saved(path, state, layout=None):
    """A checkpoint with its description."""
    with ocp.CheckpointManager(path) as manager:
        layout = ocp.args.JsonSave(describe(state) if layout is None else layout)
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(state), layout=layout))
    return path


def restored(path, target):
    """As documented: the description is checked against what is wanted, and what came against the description."""
    with ocp.CheckpointManager(path) as manager:
        layout = manager.restore(0, args=ocp.args.Composite(layout=ocp.args.JsonRestore())).layout
        check(layout, target)
        state = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
    check(layout, state)
    return state


def with_shardings(target, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, shardings)


def go_on(tx, state, begin, end, shardings):
    """Updates from step to step, and the last state."""
    params, update, out = jax.device_put(PARAMS, shardings), jax.jit(tx.update), []
    for t in range(begin, end):
        u, state = update(jax.device_put(gradients(t), shardings), state, params)
        out.append(u)
    return out, state


@every_optimizer
def test_a_run_goes_on_bit_for_bit_on_another_mesh(name, tmp_path):
    tx = OPTIMIZERS[name]()
    (_, here), (_, there) = placed((4, 2)), placed((2, 4))
    state = jax.device_put(tx.init(PARAMS), mo.sharding.state_shardings(tx, PARAMS, here))
    _, state = go_on(tx, state, 0, 2, here)
    saved(tmp_path / "ckpt", state)
    elsewhere = mo.sharding.state_shardings(tx, PARAMS, there)
    again = restored(tmp_path / "ckpt", with_shardings(abstract(tx), elsewhere))
    assert_bit_equal(again, state)
    for x, s in zip(jax.tree.leaves(again), jax.tree.leaves(elsewhere), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)
    assert_bit_equal(go_on(tx, again, 2, 5, there), go_on(tx, state, 2, 5, here))


@pytest.mark.slow
def test_a_state_spread_by_zero1_goes_on_over_another_number_of_devices(tmp_path):
    plain = mo.sgd(0.1, mo.nesterov(0.9), storage=BYTES)
    wholes, runs = [], []
    for count in (8, 4):
        mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
        wholes.append(jax.tree.map(lambda _, mesh=mesh: NamedSharding(mesh, P()), PARAMS))
        runs.append(mo.sharding.zero1(plain, mesh, "data"))
    state = jax.jit(runs[0].init)(jax.device_put(PARAMS, wholes[0]))
    _, state = go_on(runs[0], state, 0, 2, wholes[0])
    saved(tmp_path / "ckpt", state)
    # Where the other run keeps its state is what its own init says.
    shapes = jax.jit(runs[1].init).lower(jax.device_put(PARAMS, wholes[1])).compile().output_shardings
    again = restored(tmp_path / "ckpt", with_shardings(abstract(plain), shapes))
    assert again[-2].velocity.codes[0]["w"].sharding.spec == P("data")
    assert_bit_equal(go_on(runs[1], again, 2, 4, wholes[1]), go_on(runs[0], state, 2, 4, wholes[0]))


@pytest.mark.slow
def test_outer_momentum_goes_on_bit_for_bit(tmp_path):
    outer = mo.outer.diloco(exchange="int8")
    state = outer.init(PARAMS)
    # Each of two workers has a residual of its own; anchor and momentum are common.
    axes = type(state)(None, None, 0)
    state = state._replace(residual=jax.tree.map(lambda x: jnp.stack([x, x]), state.residual))

    def exchange(workers, state):
        return outer.sync(workers, state, axis_name="workers")

    sync = jax.jit(jax.vmap(exchange, in_axes=(0, axes), out_axes=(0, axes), axis_name="workers"))

    def meet(state, t):
        moved = [jax.tree.map(lambda x, g: x - g, state.anchor, gradients(2 * t + i)) for i in range(2)]
        return sync(jax.tree.map(lambda *x: jnp.stack(x), *moved), state)[1]

    state = meet(state, 0)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(state.residual))
    saved(tmp_path / "ckpt", state)
    again = restored(tmp_path / "ckpt", jax.eval_shape(lambda: state))
    assert_bit_equal(again, state)
    assert_bit_equal(meet(again, 1), meet(state, 1))


# What does not fit.


def test_a_description_survives_json_and_fits_its_own_state_only():
    states = {name: abstract(make()) for name, make in OPTIMIZERS.items()}
    for name, state in states.items():
        layout = json.loads(json.dumps(describe(state)))
        for other, target in states.items():
            if name == other:
                check(layout, target)
            else:
                with pytest.raises(CheckpointError, match=r"^\S+ must (be|not be) .*, got .*"):
                    check(layout, target)


def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_its_field():
    layout = describe(abstract(mo.sgd(0.1, 0.9, storage=BYTES)))
    assert list(layout["fields"])[:3] == ["0", "1", "2"]
    momentum = "2/velocity"
    for tx, params, message in (
        (mo.sgd(0.1, 0.9), PARAMS, f"{momentum} must be a Float32Velocity, got a Int8Velocity"),
        (mo.sgd(0.1, mo.ema(0.9), storage=BYTES), PARAMS, None),
        (optax.sgd(0.1, 0.9), PARAMS, "0 must be a TraceState, got a EmptyState"),
        (mo.sgd(0.1, mo.aggregated((0.5, 0.9)), storage=BYTES), PARAMS, f"{momentum}/codes/1/b must be int8[64], got"),
        (mo.sgd(lambda t: 0.1, 0.9, storage=BYTES), PARAMS, "3 must be a ScaleByScheduleState, got a EmptyState"),
        (
            mo.sgd(0.1, 0.9, storage=BYTES),
            PARAMS | {"x": PARAMS["b"]},
            f"{momentum}/codes/0/x must be int8[64], got nothing",
        ),
        (
            mo.sgd(0.1, 0.9, storage=BYTES),
            {k: PARAMS[k] for k in "bs"},
            f"{momentum}/codes/0/w must not be there, got int8[16",
        ),
        (
            mo.sgd(0.1, 0.9, storage=BYTES),
            PARAMS | {"w": jnp.ones((16, 32))},
            "w must be int8[16, 32], got int8[16, 64]",
        ),
        (mo.sgd(0.1, 0.9, storage="int8"), PARAMS, f"{momentum}/codes/0/b must be float32[64], got int8[64]"),
    ):
        if message is None:  # rates and coefficients are in no state
            check(layout, abstract(tx, params))
            continue
        with pytest.raises(CheckpointError) as error:
            check(layout, abstract(tx, params))
        assert message in str(error.value)
    for path in layout["fields"]:
        less = layout | {"fields": {k: x for k, x in layout["fields"].items() if k != path}}
        with pytest.raises(CheckpointError, match=rf"^{path} must be .*, got nothing$"):
            check(less, abstract(mo.sgd(0.1, 0.9, storage=BYTES)))


def test_what_is_no_description_is_refused():
    tx = mo.sgd(0.1, 0.9)
    layout = describe(abstract(tx))
    for bad in (None, {}, {"fields": {}}, {**layout, "fields": None}, {**layout, "fields": {"0": 3}}, []):
        with pytest.raises(CheckpointError, match="description must be what describe gives"):
            check(bad, abstract(tx))
    with pytest.raises(CheckpointError, match=r"have format 1, got 2: it was written by newer code"):
        check({**layout, "format": 2}, abstract(tx))
    with pytest.raises(CheckpointError, match=r"have version 3, got 0: migrate"):
        check(layout, abstract(tx), version=3)
    with pytest.raises(ValueError, match="two at a/b"):
        describe({"a/b": 1.0, "a": {"b": 2.0}})
    with pytest.raises(ValueError, match="two at a/b"):
        fields({"a/b": 1.0, "a": {"b": 2.0}})
    with pytest.raises(TypeError, match=r"arrays and numbers, got 'x' at a"):
        describe({"a": "x"})


def mixed(x):
    """The finalizer of MurmurHash3, in Python's whole numbers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_a_checksum_is_a_sum_over_hashes_of_bits_and_places_on_every_mesh():
    _, shardings = placed((4, 2))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    bits = np.asarray(w).view(np.uint32).ravel()
    expected = sum(mixed(mixed(int(b)) ^ mixed(i * 0x9E3779B9 % 2**32)) for i, b in enumerate(bits)) % 2**32
    state = {
        "w": w, "split": jax.device_put(w, shardings["w"]), "numpy": np.asarray(w), "half": w.astype(jnp.bfloat16),
        "four": w.astype(jnp.int4), "bool": w > 0, "complex": w + 1j, "key": jax.random.key(0), "number": 3.5,
    }  # fmt: skip
    found = describe(state)["fields"]
    assert found["w"] == {"shape": [16, 64], "dtype": "float32", "checksum": expected}
    assert found["split"] == found["numpy"] == found["w"]
    assert found["half"]["dtype"] == "bfloat16"
    assert found["key"]["dtype"] == "key<fry>"
    for key, other in (
        ("w", w.at[3, 5].add(1e-7)), ("w", jnp.roll(w, 1)), ("w", w.at[8:].set(0)), ("half", -state["half"]),
        ("four", state["four"].at[1, 1].set(7)), ("bool", ~state["bool"]), ("complex", w + 2j), ("number", 3.25),
        ("key", jax.random.key(1)),
    ):  # fmt: skip
        with pytest.raises(
            CheckpointError, match=rf"^{key} must have the checksum \d+ with which it was saved, got \d+"
        ):
            check(describe(state), state | {key: other})


# Damage.


@functools.cache
def small_run():
    tx = mo.sgd(0.1, 0.9, storage=BYTES)
    state = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    _, opt_state = jax.jit(tx.update)(gradients(0), state["opt_state"], PARAMS)
    return {"params": PARAMS, "opt_state": opt_state}


def child(script, *arguments):
    """The command and the environment of a script of this folder."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)}
    return [sys.executable, str(TESTS / script), *map(str, arguments)], env


def test_a_truncated_checkpoint_is_an_error_or_whole_and_never_another_state(tmp_path):
    command, env = child("damaged.py", tmp_path)
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert {row["outcome"] for row in found} == {"refused", "whole"}
    refused = {(row["folder"], row["how"]) for row in found if row["outcome"] == "refused"}
    # The data, its index, the tree and the description.
    for folder in ("d", "state", "layout"):
        assert {(folder, "half"), (folder, "gone")} <= refused


def test_what_orbax_accepts_silently_is_refused(tmp_path):
    state = small_run()
    path = saved(tmp_path / "ckpt", {"a": jnp.float32([1 / 3, 2.0])})
    target = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16)}
    with ocp.CheckpointManager(path) as manager:
        cast = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
    assert cast["a"].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match=r"^a must be bfloat16\[2\], got float32\[2\]"):
        restored(path, target)
    # The arrays of one step with the description of another.
    later = jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else x, state)
    path = saved(tmp_path / "other", state, describe(later))
    with pytest.raises(CheckpointError, match=r"^opt_state/2/step must have the checksum"):
        restored(path, jax.eval_shape(lambda: state))


# Migration.


def test_an_older_format_and_an_older_version_become_todays(monkeypatch):
    tx = mo.sgd(0.1, 0.9, storage=BYTES)
    state, target = small_run()["opt_state"], abstract(tx)
    assert_bit_equal(migrate(state, describe(state), target), state)
    # A format in which the step had another name, and a version in which codes came in a wider type.
    older = {
        k.replace("/step", "/count"): x.astype(jnp.int16) if x.dtype == jnp.int8 else x
        for k, x in fields(state).items()
    }
    layout = describe(older, version=2)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    seen = []

    def renamed(leaves):
        seen.append("format 1")
        return {k.replace("/count", "/step"): x for k, x in leaves.items()}

    def narrowed(leaves):
        seen.append("version 2")
        return {k: x.astype(jnp.int8) if "/codes/" in k and x.ndim else x for k, x in leaves.items()}

    def same(leaves):
        seen.append("version 3")
        return leaves

    with pytest.raises(CheckpointError, match=r"have format 2, got 1: migrate"):
        check(layout, target)
    with pytest.raises(CheckpointError, match=r"must hold a function from format 1, got \[\]"):
        migrate(older, layout, target)
    monkeypatch.setattr(checkpoint, "_UPGRADES", {1: renamed})
    new = migrate(older, layout, target, {1: same, 2: narrowed, 3: same})
    assert_bit_equal(new, state)
    assert seen == ["format 1", "version 2", "version 3"]
    with pytest.raises(CheckpointError, match=r"must hold a function from version 3, got \[2, 4\]"):
        migrate(older, layout, target, {2: narrowed, 4: same})
    with pytest.raises(CheckpointError, match=r"have version 1 or an older one, got 2"):
        migrate(older, layout, target, {0: same})
    with pytest.raises(CheckpointError, match=r"2/velocity/codes/0/b must be int8\[64\], got int16\[64\]"):
        migrate(older, layout, target, {2: same})
    with pytest.raises(TypeError, match=r"migration from version 2 must return a mapping from paths, got None"):
        migrate(older, layout, target, {2: lambda leaves: None})
    with pytest.raises(CheckpointError, match=r"^2/count must have the checksum"):
        migrate(older | {"2/count": older["2/count"] + 1}, layout, target, {2: narrowed})


def test_another_optimizer_and_another_storage_become_ours_on_a_mesh(tmp_path):
    byte = mo.storage.int8(min_size=512)
    theirs, ours, small = optax.sgd(0.1, 0.9), mo.sgd(0.1, 0.9), mo.sgd(0.1, 0.9, storage=byte)
    old = theirs.init(PARAMS)
    for t in range(3):
        _, old = theirs.update(gradients(t), old)
    path = saved(tmp_path / "ckpt", old)
    with ocp.CheckpointManager(path) as manager:
        layout = manager.restore(0, args=ocp.args.Composite(layout=ocp.args.JsonRestore())).layout
        # Without a target: lists and dictionaries in place of the tuples.
        plain = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state
    assert isinstance(plain, list)
    _, shardings = placed((2, 4))
    target = with_shardings(abstract(small), mo.sharding.state_shardings(small, PARAMS, shardings))

    to_bytes = jax.jit(lambda state: mo.convert(state, byte, like=abstract(small)))

    def from_optax(leaves):
        return fields(to_bytes(mo.interop.from_optax(ours.init(PARAMS), from_fields(leaves, abstract(theirs)))))

    with pytest.raises(CheckpointError, match=r"^0 must be a EmptyState, got a TraceState"):
        check(layout, target)
    state = migrate(plain, layout, target, {0: from_optax})
    assert_bit_equal(state, to_bytes(mo.interop.from_optax(ours.init(PARAMS), old)))
    assert state[2].velocity.codes[0]["w"].sharding.spec == P("data", "model")
    # Three steps of the heavy ball in NumPy, and a byte's error.
    v = np.zeros((16, 64))
    for t in range(3):
        v = 0.9 * v + np.asarray(gradients(t)["w"], np.float64)
    (got,) = mo.velocity(state)
    assert np.linalg.norm(got["w"] - v) < 0.03 * np.linalg.norm(v)


# Kill -9.


def run_and_kill(directory, steps, rng=None):
    """One life of the script: where it began, the last step that it told, and whether it was killed on its way."""
    command, env = child("resumable.py", directory, steps)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            begin = int(process.stdout.readline().split()[1])
            last, life = begin, None if rng is None else rng.randrange(1, 4 * resumable.EVERY)
            for line in process.stdout:
                last = int(line.split()[1])
                if life is not None and last >= begin + life:
                    # Anywhere in a step or in the writing of a checkpoint.
                    time.sleep(rng.uniform(0, 0.1))
                    break
        finally:
            if life is not None:
                process.send_signal(signal.SIGKILL)
            code = process.wait(60)
    assert code in (0, -signal.SIGKILL)
    return begin, last, code == -signal.SIGKILL


def check_kills(directory, kills, seed):
    rng = random.Random(seed)
    steps, hits, reached = 8 * resumable.EVERY * kills, 0, 0
    for _ in range(kills):
        begin, last, killed = run_and_kill(directory, steps, rng)
        assert killed, "the run ended before it was killed"
        # It goes on from a checkpoint that is no further back than the last but one of the life before.
        assert begin % resumable.EVERY == 0
        assert begin > reached - 2 * resumable.EVERY
        assert not begin == 0 < reached - 2 * resumable.EVERY
        hits, reached = hits + (begin < last < steps), last
    assert hits == kills, "every kill was in the middle of the run"
    begin, last, killed = run_and_kill(directory, reached + 3)
    assert not killed
    whole = fields(resumable.train(directory / "whole", reached + 3))
    with np.load(directory / "final.npz") as final:
        assert set(final.files) == set(whole)
        for path, x in whole.items():
            np.testing.assert_array_equal(final[path], np.asarray(x), err_msg=path)
    assert int(whole["opt_state/0/step"]) == reached + 3
    assert whole["opt_state/0/velocity/codes/0/w"].dtype == jnp.int8


def test_a_stopped_run_goes_on_from_its_last_checkpoint_bit_for_bit(tmp_path):
    told = []
    whole = resumable.train(tmp_path / "whole", 11)
    resumable.train(tmp_path / "twice", 7)
    assert_bit_equal(resumable.train(tmp_path / "twice", 11, told.append), whole)
    assert told[:2] == ["from 4", "step 5"]


# Twenty kills, in two runs, for two processes.
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_is_killed_ten_times_ends_bit_for_bit_as_one_that_is_not(seed, tmp_path):
    check_kills(tmp_path, 10, seed)
