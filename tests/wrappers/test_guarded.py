"""`guarded` without limits for spikes: against the run without the bad steps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals, runner, slot
from stepping import LIKE, SIGNAL, steps, velocity

import momentum_optax as mo


def spoiled(gradient, name, value=jnp.nan):
    """`gradient` with one bad element in one leaf."""
    return {**gradient, name: gradient[name].at[(0,) * gradient[name].ndim].set(value)}


# Schedules of the step and of ages, several velocities, a window; then the other storages.
ROWS = [(rule, "float32") for rule in ("adan_mix", "chebyshev")] + [
    ("aggregated", "bfloat16"),
    ("nesterov", "int8"),
]


@pytest.mark.one_in(3)
@pytest.mark.rare_storages
@pytest.mark.parametrize(("rule", "storage"), ROWS)
def test_a_guarded_run_is_the_run_without_the_bad_steps(rule, storage):
    tx = mo.guarded(runner(rule, storage))
    step = jax.jit(tx.update)
    bad = {1: spoiled(SIGNAL[1], "b"), 4: spoiled(SIGNAL[4], "a", -jnp.inf)}
    state = clean = tx.init(LIKE)
    for i in range(6):
        u, state = step(bad.get(i, SIGNAL[i]), state)
        if i in bad:
            assert_bit_equal(u, LIKE)
            assert not state.finite
        else:
            expected, clean = step(SIGNAL[i], clean)
            assert_bit_equal(u, expected)
        assert_bit_equal(state.inner, clean.inner)
    assert (state.skipped, clean.skipped) == (2, 0)
    assert avals(state) == avals(tx.init(LIKE))


def test_guarded_by_leaf_is_a_gradient_of_none_for_the_bad_leaves():
    tx = runner("ema", debias=True)
    bad = {1: jnp.inf, 3: jnp.nan}
    signal = [spoiled(SIGNAL[i], "b", bad[i]) if i in bad else SIGNAL[i] for i in range(4)]
    out, state = steps(mo.guarded(tx, "leaf"), signal)
    step, plain = jax.jit(tx.update), tx.init(LIKE)
    for i, u in enumerate(out):
        expected, plain = step({**SIGNAL[i], "b": None} if i in bad else SIGNAL[i], plain)
        expected["b"] = np.zeros(4) if i in bad else expected["b"]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), u, expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), state.inner, plain)
    assert_bit_equal(state.skipped, {"a": jnp.array([[0]]), "b": jnp.array([2])})
    assert_bit_equal(state.finite, {"a": jnp.array([[True]]), "b": jnp.array([False])})


def test_guarded_by_leaf_holds_every_part_of_a_compressed_leaf_and_of_that_leaf_only():
    tx = mo.guarded(runner("nadam_mix", "int8"), "leaf")
    step = jax.jit(tx.update)
    _, state = step(SIGNAL[0], tx.init(LIKE))
    _, after = step(spoiled(SIGNAL[1], "b"), state)
    assert_bit_equal(slot(after.inner, "b"), slot(state.inner, "b"))
    assert len(slot(state.inner, "b")) == 5, "codes, scale, reach, noise and age"
    _, clean = step(SIGNAL[1], state)
    assert_bit_equal(slot(after.inner, "a"), slot(clean.inner, "a"))
    assert after.inner.step == 2


@pytest.mark.parametrize("lone", [lambda g: g, lambda g: {"a": g}], ids=["array", "tree"])
def test_where_there_is_one_leaf_its_bad_gradient_holds_the_counters_too(lone):
    tx = optax.chain(
        mo.scale_by_momentum(mo.nesterov(mo.schedules.fista())), optax.scale_by_schedule(lambda t: 1.0 + t)
    )
    signal = [lone(jnp.full(3, x)) for x in (1.0, jnp.nan, 2.0, -1.0)]
    (first, _, *others), state = steps(mo.guarded(tx, "leaf"), signal, lone(jnp.zeros(3)))
    expected, clean = steps(tx, [g for i, g in enumerate(signal) if i != 1], lone(jnp.zeros(3)))
    assert_bit_equal([first, *others], expected)
    assert_bit_equal(state.inner, clean)


def test_a_guarded_optimizer_leaves_parameters_and_schedules_alone():
    params = jax.tree.map(lambda x: x + 1.0, LIKE)
    rate = optax.linear_schedule(1.0, 0.0, 4)
    tx = mo.guarded(mo.sgd(rate, 0.9, weight_decay=0.1))
    out, state = steps(tx, [SIGNAL[0], spoiled(SIGNAL[1], "a"), SIGNAL[2]], params)
    assert_bit_equal(out[1], LIKE)
    v = np.float64(SIGNAL[0]["b"]) + 0.1
    np.testing.assert_allclose(out[0]["b"], -1.0 * v, rtol=1e-6)
    np.testing.assert_allclose(out[2]["b"], -0.75 * (0.9 * v + np.float64(SIGNAL[2]["b"]) + 0.1), rtol=1e-5)
    assert state.skipped == 1


def test_float16_gradients_that_overflowed_are_skipped_and_reported():
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)))
    state = tx.init(jnp.ones(3, jnp.float16))
    scale, scales = 2.0**15, []
    for _ in range(4):
        scaled = jnp.full(3, 8, jnp.float16) * jnp.float16(scale)
        u, state = tx.update(scaled.astype(jnp.float32) / scale, state)
        scale = scale if state.finite else scale / 2
        scales.append(scale)
    # 8 * 2^15, 2^14 and 2^13 overflow float16, whose largest is 65504; 8 * 2^12 does not.
    assert scales == [2.0**14, 2.0**13, 2.0**12, 2.0**12]
    np.testing.assert_array_equal(u, [8, 8, 8])
    np.testing.assert_array_equal(velocity(state)[0], [8, 8, 8])
    assert state.skipped == 3


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_guards_see_through_masks_partitions_and_missing_gradients(scope):
    inner = optax.chain(
        optax.masked(mo.scale_by_momentum(mo.heavy_ball(0.5)), {"a": True, "b": False}),
        optax.partition(
            {"x": mo.scale_by_momentum(mo.ema(0.5), storage="bfloat16"), "y": optax.identity()},
            {"a": "y", "b": "x"},
        ),
    )
    tx = mo.guarded(inner, scope)
    out, state = steps(tx, [SIGNAL[0], spoiled(SIGNAL[1], "b"), SIGNAL[2]])
    assert np.all(np.isfinite(out[2]["b"]))
    good = [0, 2] if scope == "tree" else [0, 1, 2]
    expected, _ = steps(mo.scale_by_momentum(mo.heavy_ball(0.5)), [SIGNAL[i] for i in good])
    np.testing.assert_array_equal(out[2]["a"], expected[-1]["a"])
    before = velocity(state)
    none, after = jax.jit(tx.update)({"a": None, "b": SIGNAL[3]["b"] * jnp.nan}, state)
    assert none["a"] is None
    assert_bit_equal(velocity(after), before)
    masked, _ = steps(optax.masked(tx, {"a": True, "b": True}), SIGNAL[:1])
    assert_bit_equal(masked[0], out[0])


@pytest.mark.parametrize("wrap", [mo.guarded, lambda tx, scope: mo.adaptive_restart(mo.nesterov(0.9), scope=scope)])
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_leaves_that_are_none_or_masked_from_the_start_stay_so(wrap, scope):
    tx = wrap(mo.scale_by_momentum(mo.nesterov(0.9)), scope)
    params = {"a": jnp.ones(2), "b": None, "c": jnp.ones(3)}
    gradient = {"a": jnp.full(2, 2.0), "b": None, "c": jnp.full(3, 2.0)}
    (u, *_), state = steps(optax.masked(tx, {"a": True, "b": True, "c": False}), [gradient] * 2, params)
    np.testing.assert_allclose(u["a"], [3.8, 3.8], rtol=1e-6)
    assert u["b"] is None
    np.testing.assert_array_equal(u["c"], gradient["c"])
    assert len(jax.tree.leaves(velocity(state))) == 1


def test_counts_of_leaves_in_boxes_of_linen_may_be_in_boxes_too():
    # An axis of one element keeps its name in the box of a count.
    params = {"a": nn.Partitioned(jnp.ones((1, 3)), names=("x", None)), "b": jnp.ones(2)}
    tx = mo.guarded(optax.identity(), "leaf", max_ratio=2.0)
    state = tx.init(params)
    assert isinstance(state.skipped["a"], nn.Partitioned)
    _, after = tx.update({**params, "b": jnp.full(2, jnp.nan)}, state)
    assert avals(after) == avals(state)
    assert jax.tree.leaves(after.skipped) == [0, 1]


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_what_optax_drops_for_a_gradient_of_none_is_kept(scope):
    # `optax.trace` returns None for the velocity of a leaf without a gradient.
    tx, g = mo.guarded(optax.trace(0.5), scope), {"a": jnp.ones(2), "b": jnp.ones(3)}
    _, state = tx.update(g, tx.init(g))
    u, state = tx.update({"a": None, "b": g["b"]}, state)
    assert u["a"] is None
    assert_bit_equal(state.inner.trace, {"a": np.ones(2, np.float32), "b": np.full(3, 1.5, np.float32)})
    u, _ = tx.update(g, state)
    np.testing.assert_array_equal(u["a"], np.full(2, 1.5))


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_guards_vmap_and_scan(scope):
    tx = mo.guarded(mo.scale_by_momentum(mo.nesterov(0.9)), scope)
    batch = jnp.stack([SIGNAL[0]["b"], SIGNAL[1]["b"].at[2].set(jnp.nan)])
    state = jax.vmap(tx.init)(batch)

    def step(state, g):
        u, state = jax.vmap(tx.update)(g, state)
        return state, u

    state, out = jax.lax.scan(step, state, jnp.stack([batch, batch]))
    np.testing.assert_array_equal(jnp.ravel(state.skipped), [0, 2])
    np.testing.assert_array_equal(out[:, 1], np.zeros((2, 4)))
    np.testing.assert_allclose(out[0, 0], 1.9 * batch[0], rtol=1e-6)


def test_what_cannot_be_guarded_is_refused():
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got 'row'"):
        mo.guarded(optax.identity(), "row")
    with pytest.raises(TypeError, match=r"tx must be a transformation with init and update, got 0\.9"):
        mo.guarded(0.9)
    tx = mo.guarded(mo.scale_by_momentum(mo.ema(0.9)), "leaf")
    with pytest.raises(ValueError, match=r"the gradients lack params\['b'\], present at init"):
        tx.update({"a": LIKE["a"]}, tx.init(LIKE))
    flat = mo.guarded(optax.flatten(mo.scale_by_momentum(mo.ema(0.9))), "leaf")
    with pytest.raises(ValueError, match=r"scope must be 'tree' .* got 'leaf' and state.* of shape \(10,\)"):
        flat.update(SIGNAL[0], flat.init(LIKE))
