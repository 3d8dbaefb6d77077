"""Weights in 16 bits under `apply_updates(rounding="stochastic")`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import REAL, assert_bit_equal
from flax import linen as nn
from flax import nnx

import momentum_optax as mo
from momentum_optax.storage.rounding import stochastic_round

NARROW = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda x: jnp.dtype(x).name)


def neighbours(x, dtype):
    """The largest value of `dtype` not above x and the smallest not below, by NumPy and ml_dtypes alone."""
    import ml_dtypes

    near = np.float64(x).astype(dtype)
    toward = np.nextafter if dtype == np.float16 else ml_dtypes_nextafter
    below = near if np.float64(near) <= x else toward(near, dtype(-np.inf))
    above = near if np.float64(near) >= x else toward(near, dtype(np.inf))
    del ml_dtypes
    return np.float64(below), np.float64(above)


def ml_dtypes_nextafter(x, towards):
    import ml_dtypes

    bits = x.view(np.int16)
    if x == 0:
        return np.int16(1 if towards > 0 else -32767).view(ml_dtypes.bfloat16)
    away = (x > 0) == (towards > x)
    return np.int16(bits + (1 if away else -1)).view(ml_dtypes.bfloat16)


@pytest.mark.one_in(8)
@NARROW
@pytest.mark.parametrize("x", [1.0, 1.0011, -3.1415927, 2.0**-20 * 1.3, -(2.0**-14) * 0.99973, 1000.7, 0.0, -1e-6])
def test_the_mean_over_all_noise_is_the_value_and_only_neighbours_occur(x, dtype):
    x = np.float32(x)
    # As fine as the noise is read anywhere: 2^16 equal steps over 32 bits, each in the middle of its interval.
    bits = (jnp.arange(2**16, dtype=jnp.uint32) << 16) + np.uint32(2**15)
    got = np.asarray(stochastic_round(jnp.full(bits.shape, x), bits, dtype)).astype(np.float64)
    below, above = neighbours(np.float64(x), np.dtype(dtype).type)
    assert set(np.unique(got)) <= {below, above}
    # One of 65536 steps may fall to the other side.
    assert abs(got.mean() - np.float64(x)) <= (above - below) * 2.0**-16


@NARROW
def test_what_is_not_finite_stays_and_the_largest_value_does_not_overflow(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([np.nan, np.inf, -np.inf, largest, -largest, largest * (1 + 2.0**-14)], jnp.float32)
    got = np.asarray(stochastic_round(x, jnp.full(6, 2**32 - 1, jnp.uint32), dtype)).astype(np.float64)
    np.testing.assert_array_equal(got, [np.nan, np.inf, -np.inf, largest, -largest, largest])


@pytest.mark.one_in(2)
@NARROW
def test_weights_follow_the_sum_of_updates_too_small_for_them(dtype):
    start, update, steps = 1.0, -(2.0**-10) if dtype == jnp.bfloat16 else -(2.0**-13), 300
    params = {"w": jnp.full(4096, start, dtype)}
    updates = {"w": jnp.full(4096, update, dtype)}

    def body(p, t):
        return mo.apply_updates(p, updates, rounding="stochastic", step=t), None

    moved = np.asarray(jax.lax.scan(body, params, jnp.arange(steps))[0]["w"]).astype(np.float64)
    # Each step adds a Bernoulli variable of spacing d and mean u: standard deviation below sqrt(steps) d / 2 each.
    spacing = float(jnp.finfo(dtype).eps)
    bound = 5 * np.sqrt(steps) * spacing / 2 / np.sqrt(moved.size)
    assert abs(moved.mean() - (start + steps * update)) < bound
    near = params
    for _ in range(3):
        near = mo.apply_updates(near, updates)
    assert float(near["w"][0]) == start


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", REAL, ids=lambda x: jnp.dtype(x).name)
def test_every_dtype_narrower_than_float32_is_rounded(dtype):
    # By a quarter of the spacing, which is lost to nearest and may not be lost here.
    params, updates = jnp.ones(256, dtype), jnp.full(256, jnp.finfo(dtype).eps / 4, dtype)
    moved = mo.apply_updates(params, updates, rounding="stochastic", step=0) != params
    assert moved.any() == (jnp.finfo(dtype).bits < 32)


def test_wider_leaves_and_none_are_left_to_optax():
    params = {
        "a": jnp.asarray([1.0, 2.0]),
        "b": jnp.asarray([1.0], jnp.bfloat16),
        "c": jnp.asarray([1j], jnp.complex64),
    }
    updates = {"a": jnp.asarray([1e-4, 3e-5]), "b": None, "c": jnp.asarray([0.5], jnp.complex64)}
    new = mo.apply_updates(params, updates, rounding="stochastic", step=3)
    wide = {"a": params["a"], "c": params["c"]}
    assert_bit_equal({k: new[k] for k in wide}, optax.apply_updates(wide, {k: updates[k] for k in wide}))
    assert new["b"] is params["b"]


def test_numbers_of_python_and_parameters_that_are_left_out_are_taken_as_optax_takes_them():
    params = {"a": 1.0, "b": jnp.ones(2, jnp.bfloat16), "c": None}
    updates = {"a": 0.25, "b": 0.5, "c": jnp.ones(2)}
    new = mo.apply_updates(params, updates, rounding="stochastic", step=3)
    assert_bit_equal(new, optax.apply_updates(params, updates))
    masked = params | {"c": optax.MaskedNode()}
    assert_bit_equal(mo.apply_updates(masked, updates, rounding="stochastic", step=3)["b"], new["b"])


@pytest.mark.parametrize("options", [{}, {"rounding": "stochastic", "step": 3}], ids=["nearest", "stochastic"])
def test_boxes_of_flax_and_what_optax_masks_are_those_of_the_parameters(options):
    weights, moves = jnp.ones((4, 8), jnp.bfloat16), jnp.full((4, 8), 1e-3, jnp.bfloat16)
    bare = mo.apply_updates({"a": weights, "b": weights}, {"a": moves, "b": None}, **options)

    def partitioned(x):
        return nn.Partitioned(x, ("x", None))

    for box in (partitioned, nnx.Param):
        params = {"a": box(weights), "b": box(weights)}
        for updates in (
            {"a": box(moves), "b": None},
            {"a": moves, "b": optax.MaskedNode()},
            {"a": moves, "b": partitioned(None)},
        ):
            new = mo.apply_updates(params, updates, **options)
            assert jax.tree.structure(new) == jax.tree.structure(params)
            assert_bit_equal(jax.tree.leaves(new), jax.tree.leaves(bare))
        assert_bit_equal(mo.apply_updates({"a": weights, "b": weights}, {"a": box(moves), "b": None}, **options), bare)


def test_16_bits_are_rounded_without_promotion():
    for dtype in (jnp.bfloat16, jnp.float16):
        params, updates = jnp.ones(4, dtype), jnp.full(4, 1e-5, jnp.float32)
        exact = mo.apply_updates(params, updates, rounding="stochastic", step=3)
        with jax.numpy_dtype_promotion("strict"):
            strict = mo.apply_updates(params, updates, rounding="stochastic", step=jnp.asarray(3))
        assert_bit_equal(strict, exact)


def test_noise_depends_on_seed_step_leaf_and_element_and_on_nothing_else():
    half = jnp.full(4096, 1 + 2.0**-8, jnp.float32)
    params = {"a": jnp.ones(4096, jnp.bfloat16), "b": jnp.ones(4096, jnp.bfloat16)}
    updates = {k: (half - 1).astype(jnp.bfloat16) for k in params}

    def rounded(step=0, seed=0):
        new = jax.jit(lambda: mo.apply_updates(params, updates, rounding="stochastic", step=step, seed=seed))()
        return {k: np.asarray(v, np.float64) > 1 for k, v in new.items()}

    first = rounded()
    assert_bit_equal(first, rounded())
    draws = [first["a"], first["b"], rounded(step=1)["a"], rounded(seed=1)["a"]]
    for i, x in enumerate(draws):
        # Fair coins: 5 standard deviations of a mean of 4096, and of the share of agreements of two such rows.
        assert abs(x.mean() - 0.5) < 5 * 0.5 / 64
        for y in draws[:i]:
            assert abs((x == y).mean() - 0.5) < 5 * 0.5 / 64
    # Neighbouring elements differ too.
    assert abs((draws[0][1:] == draws[0][:-1]).mean() - 0.5) < 5 * 0.5 / 64


def test_weights_and_velocities_do_not_round_alike():
    params = {"w": jnp.ones(8192, jnp.bfloat16)}
    tx = mo.scale_by_momentum(mo.heavy_ball(1 - 2.0**-9), storage="bfloat16")
    state = tx.init(params)
    gradient = {"w": jnp.full(8192, 1 + 2.0**-9, jnp.float32)}
    _, state = tx.update(gradient, state)
    up = np.asarray(mo.velocity(state)[0]["w"]) > 1
    updates = {"w": jnp.full(8192, 2.0**-9, jnp.bfloat16)}
    new = mo.apply_updates(params, updates, rounding="stochastic", step=0)
    moved = np.asarray(new["w"], np.float64) > 1
    assert 0.1 < up.mean() < 0.4
    assert abs(np.corrcoef(up, moved)[0, 1]) < 5 / np.sqrt(8192)


def test_slopes_pass_straight_through():
    def loss(scale):
        params = {"w": jnp.ones(256, jnp.bfloat16)}
        updates = {"w": (scale * jnp.arange(256.0)).astype(jnp.float32)}
        new = mo.apply_updates(params, updates, rounding="stochastic", step=0)
        return jnp.sum(new["w"].astype(jnp.float32))

    assert float(jax.grad(loss)(0.25)) == pytest.approx(np.arange(256).sum(), rel=2.0**-8)


def test_arguments_are_checked():
    p = {"w": jnp.ones(3, jnp.bfloat16)}
    for options, error, words in (
        ({"rounding": "up"}, ValueError, "'nearest', 'stochastic'"),
        ({"rounding": "stochastic"}, ValueError, "needs step"),
        ({"step": 1}, ValueError, "rounding='stochastic'"),
        ({"seed": 1}, ValueError, "rounding='stochastic'"),
        *(({"rounding": "stochastic", "step": step}, TypeError, "integer") for step in (1.5, True, "1", [1], [[1]])),
        ({"rounding": "stochastic", "step": 1, "seed": -1}, ValueError, "seed"),
    ):
        with pytest.raises(error, match=words):
            mo.apply_updates(p, p, **options)
