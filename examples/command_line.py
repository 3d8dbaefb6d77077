"""Command lines of the demos and benchmarks: fields of a dataclass are options, their docstrings the help.

A wrong option ends the program with exit status 2 and a message that names the option, what it must be and what it got.
"""

import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

Options = TypeVar("Options")


def missing(packages: Iterable[str]) -> str:
    """A sentence that names those of these packages that are not installed, empty where all are."""
    names = [name for name in packages if find_spec(name) is None]
    return f"The demo needs {', '.join(names)}: pip install 'momentum-optax[demo]'" if names else ""


try:
    import tyro
except ModuleNotFoundError:
    raise SystemExit(missing(["tyro"])) from None

Argument = tyro.constructors.PrimitiveConstructorSpec[Any]


def parse(options: type[Options], program: str, description: str, arguments: Sequence[str] | None = None) -> Options:
    """The options on a command line, by default that of this process; a flag has one form, not also its negation."""
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(options, prog=f"python -m {program}", description=description, args=arguments, config=config)


def refuse(option: str, message: str) -> NoReturn:
    """End the program for an option that is wrong beside the others or the data."""
    print(f"Error parsing {option}: {message}", file=sys.stderr)
    raise SystemExit(2)


def whole_number(least: int, most: int) -> Argument:
    """A type of option: an integer between these bounds."""
    return _number(int, "a whole number", least, most)


def number(least: float, most: float) -> Argument:
    """A type of option: a number between these bounds; None is allowed as a default."""
    return _number(float, "a number", least, most)


def choice(names: Iterable[str]) -> Argument:
    """A type of option: one of these names."""
    choices = tuple(names)
    return Argument(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda texts: texts[0],
        is_instance=lambda value: value in choices,
        str_from_instance=lambda value: [value],
        choices=choices,
    )


def _writable(texts: list[str]) -> Path:
    path = Path(texts[0])
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"must be a file in a directory that exists and is writable, got {texts[0]!r}")
    return path


def _folder(texts: list[str]) -> Path:
    path = Path(texts[0])
    here = path if path.is_dir() else path.parent
    if path.is_file() or not here.is_dir() or not os.access(here, os.W_OK):
        raise ValueError(f"must be a writable directory, or a new one in such a directory, got {texts[0]!r}")
    return path


def _path(parsed: Callable[[list[str]], Path]) -> Argument:
    return Argument(
        nargs=1,
        metavar="PATH",
        instance_from_str=parsed,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    )


# Types of options: a file that can be written, a directory to write to; None is allowed as a default.
WRITABLE = _path(_writable)
FOLDER = _path(_folder)


def _number(kind: type[int] | type[float], words: str, least: float, most: float) -> Argument:
    def parsed(texts: list[str]) -> float:
        try:
            value: float = kind(texts[0])
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise ValueError(f"must be {words} from {least:g} to {most:.10g}, got {texts[0]!r}")
        return value

    return Argument(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=parsed,
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )
