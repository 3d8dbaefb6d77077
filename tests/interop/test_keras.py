"""Keras' `SGD`: errors; its steps are in `test_golden.py`."""

import pytest

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("keras_sgd", {"momentum": 1}, ValueError, r"momentum must be a float in \[0, 1\] or a scalar array, got 1"),
        ("keras_sgd", {"momentum": 1.1}, ValueError, "momentum must be a float"),
        ("keras_sgd", {"momentum": lambda t: 0.9}, ValueError, "momentum must be a float"),
        ("keras_sgd", {"nesterov": True}, ValueError, "nesterov needs a momentum above 0"),
        ("keras_sgd", {"weight_decay": -0.1}, ValueError, "weight_decay must be in"),
        ("keras_sgd", {"learning_rate": -0.1}, ValueError, "learning_rate must be in"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)
