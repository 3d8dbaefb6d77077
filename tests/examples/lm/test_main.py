"""The command line of the language model: it prints and draws what it trained, and refuses wrong options."""

import dataclasses
import os
import pathlib
import re
import resource
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("orbax.checkpoint")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

import momentum_optax as mo
from examples.lm import __main__ as lm
from examples.lm import figure, optimizers, training
from examples.lm.settings import Settings

ROOT = pathlib.Path(__file__).parents[3]
# A value of each option that is refused.
WRONG = [
    ("--config", "huge"),
    ("--optimizer", "adam"),
    ("--rule", "momentum"),
    ("--storage", "int2"),
    ("--behind", "swa"),
    ("--average", "-1"),
    ("--learning-rate", "0"),
    ("--learning-rate", "fast"),
    ("--steps", "0"),
    ("--batch-size", "0"),
    ("--batch-size", "12"),
    ("--seed", "-1"),
    ("--mesh", "2x4"),
    ("--checkpoints", "no/such/directory"),
    ("--checkpoints", __file__),
    ("--save-every", "0"),
    ("--output", "."),
]


@pytest.fixture(scope="module")
def history():
    """A run of three steps, made up."""
    losses = [{"step": step, "weights": 4.0 - step, "average": 4.5 - step} for step in (1, 3)]
    figures = [{"step": 0, "cosine/mu": 0.5, "effective_learning_rate": 1e-3, "bytes": 2e6}]
    return training.History([4.0, 3.0, 2.0], losses, figures, {"weights": 1.2345, "average": 1.5})


@pytest.fixture
def untrained(monkeypatch, history):
    """The arguments of the runs that are asked for, none of which is made."""
    asked = []

    def train(settings, placed, folder, every):
        asked.append((settings, folder, every))
        return history

    monkeypatch.setattr(training, "train", train)
    return asked


def test_every_option_has_a_wrong_value():
    fields = dataclasses.fields(lm.Options)
    assert {option for option, _ in WRONG} == {f"--{x.name.replace('_', '-')}" for x in fields}


@pytest.mark.parametrize(("option", "value"), WRONG)
def test_a_wrong_option_is_named_with_its_value_before_anything_is_trained(option, value, refused, monkeypatch):
    monkeypatch.setattr(lm, "_trained", None)
    message = refused(lm.main, f"{option}={value}")
    assert re.search(rf"(Error parsing {option}: must be .*|invalid choice .* for argument '{option}'.*)", message)
    assert value.rpartition("/")[2] in message.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rule=nesterov",), "Error parsing --rule: must be own with adamw, which has moments instead, got nesterov"),
        (("--optimizer=muon", "--storage=int4"), "Error parsing --storage: must not be int4 here"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(arguments, message, refused, untrained):
    assert message in refused(lm.main, "--config=tiny", *arguments)
    assert untrained == []


def test_options_are_what_is_trained_and_drawn(untrained, tmp_path, capsys):
    path = tmp_path / "curves.png"
    arguments = ["--config=tiny", "--optimizer=sgd", "--rule=none", "--steps=3", "--batch-size=8", "--seed=5"]
    folders = [f"--checkpoints={tmp_path / 'run'}", "--save-every=2", f"--output={path}"]
    assert lm.main([*arguments, *folders]) == 0
    rate = optimizers.default_rate("sgd", "none")
    settings = Settings("tiny", "sgd", "none", "float32", "none", 0, rate, 3, 8, 5, "split")
    assert untrained == [(settings, tmp_path / "run", 2)]
    printed = capsys.readouterr().out
    assert "Language model, tiny: sgd, rule none, learning rate 1:" in printed
    assert "Test text, nats per character: weights 1.2345, average 1.5000; state: 2.00 MB." in printed
    assert str(path) in printed
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (training.DivergedError("the loss is nan at step 3"), "1 Stopped: the loss is nan at step 3. Take a lower"),
        (mo.checkpoint.CheckpointError("--steps must be 3"), "1 --steps must be 3."),
        (KeyboardInterrupt(), "130 Interrupted: the same command goes on from the last checkpoint."),
    ],
    ids=["diverged", "checkpoint", "interrupt"],
)
def test_what_goes_wrong_is_said_and_is_the_exit_status(error, said, capsys, monkeypatch, tmp_path):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(training, "train", fail)
    status = lm.main(["--config=tiny", f"--checkpoints={tmp_path}"])
    assert f"{status} {capsys.readouterr().err}".startswith(said)


@pytest.mark.parametrize("package", sorted({*lm.PACKAGES} - {"tyro"}))
def test_a_missing_package_is_one_line_that_says_what_to_install(package, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # what Python makes of a package that cannot be imported
    assert lm.main([]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"{package}: pip install 'momentum-optax[demo]'" in err


def test_a_figure_of_one_step_is_drawn(tmp_path, history):
    short = training.History([4.0], history.held_out[:1], history.telemetry, {"weights": 1.0})
    figure.plot(short, tmp_path / "short.png", "one step")
    assert (tmp_path / "short.png").stat().st_size > 0


def command(*arguments):
    flags = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return {"args": [sys.executable, "-m", "examples.lm", *arguments], "env": os.environ | flags, "text": True}


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    options = ("--config=tiny", "--steps=40", "--batch-size=4", "--save-every=4", "--optimizer=lion", "--storage=int8")
    whole = subprocess.run(
        **command(*options, f"--output={tmp_path / 'whole.png'}"), capture_output=True, timeout=600, check=True
    )
    folder, lines = tmp_path / "run", []
    here = (*options, f"--checkpoints={folder}", f"--output={tmp_path / 'parts.png'}")
    for _ in range(2):
        before, deadline = finished(folder), time.monotonic() + 300
        with subprocess.Popen(**command(*here), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            while finished(folder) <= before and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGKILL)
            lines.append(process.stdout.read())
        assert process.returncode == -signal.SIGKILL
    last = subprocess.run(**command(*here), capture_output=True, timeout=600, check=True).stdout
    assert "Resumed after step" in lines[1]
    assert "Resumed after step" in last
    test = re.search(r"Test text.*", whole.stdout)[0]
    assert test in last
    assert whole.stdout.splitlines()[-4:-1] == last.splitlines()[-4:-1]


def finished(folder):
    """The last step in a folder of checkpoints, -1 for none."""
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=-1)


@pytest.mark.slow
def test_the_default_run_takes_less_than_three_minutes_of_two_cores_and_shows_what_the_guide_says(tmp_path):
    output, before = tmp_path / "lm.png", resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(**command(f"--output={output}"), capture_output=True, timeout=1800, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    losses = [float(x) for x in re.findall(r"held out: weights ([\d.]+)", run.stdout)]
    assert len(losses) == 10
    assert losses[-1] < 2.05
    assert losses[0] > 2.5
    # Of the processor: what else the machine does is not counted.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2 * 180
    assert output.read_bytes()[:4] == b"\x89PNG"
