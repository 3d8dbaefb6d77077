"""Tables that a benchmark writes into a page of the documentation."""

from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
END = "<!-- end -->\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def begin(command: str) -> str:
    """The line in front of what a command writes, whose end is `END`."""
    return f"<!-- begin: {command} -->\n"


def written(page: Path, command: str) -> str:
    """What the command has written into the page."""
    return page.read_text().split(begin(command))[1].split(END)[0].strip("\n") + "\n"


def write(page: Path, command: str, text: str) -> None:
    """Replace what the command has written into the page."""
    before, rest = page.read_text().split(begin(command))
    page.write_text(before + begin(command) + "\n" + text + "\n" + END + rest.split(END, 1)[1])
