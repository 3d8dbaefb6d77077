"""Restored runs continue bit for bit, on any mesh; damaged checkpoints are refused; killed runs resume."""

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
import orbax.checkpoint as ocp
import pytest
from conformance import assert_bit_equal
from jax.sharding import AxisType, NamedSharding
from state.checkpoint import resumable
from state.checkpoint.orbax_runs import (
    BYTES,
    OPTIMIZERS,
    PARAMS,
    P,
    abstract,
    every_optimizer,
    go_on,
    gradients,
    placed,
    restored,
    saved,
    small_run,
    with_shardings,
)

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, describe, fields

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[2]


@pytest.mark.slow
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
    # The residuals of the two workers differ; anchor and momentum are common.
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


def child(script, *arguments):
    """The command and the environment of a script of this folder."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    return [sys.executable, str(HERE / script), *map(str, arguments)], env


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
