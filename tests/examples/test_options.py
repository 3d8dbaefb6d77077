"""The options of the demos: each one reaches what is trained or drawn, and a wrong value is named before that."""

import dataclasses
import re
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from examples import command_line
from examples.demo import __main__ as demo
from examples.demo_distributed import __main__ as distributed

PROGRAMS = {"demo": demo, "demo_distributed": distributed}
# Of each option another value than its default or that of `START`.
OTHER = {
    "demo": {
        "data": "mnist",
        "rule": "sgd",
        "epochs": "2",
        "batch_size": "3",
        "learning_rate": "0.5",
        "seed": "1",
        "seeds": "2",
        "race_epochs": "2",
        "skip_race": "--skip-race",
        "output": "other.png",
    },
    "demo_distributed": {
        "data": "mnist",
        "workers": "3",
        "rounds": "3",
        "inner_steps": "2",
        "batch_size": "3",
        "learning_rate": "0.5",
        "seed": "1",
        "timeout": "5000",
        "kill": "--no-kill",
        "output": "other.png",
    },
}
START = ["--data", "digits"]
# Values that are refused, at least one of each option that is no flag.
WRONG = {
    "demo": [
        ("--epochs", "0"),
        ("--epochs", "1.5"),
        ("--batch-size", "-3"),
        ("--batch-size", "9999"),
        ("--learning-rate", "0"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "fast"),
        ("--seed", "-1"),
        ("--seeds", "0"),
        ("--race-epochs", "0"),
        ("--rule", "adam"),
        ("--data", "cifar"),
        ("--output", "no/such/directory/a.png"),
        ("--output", "."),
    ],
    "demo_distributed": [
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
}


ROWS = [(name, x.name) for name, program in PROGRAMS.items() for x in dataclasses.fields(program.Options)]


class Told:
    """What a program tells the functions that train and draw, in place of which it is called."""

    def __init__(self, monkeypatch):
        self.calls, self.patch = [], monkeypatch.setattr

    def record(self, module, name, result=None):
        """Strings are titles, which say the options to the reader only."""

        def told(*given, **more):
            self.calls.append((name, [x for x in given if not isinstance(x, str)], more))
            return result

        self.patch(module, name, told)

    def loaders(self, module):
        """Data that nothing has to be loaded for."""

        def split(name, seed):
            return SimpleNamespace(name=name, seed=seed, images=[0] * 10_000, labels=[0] * 10_000, test_images=[0])

        loaders = {name: lambda seed, name=name: split(name, seed) for name in module.LOADERS}
        self.patch(module, "LOADERS", loaders)
        self.patch(command_line, "missing", lambda packages: "")

    def demo(self):
        self.loaders(demo)
        self.record(demo, "train_cnn", SimpleNamespace(parameters=1))
        self.record(demo, "race", [])
        self.record(demo, "plot")
        self.patch(demo, "table", lambda results: "")

    def demo_distributed(self):
        self.loaders(distributed)
        self.patch(distributed, "write_data", lambda data, *rest: (self.calls.append(data), [1])[1])
        self.patch(distributed, "Launcher", self.launcher)
        self.record(distributed, "plot")
        self.patch(distributed.training, "start", lambda settings: [])
        self.patch(distributed.checkpoint, "save", lambda *rest: None)
        for name, result in (("compared", []), ("survived", True), ("table", "")):
            self.patch(distributed, name, lambda *rest, result=result: result)

    def launcher(self, settings, folder, deadline, say, tick):
        """Of a deadline the hundreds of seconds that are left."""
        self.calls.append((settings, round((deadline - time.monotonic()) / 100)))
        return SimpleNamespace(run=lambda *given, **more: self.calls.append((given, more)), losses=0)


@pytest.mark.parametrize(("program", "option"), ROWS)
def test_every_option_reaches_what_is_trained_or_drawn(program, option, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def told(*arguments):
        with monkeypatch.context() as patch:
            told = Told(patch)
            getattr(told, program)()
            assert PROGRAMS[program].main([*START, *arguments]) == 0
        assert len(told.calls) >= 2
        return told.calls

    value = OTHER[program][option]
    other = [value] if value.startswith("--") else [f"--{option.replace('_', '-')}", value]
    assert told() == told()
    assert told(*other) != told()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_has_a_wrong_value(program):
    fields = dataclasses.fields(PROGRAMS[program].Options)
    options = {f"--{x.name.replace('_', '-')}" for x in fields if x.type is not bool}
    assert {option for option, _ in WRONG[program]} == options


@pytest.mark.parametrize(("program", "option", "value"), [(p, *row) for p in PROGRAMS for row in WRONG[p]])
def test_a_wrong_option_is_named_with_its_value_before_anything_is_trained(
    program, option, value, refused, monkeypatch
):
    for name in {"demo": ("train_cnn", "race"), "demo_distributed": ("_demo",)}[program]:
        monkeypatch.setattr(PROGRAMS[program], name, None)
    message = refused(PROGRAMS[program].main, *START, f"{option}={value}")
    assert re.search(rf"(Error parsing {option}: must be .*|invalid choice .* for argument '{option}'.*)", message)
    assert value in message
