"""The house rules that a reader relies on."""

import ast
import inspect
import pathlib
import re

import pytest

import momentum_optax as mo
from momentum_optax import rules, schedules

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "momentum_optax"
MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))

# Who may import whom within the package; what is missing here may import nothing of ours.
ALLOWED = {
    "_tree": set(),
    "storage": {"checks"},
    "coefficients": {"checks"},
    "filters": {"checks", "coefficients"},
    "analysis": {"checks", "coefficients", "filters"},
    "rules": {"checks", "coefficients", "filters"},
    "schedules": {"checks", "coefficients"},
    "transform": {"_tree", "checks", "coefficients", "filters", "fingerprints", "mismatch", "storage"},
    "apply": {"checks", "storage"},
    "checksums": {"storage"},
    "fingerprints": {"coefficients", "filters"},
    "mismatch": set(),
    "fitting": {"compress", "transform"},
    "checkpoint": {"checks", "checksums", "filters", "fingerprints"},
    "compress": {"_tree", "checks", "mismatch", "storage"},
    "convert": {"_tree", "checks", "compress", "fitting", "storage", "transform"},
    "row_sparse": {"checks", "coefficients", "filters", "storage"},
    "monitor": {"_tree", "checks", "compress", "filters", "fingerprints", "mismatch", "storage", "transform"},
    "sharding": {"_tree", "checks"},
    "state": {"sharding"},
    "surgery": {"_tree", "checkpoint", "checks", "compress", "storage", "transform"},
    "outer": {"apply", "checks", "mismatch", "optimizers", "rules", "storage", "transform"},
    "tuning": {"analysis", "checks", "filters", "rules"},
    "interop": {
        "_tree",
        "checks",
        "coefficients",
        "filters",
        "optimizers",
        "rules",
        "schedules",
        "storage",
        "transform",
    },
    "wrappers": {
        "_tree",
        "checks",
        "coefficients",
        "filters",
        "mismatch",
        "monitor",
        "rules",
        "schedules",
        "storage",
        "transform",
    },
    "optimizers": {
        "checks",
        "coefficients",
        "filters",
        "mismatch",
        "rules",
        "schedules",
        "storage",
        "transform",
        "wrappers",
    },
}
FREE = {"__init__", "demo", "demo_distributed"}
# Imported by public modules for their own use.
HELPERS = {"table_lookup", "value_at", "resolve", "reals", "shown", "Filter", "mix", "random_bits"}
HELPERS |= {"arithmetic_dtype", "times", "whole_along"}
HELPERS |= {
    "check_state",
    "noted",
    "checksum",
    "dtype_name",
    "has_checksum",
    "difference",
    "fingerprint",
    "is_fingerprint",
}


def room(path):
    return path.parts[0].removesuffix(".py")


def imported_rooms(path):
    """The rooms of our package that a module imports, its own folder apart."""
    tree = ast.parse((PACKAGE / path).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == len(path.parts):
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "momentum_optax":
            found |= {[*node.module.split("."), "__init__"][1]}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {[*name, "__init__"][1] for name in names if name[0] == "momentum_optax"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way(path):
    if room(path) not in FREE:
        assert imported_rooms(path) <= ALLOWED.get(room(path), set())


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
            assert all(alias.asname == alias.name for alias in node.names)


def test_other_libraries_are_imported_nowhere():
    for path in MODULES:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"torch", "keras", "tensorflow"}


def test_there_is_no_room_for_odds_and_ends():
    assert not [p for p in MODULES if p.stem in ("utils", "util", "helpers", "common", "misc")]


def test_every_rule_is_exported():
    written = {n for n, f in vars(rules).items() if inspect.isfunction(f) and f.__module__ == rules.__name__}
    assert {n for n in written if not n.startswith("_")} <= set(vars(mo))


def documented():
    """Public names: what `momentum_optax` exports, and what its public modules define."""
    for module in (mo, schedules, mo.storage, mo.analysis, mo.tuning, mo.interop, mo.sharding, mo.outer, mo.checkpoint):
        for name, thing in vars(module).items():
            ours = getattr(thing, "__module__", "").startswith(mo.__name__)
            if not name.startswith("_") and ours and (module is mo or name not in HELPERS):
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


@pytest.mark.parametrize("module", [rules, schedules], ids=lambda m: m.__name__)
def test_rules_and_schedules_name_their_source(module):
    for name, thing in vars(module).items():
        if inspect.isfunction(thing) and thing.__module__ == module.__name__ and not name.startswith("_"):
            text = inspect.getdoc(thing)
            assert "Reference:" in text, name
            if inspect.signature(thing).parameters:
                assert "Raises:" in text, name


def test_the_version_is_the_same_everywhere():
    assert f"## {mo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {mo.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_counts_the_rules():
    written = [n for n, f in vars(rules).items() if inspect.isfunction(f) and f.__module__ == rules.__name__]
    assert len([n for n in written if not n.startswith("_")]) == 27
    assert "Twenty-seven published rules" in (ROOT / "CHANGELOG.md").read_text()
