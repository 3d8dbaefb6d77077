"""The launcher: what it gives to workers, and how a run goes on after a loss."""

import pathlib

import numpy as np
import pytest

pytest.importorskip("sklearn")

from processes_alive import soon
from small_network import SETTINGS

from examples.demo.data import load_digits
from examples.demo_distributed import checkpoint, launcher
from examples.demo_distributed.processes import WorkerLost


def test_workers_find_their_own_images(tmp_path):
    data = load_digits(0)
    sizes = launcher.write_data(data, SETTINGS, tmp_path)
    found = [np.load(tmp_path / f"data-{i}.npz") for i in range(4)]
    assert [len(x["images"]) for x in found] == sizes
    np.testing.assert_array_equal(np.concatenate([x["images"] for x in found]), data.images)
    np.testing.assert_array_equal(np.concatenate([x["labels"] for x in found]), data.labels)
    np.testing.assert_array_equal(np.load(tmp_path / "held-out.npz")["images"], data.test_images)


class Losing:
    """In the place of `Processes`: loses a worker in each of some rounds, and writes checkpoints."""

    begun, lose_at, write_round = [], [], None

    def __init__(self, jobs):
        self.job, self.killed = jobs[0], []
        Losing.begun.append(self.job.resume)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def kill(self, number):
        self.killed.append(number)

    def reports(self, deadline):
        root = pathlib.Path(self.job.folder)
        for round_ in range((self.job.resume or 0) + 1, 7):
            if self.killed or round_ in Losing.lose_at:
                Losing.lose_at = [r for r in Losing.lose_at if r != round_]
                (root / "log").write_text("")
                raise WorkerLost((self.killed or [0])[0], -9, root / "log")
            Losing.write_round(root / self.job.run, round_, 4)
            for number in range(4):
                yield number, {"round": round_}


@pytest.fixture
def running(tmp_path, monkeypatch, write_round):
    monkeypatch.setattr(launcher, "Processes", Losing)
    Losing.begun, Losing.lose_at, Losing.write_round = [], [], write_round
    said = []
    found = launcher.Launcher(SETTINGS._replace(rounds=6), tmp_path, soon(), said.append, lambda *report: None)
    found.said = said
    return found


def test_a_run_goes_on_from_its_last_checkpoint(running):
    result = running.run("local steps", "run", victim=3, restarts=1)
    assert Losing.begun == [None, 3]
    assert running.losses == 1
    assert sorted(result.reports) == list(range(1, 7))
    assert running.said == ["  worker 3 was ended by SIGKILL; all go on from the checkpoint of round 3."]


def test_a_run_is_given_up_after_some_losses_and_at_once_where_it_may_not_go_on(running):
    Losing.lose_at = [2, 4, 5]
    with pytest.raises(WorkerLost):
        running.run("local steps", "run", restarts=2)
    assert Losing.begun == [None, 1, 3]
    Losing.lose_at = [2]
    with pytest.raises(WorkerLost):
        running.run("local steps", "other")


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken_and_never_the_start(running, write_round):
    root = running.folder / "run"
    write_round(root, 1, 4)
    write_round(root, 2, 4)
    (root / "round-000002" / "common.npz").write_bytes(b"")
    lost = WorkerLost(0, -9, root / "round-000002" / "common.npz")
    assert running._last_checkpoint("run", lost) == 1
    assert running.said[0].startswith("  Not complete: round-000002/common.npz is damaged")
    assert not (root / "round-000002").exists()
    (root / "round-000001" / "common.npz").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no round is complete"):
        running._last_checkpoint("run", lost)
