"""Types of finished optimizers: those of the gradients and of `init`."""

import jax
import jax.numpy as jnp
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals, gradients
from stepping import velocity

import momentum_optax as mo

OPTIMIZERS = {
    "lion": mo.lion,
    "muon": mo.muon,
    "normuon": mo.normuon,
    "normalized_sgd": mo.normalized_sgd,
    "relativistic": mo.contrib.relativistic,
    "signum": mo.signum,
    "srsgd": lambda rate, **options: mo.srsgd(rate, 5, **options),
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finished_optimizers_keep_types_and_take_a_storage_and_a_missing_gradient(name):
    params = {"x": jnp.ones((4, 8), jnp.bfloat16), "y": jnp.ones((3, 2))}
    tx = OPTIMIZERS[name](optax.constant_schedule(0.1), storage=STORAGES["bfloat16"]())
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        u, after = step(gradients(params), state, params)
        assert avals(after) == avals(state)
        state = after
    assert step._cache_size() == 1
    assert (u["x"].dtype, u["y"].dtype) == (jnp.bfloat16, jnp.float32)
    assert len(velocity(state)) == 1
    none, after = tx.update({**gradients(params), "x": None}, state, {**params, "x": None})
    assert none["x"] is None
    assert_bit_equal(velocity(after)[0]["x"], velocity(state)[0]["x"])
    with pytest.raises(ValueError, match="learning_rate must be in"):
        OPTIMIZERS[name](-1.0)
