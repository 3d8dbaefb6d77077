"""The chain of every dialect: storages, types, gradients of None, compiled steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals
from dialects import CALLS
from interop.dialect_calls import START, every, gradient, rate

import momentum_optax as mo
from momentum_optax.interop.dialect import DIALECTS

interop = mo.interop


@every
def test_a_storage_without_a_momentum_to_keep_is_refused(name):
    base, others = CALLS[name]
    # Nesterov's forms refuse a momentum of 0.
    still = {**base, "momentum": 0.0, **{key: False for key in others if "nesterov" in key}}
    if "momentum" not in others or DIALECTS[name].describe(**still).rule is not None:
        pytest.skip("it always keeps a velocity")
    with pytest.raises(ValueError, match="storage needs a momentum to keep, got 'int8' and momentum 0"):
        getattr(interop, name)(**still, storage="int8")


@every
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_the_velocity_can_be_kept_in_any_storage(name, storage):
    tx = getattr(interop, name)(**CALLS[name][0], storage=storage)
    params = {"w": jnp.ones((64, 128))}
    states = [s for s in tx.init(params) if isinstance(s, mo.transform.MomentumState)]
    (state,) = states
    alone = mo.scale_by_momentum(mo.ema(0.9), storage=storage).init(params)
    assert type(state.velocity) is type(alone.velocity)
    with pytest.raises(ValueError, match="storage must be one of"):
        getattr(interop, name)(**CALLS[name][0], storage="float8")


@pytest.mark.one_in(4)
@every
def test_a_step_compiles_once_and_keeps_its_types(name):
    tx = getattr(interop, name)(**CALLS[name][0])
    params = {"w": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(3)}
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(2):
        updates, new = step(jax.tree.map(lambda x: x / 2, params), state, params)
        assert avals(new) == avals(state)
        state = new
    assert [u.dtype for u in jax.tree.leaves(updates)] == [jnp.float32, jnp.bfloat16]
    assert step._cache_size() == 1


@every
def test_a_parameter_without_a_gradient_is_left_alone(name):
    base, others = CALLS[name]
    decay = {k: v for k, v in others.items() if k == "weight_decay"}
    tx = getattr(interop, name)(**{**base, **decay})
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    _, state = tx.update(params, tx.init(params), params)
    updates, after = tx.update({"a": params["a"], "b": None}, state, params)
    assert updates["b"] is None
    for old, new in zip(mo.velocity(state), mo.velocity(after), strict=True):
        np.testing.assert_array_equal(old["b"], new["b"])
        assert (old["a"] != new["a"]).any()


def test_without_momentum_there_is_no_state():
    for name in ("torch_sgd", "timm_sgdw", "flash_sgd", "keras_sgd"):
        state = getattr(interop, name)().init({"x": jnp.ones(3)})
        assert jax.tree.leaves(state) == []


@pytest.mark.parametrize("scheduled", [False, True])
def test_numbers_can_be_injected(scheduled):
    fixed = interop.torch_sgd(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)
    tx = optax.inject_hyperparams(interop.torch_sgd, static_args=("nesterov", "maximize", "storage"))(
        lr=(lambda t: 0.1 + 0 * t) if scheduled else 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1
    )
    p = {"x": jnp.asarray(START, jnp.float32)}
    a, b = fixed.init(p), tx.init(p)
    step = jax.jit(tx.update)
    for t in range(4):
        g = {"x": jnp.asarray(gradient(START, t), jnp.float32)}
        u, a = fixed.update(g, a, p)
        w, b = step(g, b, p)
        np.testing.assert_allclose(u["x"], w["x"], rtol=3e-7)
    b.hyperparams["momentum"] = jnp.float32(0.0)
    w, b = step(g, b, p)
    np.testing.assert_allclose(w["x"], -0.1 * (g["x"] + 0.1 * p["x"]), rtol=1e-6)


def test_a_scheduled_dialect_is_the_same_compiled():
    tx = interop.torch_sgd(lr=rate, momentum=lambda t: 0.5 + 0.01 * t, weight_decay=0.1, nesterov=True)
    params = {"x": jnp.asarray(START, jnp.float32)}

    def step(carry, g):
        params, state = carry
        updates, state = tx.update({"x": g}, state, params)
        return (optax.apply_updates(params, updates), state), None

    gradients = jnp.asarray([gradient(START, t) for t in range(20)], jnp.float32)
    (got, state), _ = jax.lax.scan(step, (params, tx.init(params)), gradients)
    x, v = START, 0.0
    for t, g in enumerate(np.float64(gradients)):
        m, d = 0.5 + 0.01 * t, g + 0.1 * x
        v = m * v + d
        x = x - rate(t) * (d + m * v)
    np.testing.assert_allclose(got["x"], x, rtol=2e-6)
    assert_bit_equal(jax.tree.structure(state), jax.tree.structure(tx.init(params)))
