"""`relativistic` against its paper; for the formula of `saturate` see `wrappers/test_directions.py`."""

import jax
import numpy as np
import optax
import pytest
from stepping import HUNDRED, MATRICES, final

import momentum_optax as mo


def test_relativistic_follows_its_paper():
    params = {name: np.ones(x.shape) for name, x in MATRICES.items()}
    w = jax.tree.map(np.zeros_like, params)
    for g in [jax.tree.map(np.float64, gradient) for gradient in HUNDRED]:
        w = {n: 0.8 * w[n] - 0.05 * g[n] for n in w}
        speed = np.sqrt(1 + 2.0 * sum(np.sum(a * a) for a in w.values()))
        params = {n: p + w[n] / speed for n, p in params.items()}
    got = final(mo.contrib.relativistic(0.05, 0.8, 2.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, params)


def test_a_delta_that_is_negative_or_scheduled_is_refused():
    with pytest.raises(ValueError, match=r"delta must be in \[0, inf\), got -1"):
        mo.contrib.saturate(-1)
    with pytest.raises(TypeError, match="delta must be a number or a scalar array, got <function"):
        mo.contrib.saturate(optax.constant_schedule(1.0))
