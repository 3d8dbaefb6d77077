"""Every rule of a family is reachable from `rules` and from the top level."""

import importlib
import inspect
import pkgutil

import pytest

import momentum_optax as mo

FAMILIES = [name for _, name, _ in pkgutil.iter_modules(mo.rules.__path__)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_of_a_family_are_exported(family):
    module = importlib.import_module(f"momentum_optax.rules.{family}")
    functions = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    found = [n for n, f in functions.items() if inspect.signature(f).return_annotation is mo.Filter and n[0] != "_"]
    assert sorted(found) == sorted(getattr(module, "__all__", [])), f"the rules of {family}.py are its __all__"
    assert found or family == "arguments"
    for name in found:
        assert getattr(mo.rules, name, None) is functions[name], f"rules/__init__.py must import * from {family}"
        assert getattr(mo, name, None) is functions[name], f"momentum_optax/__init__.py must import * from {family}"
