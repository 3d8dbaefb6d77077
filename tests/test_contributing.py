"""CONTRIBUTING.md: its map is that of the package, and the files, tests and targets that it names are there.

`python tests/test_contributing.py` writes the map anew.
"""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "momentum_optax"
PAGE = ROOT / "CONTRIBUTING.md"
TEXT = PAGE.read_text()
BEGIN, END = "<!-- begin: map -->\n", "<!-- end: map -->\n"
CHANGES = re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT[TEXT.index("## How to change") :], re.S | re.M)


def first_line(path):
    """What a module is, in the first line of its docstring; formulas and code are left as they are."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def the_map():
    """A line for every file of the package, folder by folder, in alphabetical order."""
    lines = []
    for folder in [PACKAGE, *sorted(p for p in PACKAGE.rglob("*") if (p / "__init__.py").is_file())]:
        lines += ["", f"**`{folder.relative_to(ROOT)}/`**", ""]
        lines += [f"- `{path.name}`: {first_line(path)}" for path in sorted(folder.glob("*.py"))]
    return "\n".join([*lines, "", ""])


def with_map(text):
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return text[:start] + the_map() + text[end:]


def test_the_map_has_a_line_for_every_file():
    assert with_map(TEXT) == TEXT, f"write it anew, with python tests/test_contributing.py:\n{the_map()}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_file_says_in_one_line_what_it_is(path):
    line = first_line(path)
    assert line.endswith(".") or path.name == "py.typed", "the first line of the docstring is a whole sentence"
    assert not re.match(r"(What|How|Where)\b", line)


def expanded(name):
    """The paths that a name such as `docs/{guide,storage}.md` or `rules/*.py` stands for."""
    match = re.search(r"\{(.*?)\}", name)
    names = [name.replace(match[0], one) for one in match[1].split(",")] if match else [name]
    return [path for one in names for path in (ROOT.glob(one) if "*" in one else [ROOT / one])]


def test_every_change_names_its_files_and_the_tests_that_miss_them():
    assert len(CHANGES) == 12
    for title, text in CHANGES:
        assert re.search(r"^\| `\S+` ", text, re.M), title
        assert "`test_" in text, title


def test_the_files_that_it_names_are_there():
    prose = TEXT.replace(the_map(), "")
    names = set(
        re.findall(r"`((?:momentum_optax|tests|docs|examples|benchmarks|notebooks|\.github)/[\w./*{},-]*)`", prose)
    )
    assert len(names) > 20
    for name in names - {name for name in names if "NAME" in name}:
        paths = expanded(name)
        assert paths, name
        assert all(path.exists() for path in paths), name


def test_the_tests_that_it_names_are_there():
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        defined |= {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}
        defined.add(path.name)
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", TEXT))
    assert len(named) > 20
    assert named <= defined, sorted(named - defined)


def test_its_targets_are_those_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    said = set(re.findall(r"`make ([a-z-]+)", TEXT))
    assert said <= targets
    assert {"test", "test-slow", "lint", "docs", "notebooks", "golden", "test-oldest", "compiled-bytes"} <= said


if __name__ == "__main__":
    PAGE.write_text(with_map(TEXT))
