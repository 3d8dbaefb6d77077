"""A single worker in this process, with a small network: it resumes to the same bits and evaluates what it trained."""

import shutil

import jax
import numpy as np
import pytest
import small_network

from examples.demo_distributed import checkpoint, launcher, strategies, training, worker
from examples.demo_distributed.job import START, Job


@pytest.fixture
def job(tmp_path, monkeypatch):
    settings = training.Settings(1, 4, 2, 8, 0.1, 0, "digits")
    shapes = jax.eval_shape(lambda: small_network.PARAMS)
    monkeypatch.setattr(training, "model", lambda settings: (shapes, small_network.apply))
    one = jax.devices()[:1]
    monkeypatch.setattr(strategies.jax, "devices", lambda: one)
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(24, 7, 1)).astype(np.float32), rng.integers(0, 9, size=24)
    np.savez(tmp_path / "data-0.npz", images=images, labels=labels)
    np.savez(tmp_path / "held-out.npz", images=images, labels=labels)
    checkpoint.save(tmp_path / START, small_network.PARAMS)
    return Job(settings, str(tmp_path), 0, 0, "local steps", "whole", None)


@pytest.mark.slow
def test_a_worker_goes_on_from_a_checkpoint_to_the_same_bits(job, tmp_path):
    whole = strategies.LocalSteps(job)
    ends = [whole.round(round_) for round_ in range(2)]
    # Weights that moved on are not yet in what was averaged before.
    half = whole.averaged()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    ends += [whole.round(round_) for round_ in range(2, 4)]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [f"round-00000{i}" for i in (2, 3, 4)]
    resumed = strategies.LocalSteps(job._replace(run="again", resume=2))
    jax.tree.map(np.testing.assert_array_equal, resumed.averaged(), half)
    found = [resumed.round(round_) for round_ in range(2, 4)]
    for a, b in zip(ends[2:], found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert launcher.compared(tmp_path, job.settings, "again") == []
    assert (ends[3]["w"] != ends[2]["w"]).any()
    averaged = whole.averaged()
    jax.tree.map(np.testing.assert_array_equal, resumed.averaged(), averaged)
    assert abs(averaged["w"] - ends[3]["w"]).max() > 1e-3
    for name, end in small_network.average(ends).items():
        np.testing.assert_allclose(averaged[name], end, rtol=0, atol=1e-4 * abs(ends[3][name]).max())
    assert (whole.cost.meetings, resumed.cost.meetings) == (4, 2)
    evaluated = worker.evaluator(tmp_path, small_network.apply)(ends[3])
    with np.load(tmp_path / "held-out.npz") as held_out:
        logits = held_out["images"].reshape(24, 7) @ ends[3]["w"] + ends[3]["b"]
        np.testing.assert_allclose(evaluated["accuracy"], (logits.argmax(1) == held_out["labels"]).mean(), rtol=1e-6)
        picked = logits[np.arange(24), held_out["labels"]]
    np.testing.assert_allclose(evaluated["loss"], (np.log(np.exp(logits).sum(1)) - picked).mean(), rtol=1e-5)
    with pytest.raises(checkpoint.CheckpointError, match=r"round-000001/worker-0.npz is missing"):
        strategies.LocalSteps(job._replace(resume=1))
