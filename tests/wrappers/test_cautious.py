"""Cautious updates and weight decay against the published code in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from stepping import LIKE, TURNING, steps

import momentum_optax as mo


def c_optim_lion(u, g):
    mask = (u * g > 0).astype(np.float64)
    return u * mask * (mask.size / (mask.sum() + 1))


def timm(u, g):
    mask = (u * g > 0).astype(np.float64)
    return u * (mask / np.maximum(mask.mean(), 1e-3))


def heavyball(u, g):
    masked = np.signbit(u) ^ np.signbit(g)
    scale = masked.size / max(masked.size - masked.sum(), 1)
    return np.where(masked, 0, u) * scale


CAUTIOUS = {"count": c_optim_lion, "mean": timm, "sign_bit": heavyball}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("scaling", CAUTIOUS)
def test_cautious_updates_are_those_of_the_published_code(scaling):
    rule = mo.heavy_ball(0.9)
    # Leaves of different scales; zeros of either sign; one leaf with little or no agreement.
    turned = [
        {**g, "none": jnp.full(2000, float(s))} for g, s in zip(TURNING, (1, -0.1, 0.1, 1, -0.1, 1, 1, -1), strict=True)
    ]
    turned[1]["b"] = turned[1]["b"].at[:2].set(jnp.array([0.0, -0.0]))
    # Shares below and above the least of one in a thousand.
    turned[1]["none"] = turned[1]["none"].at[0].set(0.1)
    turned[4]["none"] = turned[4]["none"].at[:5].set(0.1)
    like = {**LIKE, "none": jnp.zeros(2000)}
    out, state = steps(mo.cautious(mo.scale_by_momentum(rule), scaling), turned, like)
    buffer, dropped = jax.tree.map(lambda x: np.zeros(x.shape), like), 0
    for u, g in zip(out, turned, strict=True):
        for name in like:
            buffer[name] = 0.9 * buffer[name] + np.float64(g[name])
            expected = CAUTIOUS[scaling](buffer[name], np.float64(g[name]))
            np.testing.assert_allclose(u[name], expected, rtol=1e-5, atol=1e-6)
            dropped += np.sum(expected == 0)
    assert dropped > 2000
    assert_bit_equal(state, steps(mo.scale_by_momentum(rule), turned, like)[1])


@pytest.mark.parametrize("scaling", CAUTIOUS)
def test_the_factor_of_a_cautious_update_is_as_wide_as_the_leaf(scaling, x64):
    u, g = np.arange(1.0, 8.0), np.array([1.0, 1, -1, 1, -1, -1, 1])
    tx = mo.cautious(optax.stateless(lambda _, __: jnp.asarray(u)), scaling)
    got, _ = tx.update(jnp.asarray(g), tx.init(jnp.asarray(g)))
    np.testing.assert_allclose(got, CAUTIOUS[scaling](u, g), rtol=1e-15)


def test_cautious_lion_is_the_authors():
    lion = optax.chain(mo.scale_by_momentum(mo.lion_mix(0.9, 0.99)), optax.scale_by_sign())
    out, _ = steps(optax.chain(mo.cautious(lion, "count"), optax.scale_by_learning_rate(0.1)), TURNING)
    average = jax.tree.map(lambda x: np.zeros(x.shape), LIKE)
    for u, g in zip(out, TURNING, strict=True):
        for name in LIKE:
            grad = np.float64(g[name])
            expected = -0.1 * c_optim_lion(np.sign(0.9 * average[name] + 0.1 * grad), grad)
            average[name] = 0.99 * average[name] + 0.01 * grad
            np.testing.assert_allclose(u[name], expected, rtol=1e-5)


def fixed(u):
    """A transformation whose update is `u`."""
    return optax.stateless(lambda g, p: u)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("scaling", CAUTIOUS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_cautious_masks_hold_for_tiny_numbers_zeros_and_every_dtype(scaling, dtype):
    tiny = 1e-4 if dtype == jnp.float16 else 1e-30
    u = jnp.array([1, -1, 0.0, -0.0, 2, tiny, tiny, -0.0], dtype)
    g = jnp.array([1, 1, 1.0, 1.0, 0, tiny, -tiny, -1], dtype)
    got, _ = mo.cautious(fixed(u), scaling).update(g, optax.EmptyState())
    expected = CAUTIOUS[scaling](np.float64(u), np.float64(g))
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float64(got), expected, rtol=2 * float(jnp.finfo(dtype).eps))
    empty, _ = mo.cautious(optax.identity(), scaling).update(jnp.zeros((0, 3), dtype), optax.EmptyState())
    assert empty.shape == (0, 3)
    none, _ = mo.cautious(optax.identity(), scaling).update({"a": g, "b": None}, optax.EmptyState())
    assert none["b"] is None
    rows, _ = jax.vmap(lambda u, g: mo.cautious(fixed(u), scaling).update(g, optax.EmptyState()))(
        jnp.stack([u, g]), jnp.stack([g, g])
    )
    np.testing.assert_array_equal(rows[0], got)


@pytest.mark.parametrize("agreement", ["product", "sign_bit"])
def test_cautious_weight_decay_is_that_of_the_published_code(agreement):
    u = np.array([1.0, 1, -1, -1, 0, 0, -0.0, -0.0, 2])
    p = np.array([3.0, -3, 3, -3, 3, -3, 3, -3, 0])
    mask = u * p >= 0 if agreement == "product" else ~(np.signbit(u) ^ np.signbit(p))
    tx = mo.add_cautious_weight_decay(optax.linear_schedule(0.1, 0.3, 2), agreement)
    signal = {"a": jnp.asarray(u, jnp.float32), "b": jnp.asarray(u, jnp.bfloat16)}
    out, state = steps(tx, [signal] * 3, {"a": jnp.asarray(p, jnp.float32), "b": jnp.asarray(p, jnp.float32)})
    for got, rate in zip(out, (0.1, 0.2, 0.3), strict=True):
        np.testing.assert_allclose(got["a"], u + rate * mask * p, rtol=1e-6)
        np.testing.assert_allclose(np.float64(got["b"]), u + rate * mask * p, rtol=2**-8)
        assert got["b"].dtype == jnp.bfloat16
    assert state.step == 3
    constant = mo.add_cautious_weight_decay(0.1, agreement)
    assert jax.tree.leaves(constant.init(signal)) == []
    none, _ = constant.update({"a": None, "b": optax.MaskedNode()}, constant.init(signal), signal)
    assert none == {"a": None, "b": optax.MaskedNode()}


@pytest.mark.parametrize(
    ("updates", "params", "match"),
    [
        ({"a": 1}, {"a": 1, "b": 1}, r"the gradients lack params\['b'\], present in params"),
        ({"a": 1, "b": 1}, {"a": 1}, r"the gradients have params\['b'\], absent in params"),
        ({"a": 1, "b": 1}, {"a": 1, "b": None}, r"a gradient for params\['b'\], which was None in params"),
        ({"a": 1, "b": 1}, {"a": 1, "b": optax.MaskedNode()}, r"for params\['b'\], which was None in params"),
        ({"a": 1}, {"a": {"c": 1}}, r"the gradients lack params\['a'\]\['c'\], present in params"),
        ({"a": 1}, {"a": np.ones((3, 2))}, r"for params\['a'\] must have shape \(3, 2\), got \(\)"),
    ],
)
def test_a_cautious_weight_decay_names_the_leaf_that_does_not_fit(updates, params, match):
    tx = mo.add_cautious_weight_decay(0.1, "product")
    updates, params = (jax.tree.map(np.float32, tree) for tree in (updates, params))
    with pytest.raises(ValueError, match=match):
        tx.update(updates, tx.init(params), params)


def test_a_cautious_weight_decay_keeps_what_is_masked_on_either_side_boxed_or_not():
    tx = mo.add_cautious_weight_decay(0.5, "product")
    masked = optax.MaskedNode()
    updates = {"a": np.ones(2, np.float32), "b": None, "c": masked, "d": masked, "e": None}
    params = {"a": np.full(2, 2, np.float32), "b": masked, "c": None, "d": np.ones(3), "e": np.ones(3)}
    for wrap in (lambda x: x, lambda x: nn.Partitioned(x, (None,))):
        given = {key: x if x is None else wrap(x) for key, x in updates.items()}
        out, _ = tx.update(given, tx.init(params), params)
        assert jax.tree.structure(out) == jax.tree.structure(given)
        np.testing.assert_array_equal(nn.meta.unbox(out)["a"], [2, 2])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scaling", CAUTIOUS)
def test_nothing_is_divided_by_zero_where_no_element_agrees(scaling):
    tx = mo.cautious(optax.scale(-1.0), scaling)
    # What a selection would hide is seen here: every operation is looked at by itself.
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
        u, _ = tx.update({"a": jnp.ones(3)}, tx.init({"a": jnp.ones(3)}))
    np.testing.assert_array_equal(u["a"], 0)


def test_what_cannot_be_cautious_is_refused():
    with pytest.raises(ValueError, match="scaling must be one of 'count', 'mean', 'sign_bit', got 'sum'"):
        mo.cautious(optax.identity(), "sum")
    with pytest.raises(TypeError, match="tx must be a transformation"):
        mo.cautious(mo.heavy_ball(0.9), "count")
    with pytest.raises(TypeError, match=r"params\['z'\] must be real, got complex64"):
        mo.cautious(optax.identity(), "count").update({"z": jnp.ones(2, jnp.complex64)}, optax.EmptyState())
    with pytest.raises(ValueError, match="agreement must be one of 'product', 'sign_bit', got 'mean'"):
        mo.add_cautious_weight_decay(0.1, "mean")
    with pytest.raises(ValueError, match="weight_decay must be in"):
        mo.add_cautious_weight_decay(-0.1, "product")
    tx = mo.add_cautious_weight_decay(0.1, "product")
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(LIKE, tx.init(LIKE))
    for update, param, match in (
        (jnp.complex64, jnp.complex64, r"the update of params\['z'\] must be real"),
        (jnp.complex64, jnp.float32, r"the update of params\['z'\] must be real"),
        (jnp.float32, jnp.complex64, r"^params\['z'\] must be real, got complex64; leave it out with optax\.masked"),
    ):
        with pytest.raises(TypeError, match=match):
            jax.eval_shape(tx.update, {"z": jnp.ones(2, update)}, tx.init(LIKE), {"z": jnp.ones(2, param)})
