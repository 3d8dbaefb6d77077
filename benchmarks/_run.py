"""The frame of the benchmarks: the command line, and the JSON file with the surroundings of its numbers."""

import dataclasses
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import jax
import numpy as np
import optax

import momentum_optax as mo
from examples import command_line
from examples.command_line import WRITABLE, refuse

FOLDER = Path(__file__).parent

# A line of a table, by column: numbers, texts and lists of them, as JSON has them.
Row: TypeAlias = dict[str, Any]


def table(columns: Mapping[str, str], rows: Iterable[Row]) -> str:
    """Rows in print.

    Args:
      columns: For each heading a format string over a row. A name alone, "{tree}", is text, on the left of its column;
        numbers are on the right.
      rows: With the names that the format strings have.
    """
    lines = [list(columns), *([form.format_map(row) for form in columns.values()] for row in rows)]
    sides = ["<" if re.fullmatch(r"{\w+}", form) else ">" for form in columns.values()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True)]
    return "\n".join("  ".join(forms).format(*line).rstrip() for line in lines)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that all benchmarks have."""

    output: Annotated[Path | None, WRITABLE] = None
    """JSON file to write; None is the committed one, but not with --quick"""


ChosenOptions = TypeVar("ChosenOptions", bound=Options)


class Run(Generic[ChosenOptions]):
    """A run of a benchmark.

    Attributes:
      options: The options on the command line.
      path: The JSON file.
    """

    def __init__(self, name: str, description: str | None, options: type[ChosenOptions]):
        self.options = command_line.parse(options, f"benchmarks.{name}", description or "")
        # Benchmarks that have such an option measure with it that they run, and nothing else.
        if getattr(self.options, "quick", False) and self.options.output is None:
            refuse("--output", "must be given with --quick, whose numbers are not those of the committed file")
        self.path = self.options.output or FOLDER / f"{name}.json"
        self._command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])

    def write(
        self, results: Mapping[str, object], *, versions: Mapping[str, str] | None = None, indent: int | None = 1
    ) -> None:
        """Write the results, and what they depend on besides the code of the benchmark.

        Args:
          results: Entries of the JSON document.
          versions: Of packages that only this benchmark uses.
          indent: Of the JSON text; None puts all of it on one line.
        """
        modules = {"jax": jax, "numpy": np, "optax": optax, "momentum_optax": mo}
        document = {
            "command": self._command,
            "versions": {"python": platform.python_version()}
            | {name: module.__version__ for name, module in modules.items()}
            | dict(versions or {}),
            "device": jax.devices()[0].device_kind,
            "cpu_cores": os.cpu_count(),
        }
        self.path.write_text(json.dumps(document | dict(results), indent=indent) + "\n")


def entries_before(path: Path, names: Iterable[str]) -> Row | None:
    """These entries of the file of an earlier run; None where there is no such file."""
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text())
        return {name: document[name] for name in names}
    except (ValueError, LookupError, TypeError):
        refuse("--output", f"{path} must be a file of this benchmark: give another one, or remove it")


def rows_before(path: Path, settings: Row) -> list[Row]:
    """The rows of an earlier run with these settings."""
    found = entries_before(path, ("settings", "rows"))
    if found is None:
        return []
    if found["settings"] != settings:
        refuse("--output", f"{path} has results of other settings: give another file, or remove it")
    rows: list[Row] = found["rows"]
    return rows
