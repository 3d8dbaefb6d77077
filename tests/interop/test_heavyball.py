"""HeavyBall's `SGD`: errors; its steps are in `test_golden.py`."""

import pytest

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("heavyball_sgd", {"beta": 1.1}, ValueError, r"beta must be in \[0, 1\], got 1.1"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)
