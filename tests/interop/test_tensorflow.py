"""TensorFlow 1's `MomentumOptimizer` against its lines."""

import numpy as np
import pytest
from interop.dialect_calls import START, STEPS, descend, gradient, rate

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("tf1_momentum", {"learning_rate": 0.1, "momentum": -0.1}, ValueError, "momentum must be in"),
        (
            "tf1_momentum",
            {"learning_rate": 0.1, "momentum": 0.0, "use_nesterov": True},
            ValueError,
            "use_nesterov needs",
        ),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


def test_tf1_has_its_rate_outside_the_accumulator(x64):
    for nesterov in (False, True):
        x, a, expected = START, 0.0, []
        for t in range(STEPS):
            g, m = gradient(x, t), 0.5 + 0.01 * t
            a = m * a + g
            x = x - rate(t) * g - rate(t) * m * a if nesterov else x - rate(t) * a
            expected.append(x)
        got = descend(interop.tf1_momentum(rate, lambda t: 0.5 + 0.01 * t, use_nesterov=nesterov))
        np.testing.assert_allclose(got, expected, rtol=1e-12)
