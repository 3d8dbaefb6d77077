"""The command line of the distributed demo: wrong options, errors, and whole runs with real workers."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from processes_alive import alive, gone, soon

from examples.demo.data import load_digits
from examples.demo_distributed import __main__ as main
from examples.demo_distributed import checkpoint, launcher, training
from examples.demo_distributed.job import START


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
    launcher.write_data(load_digits(3), settings, tmp_path)
    checkpoint.save(tmp_path / START, training.start(settings))
    said = []
    running = launcher.Launcher(settings, tmp_path, soon(240), said.append, lambda *report: None)
    whole = running.run("local steps", "whole")
    interrupted = running.run("local steps", "interrupted", victim=victim, restarts=1)
    assert re.match(rf"  worker {victim} was ended by SIGKILL; all go on from the checkpoint of round [34]", said[0])
    assert launcher.compared(tmp_path, settings) == []
    assert interrupted.column("accuracy") == whole.column("accuracy")
    assert gone(tmp_path)


@pytest.mark.slow
def test_the_default_run_shows_what_the_readme_says(tmp_path):
    pytest.importorskip("mlxtend")
    done = subprocess.run(
        command(tmp_path, "--timeout", "1800"),
        check=False,
        env=environment(tmp_path),
        capture_output=True,
        timeout=1900,
    )
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
