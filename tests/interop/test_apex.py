"""Apex's `FusedSGD` against its lines."""

import numpy as np
import pytest
from interop.dialect_calls import START, STEPS, descend, gradient

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("apex_sgd", {"lr": 0.1, "wd_after_momentum": True}, ValueError, "wd_after_momentum must be False without"),
        ("apex_sgd", {"lr": 0.1, "wd_after_momentum": None}, TypeError, "wd_after_momentum must be True or False"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_apex_adds_its_decay_before_or_after_the_momentum(after, nesterov, x64):
    x, v, expected = START, None, []
    for t in range(STEPS):
        g = gradient(x, t) + (0 if after else 0.1 * x)
        v = g if v is None else 0.9 * v + g
        u = g + 0.9 * v if nesterov else v
        x = x - 0.05 * (u + (0.1 * x if after else 0))
        expected.append(x)
    got = descend(interop.apex_sgd(0.05, 0.9, weight_decay=0.1, nesterov=nesterov, wd_after_momentum=after))
    np.testing.assert_allclose(got, expected, rtol=1e-12)
