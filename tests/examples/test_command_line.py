"""Types of options: bounds, names and files; and what a wrong option says."""

import dataclasses
import pathlib
from typing import Annotated

import pytest

pytest.importorskip("tyro")

from examples import command_line
from examples.command_line import WRITABLE, choice, number, whole_number


@dataclasses.dataclass(frozen=True)
class Options:
    """One option of each type."""

    count: Annotated[int, whole_number(1, 10)] = 3
    """how often"""
    rate: Annotated[float | None, number(0.5, 2.5)] = None
    """how fast"""
    colour: Annotated[str, choice(["red", "light blue"])] = "red"
    """of the curve"""
    colours: tuple[Annotated[str, choice(["red", "light blue"])], ...] = ("red",)
    """of other curves"""
    output: Annotated[pathlib.Path | None, WRITABLE] = None
    """file to write"""
    quick: bool = False
    """a small run"""
    kill: bool = True
    """do not kill"""


def parse(*arguments):
    return command_line.parse(Options, "program", "It does this.", arguments)


def test_defaults_are_those_of_the_fields():
    assert parse() == Options()


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (("--count", "10"), {"count": 10}),
        (("--rate=0.5",), {"rate": 0.5}),
        (("--rate", "2.5e0"), {"rate": 2.5}),
        (("--colour", "light blue"), {"colour": "light blue"}),
        (("--colours", "light blue", "red", "--count", "1"), {"colours": ("light blue", "red"), "count": 1}),
        (("--output", "x.png"), {"output": pathlib.Path("x.png")}),
        (("--quick", "--no-kill"), {"quick": True, "kill": False}),
    ],
)
def test_arguments_become_values_of_their_type(arguments, changes):
    found = parse(*arguments)
    assert found == dataclasses.replace(Options(), **changes)
    assert [type(getattr(found, name)) for name in changes] == [type(value) for value in changes.values()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--count", "0"), "--count: must be a whole number from 1 to 10, got '0'"),
        (("--count", "2.5"), "--count: must be a whole number from 1 to 10, got '2.5'"),
        (("--rate", "nan"), "--rate: must be a number from 0.5 to 2.5, got 'nan'"),
        (("--rate", "None"), "--rate: must be a number from 0.5 to 2.5, got 'None'"),
        (("--output", "."), "--output: must be a file in a directory that exists and is writable, got '.'"),
        (("--output", "no/x"), "--output: must be a file in a directory that exists and is writable, got 'no/x'"),
        (
            ("--colour", "green"),
            "invalid choice 'green' for argument '--colour'. Expected one of ('red',",
        ),
        (("--colours", "red", "green"), "invalid choice 'green' for argument '--colours'"),
        (("--speed", "3"), "Unrecognized options: --speed"),
        (("--kill",), "Unrecognized options: --kill"),
    ],
)
def test_a_wrong_argument_ends_the_program_with_a_sentence(arguments, message, refused):
    assert message in refused(lambda arguments: parse(*arguments), *arguments)


def test_the_help_has_the_description_and_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m program" in text
    assert "It does this." in text
    for option in ("--count", "--rate", "--colour {red,light blue}", "--output PATH", "--quick", "--no-kill"):
        assert option in text


def test_an_option_can_be_refused_later_in_the_same_words(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line.refuse("--count", "must be at most 2, got 3")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "Error parsing --count: must be at most 2, got 3\n"
