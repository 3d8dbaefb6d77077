"""Optimizers that take a second gradient: types, replays, batches, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals, gradients
from two_gradients import BEFORE, LIKE, SIGNAL

import momentum_optax as mo

MAKERS = {
    "storm": lambda storage: mo.contrib.scale_by_storm(0.1, storage=storage),
    "adaptive storm": lambda storage: mo.contrib.storm(10.0, storage=storage),
    "mars": lambda storage: mo.contrib.mars_lion(0.1, storage=storage),
}


@functools.cache
def like():
    return {"x": jnp.zeros((4, 8), jnp.bfloat16), "y": jnp.zeros((3, 2)), "z": jnp.zeros((2,))}


# A rule's velocity meets its storage in one place, so that one row of each is enough for the fast tests.
FAST = {("storm", "float32"), ("storm", "bfloat16"), ("adaptive storm", "float32"), ("mars", "float32")}

ROWS = [
    pytest.param(maker, storage, marks=() if (maker, storage) in FAST else pytest.mark.slow)
    for maker in MAKERS
    for storage in STORAGES
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("maker", "storage"), ROWS)
def test_a_compiled_step_keeps_types_donates_and_resumes(maker, storage):
    tx = MAKERS[maker](STORAGES[storage]())
    step = jax.jit(lambda g, p, state: tx.update(g, state, previous_gradient=p), donate_argnums=2)
    pairs = [(gradients(like(), i), gradients(like(), 50 + i)) for i in range(5)]
    state = tx.init(like())
    begin = avals(state)
    for i, (g, p) in enumerate(pairs):
        u, state = step(g, p, state)
        assert avals(state) == begin
        assert avals(u) == avals(g)
        if i == 2:
            saved = jax.device_get(state)
    state_again = jax.tree.map(jnp.asarray, saved)
    for g, p in pairs[3:]:
        again, state_again = step(g, p, state_again)
    assert_bit_equal((again, state_again), (u, state))
    assert step._cache_size() == 1


def test_a_batch_of_runs_is_each_run_alone():
    tx = optax.chain(mo.contrib.scale_by_adaptive_storm(10.0), mo.contrib.mars_correction(0.9, 0.3))

    def last(signal, before):
        def step(state, pair):
            u, state = tx.update(pair[0], state, previous_gradient=pair[1])
            return state, u

        return jax.lax.scan(step, tx.init(signal[0]), (signal, before))[1][-1]

    signal, before = (jnp.stack([g["b"] for g in x]).reshape(2, 4, 4) for x in (SIGNAL, BEFORE))
    both = jax.jit(jax.vmap(last))(signal, before)
    for i in range(2):
        np.testing.assert_allclose(both[i], last(signal[i], before[i]), rtol=1e-5)


@pytest.mark.parametrize(
    "tx",
    [mo.contrib.scale_by_storm(0.1), mo.contrib.storm(1.0), mo.contrib.mars_adamw(0.1)],
    ids=["storm", "adaptive", "mars"],
)
def test_a_second_gradient_that_does_not_fit_is_refused(tx):
    state, g = tx.init(LIKE), SIGNAL[0]
    with pytest.raises(TypeError, match="previous_gradient must be given to update"):
        tx.update(g, state)
    with pytest.raises(ValueError, match=r"previous_gradient must have one tree, got a difference in params\['b'\]"):
        tx.update(g, state, previous_gradient={"a": g["a"]})
    with pytest.raises(ValueError, match=r"the gradient's shape \(4,\) at params\['b'\], got \(3,\)"):
        tx.update(g, state, previous_gradient={**g, "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"the gradient's shape \(4,\) at params\['b'\], got None"):
        tx.update(g, state, previous_gradient={**g, "b": None})
