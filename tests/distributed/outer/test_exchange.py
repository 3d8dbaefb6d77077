"""Exchanges: weights of workers, missing workers, bytes with error feedback."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed.outer.workers import WORKERS, Velocity, assert_follows, exchanged, rounds

from momentum_optax.distributed import outer


def test_workers_join_leave_and_count_for_what_they_say(x64):
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 3, size=(12, WORKERS)).astype(float)
    weights[4] = 0  # nobody is there
    v = Velocity()

    def move(x, mean, t):
        v.value = 0.9 * v.value + (x - mean)
        return x - 0.7 * ((x - mean) + 0.9 * v.value)

    assert_follows(outer.diloco(), move, weights=weights)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_what_a_missing_worker_holds_does_not_matter(exchange):
    kind = outer.local_sgd(exchange=exchange)
    start = {"w": jnp.ones((3, 5))}
    state = jax.vmap(kind.init)(jax.tree.map(lambda a: jnp.stack([a] * 2), start))
    params = {"w": jnp.stack([jnp.full((3, 5), 2.0), jnp.full((3, 5), jnp.nan)])}
    go = jax.vmap(functools.partial(kind.sync, axis_name="workers"), axis_name="workers")
    new, state = jax.vmap(lambda p, s, w: kind.sync(p, s, axis_name="workers", weight=w), axis_name="workers")(
        params, state, jnp.asarray([1.0, 0.0])
    )
    np.testing.assert_allclose(new["w"], 2.0, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert not np.isfinite(np.asarray(go(params, state)[0]["w"])).all()


@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_leaves_of_every_kind_are_averaged(exchange):
    kind = outer.local_sgd(exchange=exchange)
    one = {"complex": jnp.zeros(3, jnp.complex64), "none": None, "scalar": jnp.zeros(()), "empty": jnp.zeros((3, 0))}
    params = jax.tree.map(lambda x: jnp.zeros((2, *x.shape), x.dtype), one)
    state = jax.vmap(kind.init)(params)
    moved = params | {"complex": jnp.array([[1 + 1j] * 3, [2j] * 3], jnp.complex64), "scalar": jnp.array([127.0, 1.0])}
    go = jax.jit(jax.vmap(functools.partial(kind.sync, axis_name="workers"), axis_name="workers"))
    new, state = go(moved, state)
    np.testing.assert_allclose(new["complex"], 0.5 + 1.5j, rtol=1e-6)
    np.testing.assert_allclose(new["scalar"], 64, rtol=1e-6)
    assert new["empty"].shape == (2, 3, 0)
    assert new["none"] is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_third_is_as_exact_as_arithmetic_is(dtype, x64):
    # Of one worker's value, seen in the mean over many values: a rounded third is off for all of them alike.
    kind, start = outer.local_sgd(), jnp.zeros((3, 4096), dtype)
    moved = jnp.asarray(np.random.default_rng(0).uniform(1, 2, 4096) * np.eye(3)[0][:, None], dtype)
    go = jax.jit(jax.vmap(functools.partial(kind.sync, axis_name="workers"), axis_name="workers"))
    new, _ = go(moved, jax.vmap(kind.init)(start))
    assert np.mean(np.float64(new[0]) / np.float64(moved[0])) * 3 == pytest.approx(
        1, abs=1e-4 if dtype == "bfloat16" else 1e-12
    )


def test_a_whole_number_among_the_parameters_is_named():
    # A mean of whole numbers is none: in their dtype it would be 0.
    with pytest.raises(TypeError, match=r"params\['n'\] must have a dtype of bfloat16, .*, got int32"):
        outer.local_sgd().init({"w": jnp.ones(3), "n": jnp.int32(3)})


def test_bytes_say_everything_in_the_end():
    kind = outer.local_sgd(exchange="int8")
    found, state, _ = rounds(kind, count=40, dtype=np.float32)
    exact = rounds(outer.local_sgd(), count=40, dtype=np.float32)[0]
    assert 1e-5 < np.abs(np.asarray(found) - exact).max() < 0.01
    # The anchor moved by the mean of what was said; what was not said is in the residuals, half a code at most.
    left = float(np.abs(state.residual["w"]).max())
    assert 0 < left < 0.01
    np.testing.assert_allclose(found[-1], exact[-1], rtol=0, atol=2 * left)


def test_rounding_errors_are_carried_over_and_not_lost():
    kind = outer.local_sgd(exchange="int8")
    # Beside 1 the small numbers are below half a code: only the residual can bring them through.
    step = jnp.concatenate([jnp.ones((1, 1)), jnp.full((1, 7), 1e-3)], 1)
    params, state = {"w": jnp.zeros((1, 1, 8))}, jax.vmap(kind.init)({"w": jnp.zeros((1, 1, 8))})
    go = jax.jit(jax.vmap(lambda p, s: kind.sync(p, s, axis_name="workers"), axis_name="workers"))
    for _ in range(100):
        params, state = go({"w": params["w"] - step}, state)
    np.testing.assert_allclose(state.anchor["w"][0, 0, 1:], -0.1, atol=0.006)


def test_a_worker_that_was_missing_has_still_to_say_what_it_had_not_said():
    kind = outer.local_sgd(exchange="int8")
    start = {"w": jnp.zeros((2, 1, 8))}
    # Two workers; beside 1 the small numbers are below half a code, so that all of them stay behind.
    step = jnp.asarray([1.0] + [1e-3] * 7).reshape(1, 1, 8)
    go = jax.jit(jax.vmap(lambda p, s, w: kind.sync(p, s, axis_name="workers", weight=w), axis_name="workers"))
    params, state = go({"w": start["w"] - step}, jax.vmap(kind.init)(start), jnp.ones(2))
    left = np.asarray(state.residual["w"])
    np.testing.assert_allclose(left[:, 0, 1:], 1e-3, rtol=1e-5)
    for weight in ([1.0, 0.0], [2.0, 0.0]):
        params, state = go(params, state, jnp.asarray(weight))
        np.testing.assert_array_equal(state.residual["w"][1], left[1])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_nothing_is_divided_by_zero_where_nobody_is_there_or_nobody_moved(exchange):
    kind = outer.outer_momentum(optax.sgd(0.7, 0.9), exchange=exchange)
    params = {"w": jnp.zeros((WORKERS, 2, 3)).at[:, 0].set(1.0)}
    # What a selection would hide is seen here: every operation is looked at by itself.
    with jax.debug_nans(True), jax.disable_jit():
        for weight in (jnp.zeros(WORKERS), jnp.ones(WORKERS)):
            state = exchanged(kind, params, weight)
            assert np.all(np.isfinite(state.anchor["w"]))


def test_every_row_of_an_exchange_in_bytes_has_its_own_scale():
    rows = np.array([1e-6, 1.0, 1e6])[:, None] * np.random.default_rng(0).normal(size=(3, 40))
    params = {"w": jnp.asarray(np.broadcast_to(rows, (WORKERS, 3, 40)), jnp.float32)}
    state = exchanged(outer.local_sgd(exchange="int8"), params)
    # Half a code of 127, at most.
    error = np.abs(state.anchor["w"][0] - rows).max(1)
    assert np.all(error <= np.abs(rows).max(1) / 254 * (1 + 1e-5))
    assert np.all(error > 0)
