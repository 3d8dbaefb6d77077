"""qhoptim's `QHM`: errors; its steps are in `test_golden.py`."""

import pytest

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        (
            "qhoptim_qhm",
            {"lr": 0.1, "momentum": 0.9, "nu": 0.7, "weight_decay_type": "l2"},
            ValueError,
            "weight_decay_type must be one of 'grad', 'direct', got 'l2'",
        ),
        ("qhoptim_qhm", {"lr": 0.1, "momentum": 1.0, "nu": 0.7}, ValueError, "momentum must be in"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)
