"""The lines and blocks of docs/coming-from.md run and give what they say."""

import json
import pathlib
import re

import jax.numpy as jnp
import pytest

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "coming-from.md").read_text()
LINES = sorted(set(re.findall(r"\| `(mo\.[^`]*\))` \|", PAGE)))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("line", LINES)
def test_every_line_makes_an_optimizer_that_steps(line):
    tx = eval(line, {"mo": mo})
    params = {"w": jnp.ones((3, 2))}
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["w"] != 0).all()


def test_every_dialect_has_a_line():
    assert {name for name in DIALECTS if f"`mo.interop.{name}(" not in PAGE} == set()


def test_the_blocks_run_and_show_what_their_comments_say():
    names = {}
    shown = []
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block, "coming-from.md", "exec"), names)
        for code, comment in re.findall(r"^([^#\n=]+?)  # ([(\[R].*)$", block, re.M):
            assert repr(eval(code, names)) == comment, code
            shown.append(code)
    assert len(shown) == 4
    (v,) = mo.velocity(names["state"])
    assert v["dense"]["kernel"].shape == (4, 3)
    assert v["dense"]["kernel"][0, 0] == pytest.approx(-0.1)


def test_the_versions_are_those_of_the_recordings():
    versions = json.loads((ROOT / "tests" / "golden" / "versions.json").read_text())
    for name, shown in (("torch", "PyTorch"), ("keras", "Keras"), ("timm", "timm"), ("qhoptim", "qhoptim")):
        assert f"| {shown} {versions[name].removesuffix('+cpu')}" in PAGE
    for name, shown in (("heavyball", "HeavyBall"), ("flashoptim", "FlashOptim"), ("pytorch_optimizer",) * 2):
        assert f"| {shown} {versions[name]}" in PAGE


def test_the_numbers_of_cases_are_those_of_the_recordings():
    from golden.cases import CASES

    libraries = [case.library.partition("-")[0] for case in CASES.values()]
    names = {"torch": "PyTorch", "kozistr": "pytorch_optimizer", "heavyball": "HeavyBall", "flash": "FlashOptim"}
    names |= {"keras": "Keras"}
    for library in set(libraries):
        (row,) = re.findall(rf"^\| {names.get(library, library)} [^|]*\d\.\d[^|]*\| (\d+) \|", PAGE, re.M)
        assert int(row) == libraries.count(library), library
