"""Caffe's `SGD` solver against its lines."""

import numpy as np
import pytest
from interop.dialect_calls import START, STEPS, descend, gradient, rate

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        (
            "caffe_sgd",
            {"base_lr": 0.1, "regularization_type": "L1"},
            ValueError,
            "regularization_type must be one of 'L2'",
        ),
        ("caffe_sgd", {"base_lr": 0.1, "momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\]"),
        ("caffe_sgd", {"base_lr": 0.1, "momentum": lambda t: 0.9}, TypeError, "momentum must be a number"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


def test_caffe_has_its_rate_inside_and_its_decay_in_the_gradient(x64):
    x, v, expected = START, 0.0, []
    for t in range(STEPS):
        v = 0.9 * v + rate(t) * (gradient(x, t) + 0.1 * x)
        x = x - v
        expected.append(x)
    np.testing.assert_allclose(descend(interop.caffe_sgd(rate, 0.9, 0.1)), expected, rtol=1e-12)
