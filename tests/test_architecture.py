"""The house rules that a reader relies on."""

import ast
import importlib
import inspect
import pathlib
import re

import pytest
from conformance import rule_functions

import momentum_optax as mo
from momentum_optax import schedules

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "momentum_optax"
MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))

# Who may import whom within the package: the longest entry that a module's name begins with says what it may import,
# its own room and what is `EVERYWHERE` apart. What is missing here may import nothing of ours.
ALLOWED = {
    "_checks": set(),
    "_paths": {"_checks"},
    "_boxes": set(),
    "_tree": {"_boxes"},
    "_tree_arguments": {"_boxes", "_checks", "_tree"},
    "analysis": {"_checks", "filters"},
    "apply": {"_checks", "_tree", "storage"},
    "contrib": {
        *("_checks", "_tree", "filters", "optimizers", "rules", "state.mismatch", "storage", "transform", "wrappers")
    },
    "distributed": {
        *(
            "_checks",
            "_tree",
            "_tree_arguments",
            "apply",
            "distributed.specs",
            "filters",
            "optimizers",
            "rules",
            "state.mismatch",
        ),
        *("storage", "transform"),
    },
    "embeddings": {"_checks", "filters", "state.mismatch", "storage"},
    "distributed.specs": set(),
    "filters": {"_checks"},
    "interop": {
        *("_checks", "_paths", "_tree", "filters", "optimizers", "rules", "schedules", "state.mismatch"),
        *("state.velocity", "storage", "transform", "wrappers"),
    },
    "matrices": {"_checks", "_paths", "_tree", "_tree_arguments", "distributed.specs", "state.mismatch", "storage"},
    "optimizers": {
        *(
            "_boxes",
            "_checks",
            "_tree",
            "_tree_arguments",
            "filters",
            "matrices",
            "rules",
            "schedules",
            "state.mismatch",
            "storage",
            "transform",
        ),
        "wrappers",
    },
    "rules": {"_checks", "filters"},
    "schedules": {"_checks", "filters"},
    "state": {
        *("_boxes", "_checks", "_paths", "_tree", "distributed", "filters", "state.velocity", "storage", "transform"),
        "wrappers",
    },
    "state.displacement": {"_tree", "filters", "state.velocity", "storage", "transform"},
    "state.evaluation": {
        *("_checks", "_paths", "_tree", "filters", "state.displacement", "storage", "transform", "wrappers")
    },
    "state.mismatch": {"_boxes", "_checks", "_tree", "storage"},
    "state.velocity": {"_checks", "_tree", "storage", "transform"},
    "storage": {"_checks", "_paths", "_tree"},
    "transform": {"_boxes", "_checks", "_tree", "filters", "state.mismatch", "storage"},
    "tuning": {"_checks", "analysis", "filters", "rules"},
    "wrappers": {
        *("_boxes", "_checks", "_paths", "_tree", "filters", "schedules", "storage", "transform"),
        *("state.displacement", "state.mismatch", "state.velocity"),
    },
}
FREE = {"__init__"}
# What every module may import, and what imports nothing of ours.
EVERYWHERE = {"_typing", "_export"}
# Modules that users reach as `mo.NAME`.
EXPORTED_MODULES = {
    "analysis",
    "checkpoint",
    "contrib",
    "interop",
    "matrices",
    "outer",
    "schedules",
    "sharding",
    "storage",
    "tuning",
}


def dotted(path):
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def room(name):
    """The entry of `ALLOWED` or `EVERYWHERE` that a module belongs to."""
    entries = [entry for entry in (*ALLOWED, *EVERYWHERE) if name == entry or name.startswith(entry + ".")]
    return max(entries, key=len, default=name)


def imported(path):
    """The modules of our package that a module imports, as dotted names; what is imported may be a name in them."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                module = [*path.parts[: len(path.parts) - node.level], *module]
            elif module[0] == PACKAGE.name:
                module = module[1:]
            else:
                continue
            found |= {".".join([*module, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name.partition(".")[2] for name in node.names if name.name.split(".")[0] == PACKAGE.name}
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way(path):
    here = room(dotted(path))
    if here not in FREE:
        assert {room(name) for name in imported(path)} - {here, *EVERYWHERE} <= ALLOWED.get(here, set())


def test_the_imports_have_no_cycle():
    done = set()
    while waiting := ALLOWED.keys() - done:
        ready = {name for name in waiting if not (ALLOWED[name] & waiting)}
        assert ready, f"a cycle among {waiting}"
        done |= ready


def test_init_holds_public_names_and_nothing_else():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    for node in tree.body[1:]:
        assert isinstance(node, ast.ImportFrom | ast.Assign)
        if isinstance(node, ast.ImportFrom):
            families = (node.module or "").startswith("rules.")  # whose names stand in `__all__`
            assert all(alias.asname == alias.name or (families and alias.name == "*") for alias in node.names)


def test_other_libraries_are_imported_nowhere():
    for path in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"torch", "keras", "tensorflow"}


def test_there_is_no_room_for_odds_and_ends():
    assert not [p for p in MODULES if p.stem in ("utils", "util", "helpers", "common", "misc")]


def documented():
    """Public names: what `momentum_optax` exports, and what its public modules define."""
    modules = (
        mo.contrib,
        schedules,
        mo.storage,
        mo.analysis,
        mo.tuning,
        mo.interop,
        mo.matrices,
        mo.sharding,
        mo.outer,
        mo.checkpoint,
    )
    for module in (mo, *modules):
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", "").startswith(module.__name__):
                yield pytest.param(thing, id=name)


@pytest.mark.parametrize("thing", list(documented()))
def test_public_names_are_documented(thing):
    text = inspect.getdoc(thing) or ""
    assert text
    if inspect.isfunction(thing):
        takes = [p for p in inspect.signature(thing).parameters]
        assert not takes or "Args:" in text
        for name in takes:
            assert re.search(rf"^ +{name}: ", text, re.M), f"{name} is not described"


def own_functions(module):
    return {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__.startswith(module.__name__)}


@pytest.mark.parametrize("name", [*rule_functions(), *own_functions(schedules)])
def test_rules_and_schedules_name_their_source(name):
    if name.startswith("_"):
        return
    thing = (rule_functions() | own_functions(schedules))[name]
    text = inspect.getdoc(thing)
    assert "Reference:" in text, name
    if inspect.signature(thing).parameters:
        assert "Raises:" in text, name


def test_no_function_hides_a_module():
    for path in MODULES:
        parent = importlib.import_module(".".join([PACKAGE.name, *path.parts[:-1]]))
        hidden = vars(parent).get(path.stem)  # there once the module is imported
        assert path.stem == "__init__" or hidden is None or inspect.ismodule(hidden), path


@pytest.mark.parametrize("folder", ["momentum_optax", "benchmarks", "docs", "examples", "tests"])
def test_files_and_functions_stay_short(folder):
    """At most 400 lines in a file, 500 in one of tests, and 40 in a function, docstrings apart."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        text = path.read_text()
        assert len(text.splitlines()) <= (500 if folder == "tests" else 400), f"{path} has too many lines: split it"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno - (ast.get_docstring(node) or "").count("\n")
                assert length <= 40, f"{node.name} in {path} has {length} lines: give its parts names"


def test_the_top_level_stays_small():
    names = [name for name in vars(mo) if not name.startswith("_")]
    rooms = {path.parts[0].removesuffix(".py") for path in MODULES}
    assert len([name for name in names if name not in rooms or name in EXPORTED_MODULES]) <= 80


def test_the_version_is_the_same_everywhere():
    assert f"## {mo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {mo.__version__}\n" in (ROOT / "CITATION.cff").read_text()
