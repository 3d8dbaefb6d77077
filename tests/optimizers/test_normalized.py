"""`normalized_sgd` against its paper."""

import jax
import numpy as np
from stepping import HUNDRED, MATRICES, final

import momentum_optax as mo


def test_normalized_sgd_follows_its_paper():
    params = {name: np.ones(x.shape) for name, x in MATRICES.items()}
    m = jax.tree.map(np.zeros_like, params)
    for g in [jax.tree.map(np.float64, gradient) for gradient in HUNDRED]:
        m = {n: 0.9 * m[n] + 0.1 * g[n] for n in m}
        length = np.sqrt(sum(np.sum(a * a) for a in m.values()))
        params = {n: p - 0.1 * m[n] / length for n, p in params.items()}
    got = final(mo.normalized_sgd(0.1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, params)
