"""FlashOptim's `FlashSGD`: errors; its steps are in `test_golden.py`."""

import pytest

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("flash_sgd", {"momentum": 0.9, "nesterov": True, "dampening": 0.1}, ValueError, "nesterov needs"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)
