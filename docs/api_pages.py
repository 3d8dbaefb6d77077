"""A hook of MkDocs: on the pages of the API a line `::: MODULE.*` stands for a line for each of its public names.

They come in the order in which the module defines or exports them, without those that have a line of their
own on any page. Sources are read, not imported.
"""

import ast
import pathlib
import re
from collections.abc import Iterator
from typing import Any

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = _ROOT / "docs" / "api"
_EVERY = re.compile(r"^::: (momentum_optax\.[\w.]+)\.\*$", re.M)
_ONE = re.compile(r"^::: (momentum_optax\.[\w.]+)$", re.M)
# Modules whose names users write without the module's.
_FLAT = {"momentum_optax.rules": "momentum_optax"}


def on_page_markdown(markdown: str, **rest: Any) -> str:
    """The page with every `*` written out."""
    del rest
    return _EVERY.sub(_lines, markdown)


def _lines(match: re.Match[str]) -> str:
    prefix = _FLAT.get(match[1], match[1])
    pages = [
        page.read_text(encoding="utf-8") for page in _PAGES.glob("*.md")
    ]
    taken = {name for page in pages for name in _ONE.findall(page)}
    names = (f"{prefix}.{name}" for name in public(_source(match[1])))
    return "\n\n".join(f"::: {name}" for name in names if name not in taken)


def public(path: pathlib.Path) -> Iterator[str]:
    """The names that a package exports, or that a module of one file defines."""
    package = path.name == "__init__.py"
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if package and isinstance(node, ast.ImportFrom):
            yield from _exports(path, node)
        elif not package and isinstance(
            node, ast.FunctionDef | ast.ClassDef
        ):
            yield from [node.name] * (not node.name.startswith("_"))


def _exports(path: pathlib.Path, node: ast.ImportFrom) -> Iterator[str]:
    """The names that one import of a package exports: those `as` themselves, or all of a module's."""
    for alias in node.names:
        if alias.name == "*":
            yield from _listed(_imported(path, node))
        elif alias.asname:
            yield alias.asname


def _listed(path: pathlib.Path) -> list[str]:
    """The `__all__` of a module."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
        ):
            return list(ast.literal_eval(node.value))
    raise LookupError(f"{path} must define __all__: its names are exported")


def _imported(path: pathlib.Path, node: ast.ImportFrom) -> pathlib.Path:
    """The module or package that a package imports from."""
    return _file(path.parent.joinpath(*(node.module or "").split(".")))


def _source(module: str) -> pathlib.Path:
    """The file of a module under the name that users write: a package may export one from deeper down."""
    path = _ROOT / "momentum_optax"
    for part in module.split(".")[1:]:
        folders = [
            node.module
            for node in ast.parse(_file(path).read_text("utf-8")).body
            if isinstance(node, ast.ImportFrom)
            and node.module
            and part in {alias.asname for alias in node.names}
        ]
        path = path.joinpath(*".".join(folders).split("."), part)
    return _file(path)


def _file(path: pathlib.Path) -> pathlib.Path:
    return (
        path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    )
