"""The demos are written as a user would write them."""

import ast
import pathlib

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_demos_import_the_package_and_not_its_submodules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("momentum_optax")
        elif isinstance(node, ast.Import):
            names = [(alias.name, alias.asname) for alias in node.names if alias.name.startswith("momentum_optax")]
            assert names in ([], [("momentum_optax", "mo")])
