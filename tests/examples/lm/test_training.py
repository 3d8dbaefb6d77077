"""Runs of a toy model: what they measure, that they can be interrupted, and that devices do not change them."""

import dataclasses
import json
import re

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tqdm")

import jax

import momentum_optax as mo
from examples.lm import data, model, training
from examples.lm.optimizers import BEHIND, OPTIMIZERS
from examples.lm.placement import place
from examples.lm.settings import MESHES, Settings

SMALL = Settings(config="toy", steps=12, batch_size=8, behind="ema_nesterov", average=2, storage="int8")


def programs(settings, devices=1):
    return training.programs(settings, place(settings, jax.devices()[:devices]))


def trained(settings, folder=None, devices=1):
    return training.train(settings, place(settings, jax.devices()[:devices]), folder, save_every=4)


def state_in(folder, settings):
    """The state of the last checkpoint."""
    target = programs(settings).target
    with training.Checkpoints(folder, settings) as saved:
        return saved.latest(target)


def assert_equal_bits(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


@pytest.mark.slow
def test_a_run_measures_its_losses_on_the_parts_of_the_text(toy, capsys):
    settings = SMALL._replace(behind="none", storage="float32", average=0, optimizer="sgd", learning_rate=0.3)
    history = trained(settings)
    params = model.init(toy, 0)
    first = data.batch_at(data.splits().train, 8, 8, 0, 0)
    np.testing.assert_allclose(history.loss[0], model.loss(params, first), rtol=1e-5)
    # Nothing is learned from the first step, whose rate is zero.
    windows = data.windows(data.splits().validation, 8)
    assert len(windows) % 8 != 0
    loss = jax.jit(model.loss)
    losses = [float(loss(params, window[None])) for window in windows]
    np.testing.assert_allclose(history.held_out[0]["weights"], np.mean(losses), rtol=1e-5)
    assert [row["step"] for row in history.held_out] == list(range(1, 13))
    assert [figures["step"] for figures in history.telemetry] == [0, 10]
    assert len(history.loss) == 12
    assert set(history.test) == {"weights"}
    assert history.test["weights"] < history.held_out[0]["weights"] - 0.1
    printed = capsys.readouterr().out
    assert f"training {history.loss[-1]:.4f}, held out: weights {history.held_out[-1]['weights']:.4f}" in printed


@pytest.mark.slow
@pytest.mark.parametrize("behind", BEHIND)
def test_the_points_of_a_rule_and_of_an_average_are_evaluated(toy, behind):
    settings = SMALL._replace(behind=behind, optimizer="sgd", rule="nesterov", storage="float32", steps=100)
    run = programs(settings)
    state = run.start()
    weights = [state["params"]]
    for step in range(7):
        tokens = data.batch_at(data.splits().train, 8, 8, step, 0)
        state, _ = run.step(jax.tree.map(lambda x: x.copy(), state), tokens)
        weights.append(state["params"])
    points = training.points(settings, state)
    decay = 0.5**0.5
    average = weights[0]
    for later in weights[1:]:
        average = jax.tree.map(lambda a, w: decay * a + (1 - decay) * w, average, later)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), points["average"], average)
    found = mo.eval_params(state["opt_state"], state["params"], path="0/inner/momentum")
    assert_equal_bits(points["behind"], found)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (found, state["params"])), strict=True))


@pytest.mark.slow
def test_a_run_that_is_interrupted_goes_on_bit_for_bit(toy, tmp_path, monkeypatch, capsys):
    whole = trained(SMALL, tmp_path / "whole")
    batch_at = data.batch_at

    def interrupted(tokens, batch, length, step, seed):
        if step == 10:
            raise KeyboardInterrupt
        return batch_at(tokens, batch, length, step, seed)

    monkeypatch.setattr(data, "batch_at", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(SMALL, tmp_path / "parts")
    monkeypatch.setattr(data, "batch_at", batch_at)
    resumed = trained(SMALL, tmp_path / "parts")
    assert "Resumed after step 8" in capsys.readouterr().out
    assert resumed == whole
    (steps, state, history), other = (state_in(tmp_path / name, SMALL) for name in ("parts", "whole"))
    assert steps == 12
    assert training.History(**history) == whole
    assert_equal_bits(state, other[1])
    # A run that has ended is shown again, without a step.
    monkeypatch.setattr(data, "batch_at", None)
    assert trained(SMALL, tmp_path / "parts") == whole


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_refused_by_the_name_of_the_option(toy, tmp_path):
    settings = SMALL._replace(steps=2, behind="none", average=0, storage="float32")
    trained(settings, tmp_path / "run")
    message = re.escape("--learning-rate must be that of the run in the folder, 0.001, got 0.5; or give --checkpoints")
    with pytest.raises(mo.checkpoint.CheckpointError, match=message):
        trained(settings._replace(learning_rate=0.5), tmp_path / "run")


def test_what_is_no_checkpoint_is_named_with_its_folder(tmp_path):
    (tmp_path / "run" / "7").mkdir(parents=True)
    message = rf"{tmp_path}/run/7 must be a whole checkpoint, got KeyError: .*; remove it, or give --checkpoints"
    with (
        training.Checkpoints(tmp_path / "run", SMALL) as saved,
        pytest.raises(mo.checkpoint.CheckpointError, match=message),
    ):
        saved.latest({})


@pytest.mark.slow
def test_a_checkpoint_with_damaged_numbers_is_refused(toy, tmp_path):
    settings = SMALL._replace(steps=1, behind="none", average=0, storage="float32")
    trained(settings, tmp_path / "run")
    (tmp_path / "run" / "1" / "run" / "metadata").write_text("{")
    with pytest.raises(mo.checkpoint.CheckpointError, match="run/1 must be a whole checkpoint, got JSONDecodeError"):
        trained(settings, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_devices_make_the_run_of_one(toy, optimizer):
    settings = SMALL._replace(steps=4, optimizer=optimizer, storage="float32")
    alone = trained(settings)
    for mesh in MESHES:
        history = trained(settings._replace(mesh=mesh), devices=2)
        np.testing.assert_allclose(history.loss, alone.loss, rtol=2e-4, err_msg=mesh)
        for name, value in history.test.items():
            assert value == pytest.approx(alone.test[name], rel=2e-4), (mesh, name)


@pytest.mark.slow
def test_a_mesh_says_what_each_device_has_a_share_of(toy):
    shares = {}
    for mesh in MESHES:
        run = programs(SMALL._replace(mesh=mesh, storage="float32"), devices=2)
        state = run.start()
        state, _ = run.step(state, data.batch_at(data.splits().train, 8, 8, 0, 0))
        shares[mesh] = [
            sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(part))
            / sum(map(np.size, jax.tree.leaves(part)))
            for part in (state["params"], state["opt_state"])
        ]
    assert shares["copies"] == [1, 1]
    assert shares["zero1"][0] == 1
    assert shares["zero1"][1] < 0.55
    assert max(shares["split"]) < 0.55


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run(toy):
    with pytest.raises(training.DivergedError, match=r"the loss is (nan|inf) at step"):
        trained(SMALL._replace(optimizer="sgd", learning_rate=1e9, behind="none", average=0, storage="float32"))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_step_of_gpt2_small_is_traced_on_eight_devices(optimizer):
    settings = Settings(config="gpt2-small", optimizer=optimizer, batch_size=8, storage="bfloat16")
    run = programs(settings, devices=8)
    assert sum(x.size for x in jax.tree.leaves(run.target["params"])) == 124_439_808
    on_a_device = sum(np.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(run.target["params"]))
    assert on_a_device < 124_439_808 / 8 * 1.1 + 50257 * 768
    state, value = jax.eval_shape(run.step, run.target, jax.ShapeDtypeStruct((8, 1025), np.uint8))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), run.target)
    assert value.shape == ()


def test_a_history_survives_json_bit_for_bit():
    history = training.History(
        [0.1, 1 / 3], [{"step": 1, "weights": 2 / 3}], [{"step": 0, "cosine": -1e-7}], {"a": 0.3}
    )
    assert training.History(**json.loads(json.dumps(dataclasses.asdict(history)))) == history
