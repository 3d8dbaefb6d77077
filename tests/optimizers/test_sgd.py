"""`srsgd` against its paper; for `sgd` see `test_dropin.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from stepping import HUNDRED, MATRICES, final

import momentum_optax as mo


def test_srsgd_follows_its_paper():
    ahead = x = {name: np.ones(x.shape) for name, x in MATRICES.items()}
    k = 1
    for g in [jax.tree.map(np.float64, gradient) for gradient in HUNDRED]:
        # The momentum (k - 1) / (k + 2), k from 1, and 1 again after R = 7 steps.
        new = {n: ahead[n] - 0.1 * g[n] for n in x}
        ahead = {n: new[n] + (k - 1) / (k + 2) * (new[n] - x[n]) for n in x}
        x, k = new, 1 if k >= 7 else k + 1
    got = final(mo.srsgd(0.1, 7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, ahead)


def test_restarts_that_are_none_are_refused_by_name():
    with pytest.raises(ValueError, match=r"restarts\[1\] must be at least 6, got 5"):
        mo.srsgd(0.1, (5, 5))
    with pytest.raises(TypeError, match="restarts must hold whole numbers along at most one axis, got float32"):
        mo.srsgd(0.1, jnp.array([2.5]))
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        mo.srsgd(0.1, 0)


def test_a_chain_that_is_told_of_the_gradients_before_it_keeps_the_state_of_sgd_in_bytes():
    decay, rate = optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(0.1)
    chain = optax.chain(decay, mo.scale_by_momentum(mo.heavy_ball(0.9), storage="int8"), rate)
    whole = mo.sgd(0.1, 0.9, storage="int8", weight_decay=0.1)
    # The decay outweighs the gradient: without being told the chain finds another scale.
    weights, gradient = jnp.full((8, 512), 100.0), jnp.ones((8, 512))

    def velocity_of(tx, **extra):
        return jax.tree.leaves(jax.jit(tx.update)(gradient, tx.init(weights), weights, **extra)[1])

    told = velocity_of(chain, raw_gradient=gradient)
    jax.tree.map(np.testing.assert_array_equal, told, velocity_of(whole))
    assert any(np.any(a != b) for a, b in zip(told, velocity_of(chain), strict=True))
