"""Lion and Signum: errors; their steps are in `test_golden.py`."""

import pytest

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("lion", {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("lion", {"betas": (0.9,)}, ValueError, "betas must have 2 entries"),
        ("lion", {"betas": 0.9}, TypeError, "betas must be a pair"),
        ("signum", {"weight_decouple": False}, ValueError, "weight_decouple must be True without"),
        ("signum", {"momentum": 1.0}, ValueError, "momentum must be in"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)
