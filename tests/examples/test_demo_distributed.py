"""The demo of many processes: what goes where, what is sent, what a kill costs, and that nobody stays behind."""

import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from examples import demo
from examples.demo_distributed import __main__ as main
from examples.demo_distributed import checkpoint, crew, traffic, training, worker

SETTINGS = training.Settings(4, 3, 5, 8, 0.1, 0, "digits")


# What goes where.


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_shards_are_disjoint_and_complete(workers):
    images, labels = np.arange(10), np.arange(10) % 3
    found = training.shards(images, labels, workers)
    assert len(found) == workers
    assert sorted(np.concatenate([x for x, _ in found])) == list(range(10))
    assert max(len(x) for x, _ in found) - min(len(x) for x, _ in found) <= 1
    for x, y in found:
        np.testing.assert_array_equal(y, x % 3)


def test_a_worker_takes_every_image_before_it_takes_one_again():
    rows = training.order(SETTINGS, 1, 30)
    assert rows.shape == (3, 5, 8)
    flat = rows.reshape(-1)
    for epoch in (flat[:30], flat[30:60], flat[60:90], flat[90:120]):
        assert sorted(epoch) == list(range(30))
    np.testing.assert_array_equal(rows, training.order(SETTINGS, 1, 30))
    assert (rows != training.order(SETTINGS, 2, 30)).any()
    assert (rows != training.order(SETTINGS._replace(seed=1), 1, 30)).any()


def test_workers_find_their_own_images(tmp_path):
    data = demo.load_digits(0)
    sizes = main.write_data(data, SETTINGS, tmp_path)
    found = [np.load(tmp_path / f"data-{i}.npz") for i in range(4)]
    assert [len(x["images"]) for x in found] == sizes
    np.testing.assert_array_equal(np.concatenate([x["images"] for x in found]), data.images)
    np.testing.assert_array_equal(np.concatenate([x["labels"] for x in found]), data.labels)
    np.testing.assert_array_equal(np.load(tmp_path / "held-out.npz")["images"], data.test_images)


# What is sent.

# A matrix of 7 rows and a vector, 7 x 9 + 9 = 72 numbers.
SMALL = {"b": jnp.zeros(9), "w": jnp.zeros((7, 9))}


def small_apply(params, images):
    return images.reshape(len(images), -1) @ params["w"] + params["b"]


def small_start():
    """Parameters, inner and outer state, images, labels; with an axis of workers where each has its own."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype) * 0.1, SMALL)
    each = functools.partial(jax.tree.map, lambda x: jnp.stack([x] * 4))
    outer = training.outer().init(params)
    images = rng.normal(size=(4, 5, 8, 7, 1)).astype(np.float32)
    labels = rng.integers(0, 9, size=(4, 5, 8))
    inner = training.inner(SETTINGS).init(params)
    return params, inner, each(params), each(inner), outer._replace(residual=each(outer.residual)), images, labels


@functools.cache
def small_programs():
    """The three programs, compiled for four devices."""
    mesh = Mesh(np.asarray(jax.devices()[:4]), (training.AXIS,))
    local, meet, step = training.programs(mesh, SETTINGS, small_apply)
    params, inner, each_params, each_inner, outer, images, labels = small_start()

    return training.Programs(
        local.lower(each_params, each_inner, images, labels).compile(),
        meet.lower(each_params, outer).compile(),
        step.lower(params, inner, images[:, 0], labels[:, 0]).compile(),
    )


def test_bytes_that_are_planned_are_a_hand_count():
    # 4 workers: 2 x 3/4 of 72 float32; and to 3 others 72 bytes, with a float32 for each of 7 rows and the vector.
    assert traffic.gradient_bytes(SMALL, 4) == 2 * 3 / 4 * 72 * 4
    assert traffic.exchange_bytes(SMALL, 4) == 3 * (72 + 4 * 8)
    params, _ = training.model(SETTINGS._replace(data="mnist"))
    assert traffic.gradient_bytes(params, 4) == 6 * 105_866
    assert traffic.exchange_bytes(params, 4) == 3 * (105_866 + 4 * (3 + 3 + 1568 + 64 + 4))


def test_bytes_of_the_compiled_programs_are_those_planned():
    found = {name: traffic.collectives(run.as_text()) for name, run in small_programs()._asdict().items()}
    assert found["local"] == [], "nothing is sent between meetings"
    assert {one.kind for one in found["step"]} == {"all-reduce"}
    assert {one.kind for one in found["meet"]} == {"all-gather", "all-reduce"}
    bytes_of = {name: sum(traffic.sent(one, 4) for one in every) for name, every in found.items()}
    assert bytes_of["step"] == traffic.gradient_bytes(SMALL, 4)
    # What each worker counts for: a number for each of two leaves from each, and two sums.
    assert 0 < bytes_of["meet"] - traffic.exchange_bytes(SMALL, 4) <= 2 * 4 * 3 + 2 * 6


def test_collectives_are_read_from_the_text_of_a_program():
    text = """
      %a = f32[72]{0} all-reduce(%x), channel_id=1
      ROOT %b = (s8[4,7,9]{2,1,0}, f32[4]{0}) all-gather(%y, %z), dimensions={0}
      %c = bf16[] reduce-scatter(%all-gather), metadata={op_name="all-reduce(x)"}
      %d = f32[9]{0} fusion(%all-reduce.1)
    """
    found = traffic.collectives(text)
    assert found == [("all-reduce", 288), ("all-gather", 252 + 16), ("reduce-scatter", 2)]
    assert [traffic.sent(one, 4) for one in found] == [432, 201, 6]
    with pytest.raises(ValueError, match="must be synchronous to be counted, got all-reduce-start"):
        traffic.collectives("%a = f32[72]{0} all-reduce-start(%x)")
    with pytest.raises(ValueError, match=r"types must be one of .*, got f4e2m1"):
        traffic.collectives("%a = f4e2m1[72]{0} all-reduce(%x)")
    with pytest.raises(ValueError, match=r"kind must be one of 'all-reduce', .*, got 'collective-permute'"):
        traffic.sent(traffic.Collective("collective-permute", 8), 4)


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="only Linux counts")
def test_the_kernel_counts_what_is_written(tmp_path):
    before = traffic.written_by_this_process()
    (tmp_path / "x").write_bytes(b"0" * 123_456)
    assert traffic.written_by_this_process() - before == 123_456


def test_the_page_states_the_bytes_that_are_planned():
    params, _ = training.model(SETTINGS._replace(data="mnist"))
    every, rarely = 500 * traffic.gradient_bytes(params, 4) / 1e6, 25 * traffic.exchange_bytes(params, 4) / 1e6
    root = pathlib.Path(main.__file__).parents[2]
    page = (root / "docs" / "distributed.md").read_text()
    assert re.search(rf"from the arrays' sizes +{every:.3f} +{rarely:.3f} +{every / rarely:.1f}$", page, re.M)


# What is computed: against NumPy in float64, written from the methods' own forms.


def rate(step, peak=0.1, total=15):
    """No warm-up to speak of: one step; then half a cosine to zero at `total` + 1."""
    return 0.0 if step == 0 else peak * 0.5 * (1 + np.cos(np.pi * (step - 1) / (total + 1 - 1)))


def numpy_gradient(params, images, labels):
    x = images.reshape(len(images), -1).astype(np.float64)
    logits = x @ params["w"] + params["b"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p[np.arange(len(labels)), labels] -= 1
    return {"b": p.mean(0), "w": x.T @ p / len(x)}


def numpy_steps(params, gradients_at):
    params = {k: np.asarray(p, np.float64) for k, p in params.items()}
    velocity = {k: np.zeros_like(p) for k, p in params.items()}
    for step, gradient_at in enumerate(gradients_at):
        g = gradient_at(params)
        clip = min(1.0, 1 / np.sqrt(sum((x**2).sum() for x in g.values())))
        for k in params:
            velocity[k] = 0.9 * velocity[k] + clip * g[k]
            params[k] = params[k] - rate(step) * (clip * g[k] + 0.9 * velocity[k])
    return params


def test_a_step_on_all_devices_is_one_on_all_images():
    programs = small_programs()
    params, inner, *_, images, labels = small_start()
    expected = numpy_steps(
        params,
        [
            functools.partial(numpy_gradient, images=images[:, t].reshape(32, 7), labels=labels[:, t].reshape(-1))
            for t in range(5)
        ],
    )
    params, inner = jax.tree.map(jnp.copy, (params, inner))
    for t in range(5):
        params, inner = programs.step(params, inner, images[:, t], labels[:, t])
    for k, found in params.items():
        np.testing.assert_allclose(found, expected[k], rtol=2e-5, atol=2e-6)


def test_a_round_is_steps_alone_and_a_meeting():
    programs = small_programs()
    params, _, each_params, each_inner, outer, images, labels = small_start()
    ends = [
        numpy_steps(params, [functools.partial(numpy_gradient, images=x, labels=y) for x, y in zip(*own, strict=True)])
        for own in zip(images, labels, strict=True)
    ]
    each_params, _ = programs.local(each_params, each_inner, images, labels)
    for k, found in each_params.items():
        np.testing.assert_allclose(found, [end[k] for end in ends], rtol=2e-5, atol=2e-6)
    each_params, outer = programs.meet(each_params, outer)
    for k, found in outer.anchor.items():
        gone = np.asarray(params[k], np.float64) - np.stack([end[k] for end in ends])
        # The first meeting of Nesterov's method at decay 0.9; a worker's numbers are off by half a code at most.
        expected = params[k] - 0.7 * 1.9 * gone.mean(0)
        code = abs(gone).reshape(4, -1, 9).max((0, 2)).reshape(-1, 1) / 127
        assert (abs(found - expected) <= 0.7 * 1.9 * code.reshape(-1, *(1,) * (found.ndim - 1)) / 2 + 5e-6).all()
        for own in each_params[k]:
            np.testing.assert_array_equal(own, found)


# What a worker does: here a single one, in this process, with the small model.


@pytest.fixture
def job(tmp_path, monkeypatch):
    settings = training.Settings(1, 4, 2, 8, 0.1, 0, "digits")
    shapes = jax.eval_shape(lambda: SMALL)
    monkeypatch.setattr(training, "model", lambda settings: (shapes, small_apply))
    one = jax.devices()[:1]
    monkeypatch.setattr(worker.jax, "devices", lambda: one)
    rng = np.random.default_rng(1)
    images, labels = rng.normal(size=(24, 7, 1)).astype(np.float32), rng.integers(0, 9, size=24)
    np.savez(tmp_path / "data-0.npz", images=images, labels=labels)
    np.savez(tmp_path / "held-out.npz", images=images, labels=labels)
    checkpoint.save(tmp_path / worker.START, SMALL)
    return worker.Job(settings, str(tmp_path), 0, 0, "rarely", "whole", None)


def test_a_worker_goes_on_from_a_checkpoint_to_the_same_bits(job, tmp_path):
    whole = worker.Rarely(job)
    ends = [whole.round(round_) for round_ in range(2)]
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    ends += [whole.round(round_) for round_ in range(2, 4)]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [f"round-00000{i}" for i in (2, 3, 4)]
    resumed = worker.Rarely(job._replace(run="again", resume=2))
    found = [resumed.round(round_) for round_ in range(2, 4)]
    for a, b in zip(ends[2:], found, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)
    assert main.compared(tmp_path, job.settings, "again") == []
    assert (ends[3]["w"] != ends[2]["w"]).any()
    assert (whole.cost.meetings, resumed.cost.meetings) == (4, 2)
    judged = worker.judge(tmp_path, small_apply)(ends[3])
    with np.load(tmp_path / "held-out.npz") as held_out:
        logits = held_out["images"].reshape(24, 7) @ ends[3]["w"] + ends[3]["b"]
        np.testing.assert_allclose(judged["accuracy"], (logits.argmax(1) == held_out["labels"]).mean(), rtol=1e-6)
        picked = logits[np.arange(24), held_out["labels"]]
    np.testing.assert_allclose(judged["loss"], (np.log(np.exp(logits).sum(1)) - picked).mean(), rtol=1e-5)
    with pytest.raises(checkpoint.CheckpointError, match=r"round-000001/worker-0.npz is missing"):
        worker.Rarely(job._replace(resume=1))


# Checkpoints.

TREE = {
    "codes": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "count": np.asarray(7, np.int32),
    "odd": np.asarray([np.nan, -0.0, np.inf], np.float32),
    "stamp": np.asarray([2**32 - 1], np.uint32),
}


def write_round(root, round_, workers=2):
    for name in (checkpoint.COMMON, *map(checkpoint.file_of, range(workers))):
        checkpoint.save(checkpoint.folder_of(root, round_) / name, TREE)


def test_a_tree_comes_back_bit_for_bit(tmp_path):
    checkpoint.save(tmp_path / "a" / "x.npz", TREE)
    found = checkpoint.load(tmp_path / "a" / "x.npz", TREE)
    assert found.keys() == TREE.keys()
    for name, value in TREE.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.npz"]


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    checkpoint.save(path, {"a": np.zeros(3)})
    before = path.read_bytes()

    def fail(number):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"a": np.ones(3)})
    assert path.read_bytes() == before


def test_a_file_is_replaced_and_not_written_over(tmp_path):
    path = tmp_path / "x.npz"
    checkpoint.save(path, {"a": np.zeros(3)})
    before = path.read_bytes()
    # Whoever has the old file open, as a crash would leave the disk, has all of it still.
    with path.open("rb") as file:
        checkpoint.save(path, {"a": np.ones(30)})
        assert file.read() == before
    np.testing.assert_array_equal(checkpoint.load(path, {"a": np.ones(30)})["a"], 1)


@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "a bit", "no archive"])
def test_a_damaged_file_is_an_error_and_its_round_is_passed_over(damage, tmp_path):
    write_round(tmp_path, 1)
    write_round(tmp_path, 2)
    path = checkpoint.folder_of(tmp_path, 2) / checkpoint.file_of(1)
    text = path.read_bytes()
    at = text.index(TREE["codes"].tobytes())
    damaged = {
        "empty": b"",
        "half": text[: len(text) // 2],
        "last byte": text[:-1],
        "a bit": text[:at] + bytes([text[at] ^ 4]) + text[at + 1 :],
        "no archive": b"nonsense",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(checkpoint.CheckpointError, match=r"worker-1.npz is damaged"):
        checkpoint.load(path, TREE)
    round_, problems = checkpoint.latest(tmp_path, 2)
    assert round_ == 1
    assert len(problems) == 1
    assert "round-000002/worker-1.npz is damaged" in problems[0]


def test_every_flipped_byte_of_a_file_is_found(tmp_path):
    path = tmp_path / "x.npz"
    checkpoint.save(path, TREE)
    text = path.read_bytes()
    with np.load(path) as arrays:  # still an archive that others read
        np.testing.assert_array_equal(arrays["['codes']"], TREE["codes"])
    for at in range(len(text)):
        for damaged in (text[at] ^ 1, text[at] ^ 0x80, 255 - text[at]):
            path.write_bytes(text[:at] + bytes([damaged]) + text[at + 1 :])
            with pytest.raises(checkpoint.CheckpointError, match=r"x\.npz is damaged"):
                checkpoint.load(path, TREE)
    for wrong in (text + b"\0", b"\0" + text, text[1:], text[:-1], text * 2, text[:16], text[:15], b""):
        path.write_bytes(wrong)
        with pytest.raises(checkpoint.CheckpointError, match=r"x\.npz is damaged"):
            checkpoint.load(path, TREE)


def test_a_file_and_its_names_are_on_disk_before_save_returns(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, pathlib.Path.replace

    def recorded(handle):
        done.append(pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).relative_to(tmp_path))
        fsync(handle)

    def renamed(path, other):
        done.append("renamed")
        return replace(path, other)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(pathlib.Path, "replace", renamed)
    checkpoint.save(tmp_path / "run" / "round-000001" / "x.npz", TREE)
    here = pathlib.Path("run/round-000001")
    assert done == [pathlib.Path("."), pathlib.Path("run"), here / "x.draft", "renamed", here]


def test_what_lies_beside_the_rounds_is_left_alone(tmp_path):
    write_round(tmp_path, 1)
    write_round(tmp_path, 1_000_000)
    others = ["round-old", "round-000002-copy", "round-2", "round-", "rounds", "round-00000²", "round--00001"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / "round-000003").write_text("a file")
    assert checkpoint.latest(tmp_path, 2) == (1_000_000, [])
    checkpoint.keep_only(tmp_path, 5, 5)
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted([*others, "round-000003"])
    assert checkpoint.latest(tmp_path, 2) == (None, [])


def test_the_latest_complete_round_is_found(tmp_path):
    assert checkpoint.latest(tmp_path / "nothing yet", 2) == (None, [])
    for round_ in (9, 10, 11):
        write_round(tmp_path, round_)
    assert checkpoint.latest(tmp_path, 2) == (11, [])
    (checkpoint.folder_of(tmp_path, 11) / checkpoint.COMMON).unlink()
    assert checkpoint.latest(tmp_path, 2)[0] == 10
    with pytest.raises(checkpoint.CheckpointError, match=r"no round is complete: .*worker-2.npz is missing"):
        checkpoint.latest(tmp_path, 3)


def test_rounds_out_of_date_and_undone_are_removed(tmp_path):
    for round_ in range(1, 8):
        write_round(tmp_path, round_)
    checkpoint.keep_only(tmp_path, 3, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-00000{i}" for i in (3, 4, 5)]


def test_a_checkpoint_of_something_else_is_an_error(tmp_path):
    path = tmp_path / "x.npz"
    checkpoint.save(path, TREE)
    with pytest.raises(checkpoint.CheckpointError, match=r"another tree.*\['odd'\]"):
        checkpoint.load(path, {k: v for k, v in TREE.items() if k != "odd"})
    with pytest.raises(checkpoint.CheckpointError, match=r"must hold .*\(4, 3\).* at \['codes'\], got .*\(3, 4\)"):
        checkpoint.load(path, {**TREE, "codes": TREE["codes"].reshape(4, 3)})
    with pytest.raises(checkpoint.CheckpointError, match=r"float32.* at \['count'\], got .*int32"):
        checkpoint.load(path, {**TREE, "count": np.asarray(7, np.float32)})


def test_differences_are_those_of_bits(tmp_path):
    for name in ("one", "other"):
        checkpoint.save(tmp_path / name / "x.npz", TREE)
    assert checkpoint.differences(tmp_path / "one", tmp_path / "other") == []
    checkpoint.save(tmp_path / "other" / "x.npz", {**TREE, "odd": abs(TREE["odd"])})
    assert checkpoint.differences(tmp_path / "one", tmp_path / "other") == ["x.npz: ['odd']"]
    checkpoint.save(tmp_path / "other" / "y.npz", TREE)
    with pytest.raises(checkpoint.CheckpointError, match="must hold the same files"):
        checkpoint.differences(tmp_path / "one", tmp_path / "other")


# Processes. Most of these run a few lines of Python in the place of a worker.


def alive(mark):
    """Processes that have `mark` in their command line."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(mark) in text and path.parent.name != str(os.getpid()):
            found.append(text)
    return found


def gone(mark, seconds=20.0):
    """Whether no process with `mark` is left after a while."""
    until = time.monotonic() + seconds
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(mark)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A function from scripts to a crew that runs them."""

    def start(job, log):
        code = f"import json, os, subprocess, sys, time  # {tmp_path}\n{job.way}"
        with log.open("wb") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)

    monkeypatch.setattr(crew, "_start", start)
    return lambda *codes: crew.Crew(
        [worker.Job((), str(tmp_path), i, 0, code, "", None) for i, code in enumerate(codes)]
    )


def soon(seconds=20.0):
    return time.monotonic() + seconds


def test_reports_of_all_workers_arrive_and_nobody_is_left(scripts, tmp_path):
    say = "print(json.dumps({'round': %d}), flush=True);" * 2
    with scripts(say % (1, 2), say % (3, 4)) as team:
        found = sorted((number, report["round"]) for number, report in team.reports(soon()))
    assert found == [(0, 1), (0, 2), (1, 3), (1, 4)]
    assert alive(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("print('why', file=sys.stderr); sys.exit(3)", "failed with exit status 3"),
        ("os.abort()", "was ended by SIGABRT"),
    ],
)
def test_a_lost_worker_is_named_and_the_others_are_ended_with_what_they_started(code, how, scripts, tmp_path):
    hang = f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # {tmp_path}']); time.sleep(600)"
    with pytest.raises(crew.WorkerLost, match=f"worker 1 {how}") as lost, scripts(hang, code) as team:
        list(team.reports(soon()))
    assert lost.value.number == 1
    assert ("why" in lost.value.log) == ("why" in code)
    assert gone(tmp_path)


def test_the_worker_that_was_killed_is_the_reason_and_not_one_that_missed_it(scripts):
    with scripts("sys.exit(3)", "time.sleep(600)") as team:
        team.kill(1)
        for process in team._processes:
            process.wait(20)
        team.kill(1)
        with pytest.raises(crew.WorkerLost, match="worker 1 was ended by SIGKILL"):
            list(team.reports(soon()))


def test_a_worker_that_hangs_is_ended_at_the_deadline(scripts, tmp_path):
    closed = "os.close(1); time.sleep(600)"
    for code, message in (
        ("time.sleep(600)", "longer than --timeout allows"),
        (closed, "worker 0 did not end in time"),
    ):
        with pytest.raises(TimeoutError, match=message), scripts(code) as team:
            list(team.reports(soon(1)))
    assert gone(tmp_path)


def test_workers_are_ended_when_the_launcher_is_interrupted(scripts, tmp_path):
    def interrupted():
        with scripts("print('here', flush=True); time.sleep(600)", "time.sleep(600)") as team:
            assert team._processes[0].stdout.readline() == b"here\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(tmp_path)


def test_a_worker_that_cannot_start_leaves_no_other(scripts, tmp_path, monkeypatch):
    start = crew._start
    monkeypatch.setattr(crew, "_start", lambda job, log: start(job, log) if job.worker == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError), scripts("time.sleep(600)", ""):
        pass
    assert gone(tmp_path)


class Losing:
    """Instead of a crew: loses a worker in each of some rounds, and writes checkpoints."""

    begun, lose_at = [], []

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
                raise crew.WorkerLost((self.killed or [0])[0], -9, root / "log")
            write_round(root / self.job.run, round_, 4)
            for number in range(4):
                yield number, {"round": round_}


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(main, "Crew", Losing)
    Losing.begun, Losing.lose_at = [], []
    said = []
    found = main.Launcher(SETTINGS._replace(rounds=6), tmp_path, soon(), said.append, lambda *report: None)
    found.said = said
    return found


def test_a_run_goes_on_from_its_last_checkpoint(launcher):
    result = launcher.run("rarely", "run", victim=3, restarts=1)
    assert Losing.begun == [None, 3]
    assert launcher.losses == 1
    assert sorted(result.reports) == list(range(1, 7))
    assert launcher.said == ["  worker 3 was ended by SIGKILL; all go on from the checkpoint of round 3."]


def test_a_run_is_given_up_after_some_losses_and_at_once_where_it_may_not_go_on(launcher):
    Losing.lose_at = [2, 4, 5]
    with pytest.raises(crew.WorkerLost):
        launcher.run("rarely", "run", restarts=2)
    assert Losing.begun == [None, 1, 3]
    Losing.lose_at = [2]
    with pytest.raises(crew.WorkerLost):
        launcher.run("rarely", "other")


def test_a_damaged_checkpoint_is_said_and_the_one_before_taken_and_never_the_start(launcher):
    root = launcher.folder / "run"
    write_round(root, 1, 4)
    write_round(root, 2, 4)
    (root / "round-000002" / "common.npz").write_bytes(b"")
    lost = crew.WorkerLost(0, -9, root / "round-000002" / "common.npz")
    assert launcher._last_checkpoint("run", lost) == 1
    assert launcher.said[0].startswith("  Not complete: round-000002/common.npz is damaged")
    assert not (root / "round-000002").exists()
    (root / "round-000001" / "common.npz").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="no round is complete"):
        launcher._last_checkpoint("run", lost)


# The command.


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--workers", "1"),
        ("--workers", "two"),
        ("--rounds", "1"),
        ("--inner-steps", "0"),
        ("--batch-size", "400"),
        ("--learning-rate", "nan"),
        ("--seed", "-1"),
        ("--timeout", "0"),
        ("--data", "cifar"),
        ("--output", "no/such/directory/a.png"),
    ],
)
def test_a_wrong_option_is_named_with_its_value_before_anything_is_trained(option, value, capsys, monkeypatch):
    monkeypatch.setattr(main, "_demo", None)
    with pytest.raises(SystemExit) as stop:
        main.main(["--data", "digits", f"{option}={value}"])
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {option}: " in message
    assert value in message


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (checkpoint.CheckpointError("x is damaged"), 1, "x is damaged"),
        (TimeoutError("too long"), 1, "too long"),
        (KeyboardInterrupt(), 130, "Interrupted"),
    ],
    ids=["checkpoint", "timeout", "interrupt"],
)
def test_what_goes_wrong_is_said_and_is_the_exit_status(error, status, message, capsys, monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(main, "_demo", fail)
    handler = signal.getsignal(signal.SIGTERM)
    assert main.main(["--data", "digits"]) == status
    assert message in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_missing_package_is_one_line_that_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    assert main.main([]) == 1
    assert "pip install 'momentum-optax[demo]'" in capsys.readouterr().err


def report(round_, **changes):
    values = {"meetings": round_, "collectives": round_, "planned": 2e6, "compiled": 2e6 * round_, "measured": 2.5e6}
    return {"round": round_, "seconds": 1.0, "accuracy": 0.5, "loss": 1.0, **values, **changes}


def test_the_table_and_the_picture_show_what_was_reported(tmp_path):
    every = main.Result({1: report(1), 2: report(2, planned=8e6, accuracy=0.75)})
    rarely = main.Result({1: report(1), 2: report(2, accuracy=0.625, measured=float("nan"))})
    text = main.table(every, rarely)
    assert re.search(r"arrays' sizes +8\.000 +2\.000 +4\.0$", text, re.M)
    assert re.search(r"held-out accuracy +75\.0% +62\.5%", text)
    assert "kernel" in text
    nobody = main.Result({1: report(1, measured=float("nan"))})
    assert "kernel" not in main.table(nobody, nobody)
    main.plot(every, rarely, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_came_of_the_kill_is_said(capsys):
    assert main._survived(1, [])
    assert "bit for bit" in capsys.readouterr().out
    assert not main._survived(1, ["worker-1.npz: ['w']"])
    assert re.search(r"FAILED: not what .*\n +worker-1.npz: \['w'\]", capsys.readouterr().out)
    assert not main._survived(0, [])
    assert "FAILED: the run was over before" in capsys.readouterr().out


# The whole, with real workers.


def command(tmp_path, *options):
    return [sys.executable, "-m", "examples.demo_distributed", "--output", str(tmp_path / "x.png"), *options]


def environment(tmp_path):
    # Data, checkpoints and the workers' command lines have this path in them.
    return {**os.environ, "TMPDIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}


SHORT = ("--data", "digits", "--workers", "2", "--rounds", "6", "--inner-steps", "4", "--timeout", "240")


@pytest.mark.slow
def test_two_processes_survive_a_kill_and_leave_nothing_behind(tmp_path):
    done = subprocess.run(
        command(tmp_path, *SHORT), check=False, env=environment(tmp_path), capture_output=True, timeout=300
    )
    printed = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert "worker 1 was ended by SIGKILL; all go on from the checkpoint of round" in printed
    assert "bit for bit" in printed
    assert alive(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.fixture
def interruptible():
    """Programs started by this test heed SIGINT, also where this process ignores it, as one in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_workers_end_with_their_launcher_however_it_ends(number, tmp_path):
    with subprocess.Popen(
        command(tmp_path, *SHORT, "--rounds", "1000"),
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        seen = b""
        while b"accuracy=" not in seen:
            text = os.read(process.stderr.fileno(), 1 << 12)
            assert text, seen
            seen += text
        assert len(alive(tmp_path)) == 3
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert gone(tmp_path)
    assert (b"Interrupted; all workers are ended." in errors) == (number == signal.SIGINT)
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "other"])
def test_any_worker_may_be_killed(victim, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(main.__file__).parents[2]))
    settings = training.Settings(2, 6, 4, 8, 0.05, 3, "digits")
    main.write_data(demo.load_digits(3), settings, tmp_path)
    checkpoint.save(tmp_path / worker.START, training.start(settings))
    said = []
    launcher = main.Launcher(settings, tmp_path, soon(240), said.append, lambda *report: None)
    whole = launcher.run("rarely", "whole")
    interrupted = launcher.run("rarely", "interrupted", victim=victim, restarts=1)
    assert re.match(rf"  worker {victim} was ended by SIGKILL; all go on from the checkpoint of round [34]", said[0])
    assert main.compared(tmp_path, settings) == []
    assert interrupted.column("accuracy") == whole.column("accuracy")
    assert gone(tmp_path)


@pytest.mark.slow
def test_the_default_run_shows_what_the_readme_says(tmp_path):
    pytest.importorskip("mlxtend")
    done = subprocess.run(command(tmp_path), check=False, env=environment(tmp_path), capture_output=True, timeout=650)
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode()
    print(printed)  # shown where the test fails
    assert "bit for bit" in printed
    assert alive(tmp_path) == []
    accuracies = [float(x) for x in re.search(r"held-out accuracy +([\d.]+)% +([\d.]+)%", printed).groups()]
    assert min(accuracies) > 94
    sent = [[float(x) for x in pair] for pair in re.findall(r"MB sent, .*? ([\d.]+) +([\d.]+) +[\d.]+$", printed, re.M)]
    assert sent[0] == [317.598, 8.433]
    assert sent[1] == sent[0]
    for pair in sent[2:]:
        np.testing.assert_allclose(pair, sent[0], rtol=0.1)
