"""The demos are written as a user would write them, and read every option that they offer."""

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


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_argument_is_read(path):
    """An option that is passed on and then ignored would do nothing. What a protocol gives may be deleted."""
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith("__"):
            given = function.args
            names = {x.arg for x in (*given.posonlyargs, *given.args, *given.kwonlyargs)} - {"self", "cls"}
            used = {x.id for line in function.body for x in ast.walk(line) if isinstance(x, ast.Name)}
            assert names <= used, f"{function.name} does not read {sorted(names - used)}"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/__main__.py")), ids=lambda path: path.parent.name)
def test_every_option_is_explained_and_read(path):
    (options,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Options"]
    fields = [i for i, node in enumerate(options.body) if isinstance(node, ast.AnnAssign)]
    names = {options.body[i].target.id for i in fields}
    assert len(names) >= 10
    for i in fields:
        help_ = options.body[i + 1].value if isinstance(options.body[i + 1], ast.Expr) else None
        assert isinstance(help_, ast.Constant), f"say in a string what {options.body[i].target.id} does"
    code = [node for file in path.parent.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    assert names - {node.attr for node in code if isinstance(node, ast.Attribute)} == set()
