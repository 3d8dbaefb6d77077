"""`telemetry`: from any state, batched, and the bytes that it counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from monitored import BALL, LIKE, SIGNAL, flat, norm, run

import momentum_optax as mo


def test_telemetry_is_found_in_any_state_and_under_a_transformation():
    def optimizer(rate):
        tx = mo.monitor(mo.scale_by_momentum(BALL, storage="bfloat16"))
        return optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale_by_learning_rate(rate))

    tx = optax.inject_hyperparams(optimizer)(rate=0.1)
    (*_, after), *_ = run(tx, SIGNAL[:1])
    got = mo.telemetry(after)
    assert got["gradient_norm"] == pytest.approx(1.0, rel=1e-2)
    assert all(type(x) is float for x in got.values())
    assert set(got) == {
        *("gradient_norm", "effective_learning_rate", "velocity_norm", "cosine", "quantization_error", "stalled"),
        *("bytes", "bytes_per_parameter"),
    }
    traced = jax.jit(mo.telemetry)(after)
    assert {name: float(x) for name, x in traced.items()} == pytest.approx(got)
    both = mo.telemetry((after, after))
    assert both["1/cosine"] == got["cosine"]
    assert len(both) == 2 * len(got)
    with pytest.raises(ValueError, match="opt_state must hold a state of monitor"):
        mo.telemetry(optax.adam(0.1).init(LIKE))


def test_batched_runs_have_batched_figures():
    batch = jnp.stack([g["a"] for g in SIGNAL[:3]])
    tx = mo.monitor(mo.scale_by_momentum(BALL), BALL, every=2)
    state = jax.vmap(tx.init)(batch)
    for _ in range(3):
        _, state = jax.jit(jax.vmap(tx.update))(batch, state)
    got = mo.telemetry(state)
    np.testing.assert_allclose(got["velocity_norm"], [2.71 * norm(flat(g["a"])) for g in SIGNAL[:3]], rtol=1e-5)
    np.testing.assert_allclose(got["cosine"], np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(got["mean_lag"], [(0.9 + 1.62) / 2.71] * 3, rtol=1e-6)


def test_bytes_are_counted():
    like = {"a": jnp.zeros((8, 512)), "b": jnp.zeros(4)}
    tx = mo.monitor(mo.scale_by_momentum(BALL, storage=mo.storage.int8(min_size=8)))
    # Codes; scale, reach and noise by row; the values of "b", and its parts; a step.
    expected = 8 * 512 + 8 * 12 + 4 * 4 + 3 * 4 + 4
    got = mo.telemetry(tx.init(like))
    assert got["bytes"] == expected
    assert got["bytes_per_parameter"] == expected / (8 * 512 + 4)
    nibbles = mo.monitor(mo.scale_by_momentum(BALL, storage=mo.storage.int4(min_size=8)))
    assert mo.telemetry(nibbles.init({"a": like["a"]}))["bytes"] == 8 * 512 / 2 + 8 * 12 + 4
