"""Trees of gradients: what is missing, too much, or not finite; reading velocities."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    NOT_DEBIASABLE,
    RULES,
    assert_bit_equal,
    descend,
    every_rule,
    every_storage,
    gradients,
    normal,
    runner,
    slot,
)

import momentum_optax as mo
from momentum_optax.storage import resolve

# Whatever passes None on.
PASSING_NONE = {
    "a rule": lambda: mo.sgd(0.1, 0.9, weight_decay=0.1),
    "micro-batches": lambda: mo.accumulated(mo.ema(0.9), 2),
    "guarded": lambda: mo.guarded(mo.sgd(0.1, 0.9), "leaf"),
    "restarted": lambda: mo.adaptive_restart(mo.heavy_ball(0.9)),
    "matrices": lambda: mo.muon(0.1),
}


@pytest.mark.parametrize("name", PASSING_NONE)
def test_a_gradient_may_be_missing_in_its_box_as_tree_map_leaves_it(name):
    params = {
        key: nn.Partitioned(jnp.ones(shape), ("x", None)[: len(shape)]) for key, shape in (("w", (3, 4)), ("b", (4,)))
    }
    frozen = {key: nn.Partitioned(None, x.names) if key == "w" else x for key, x in params.items()}
    tx = PASSING_NONE[name]()
    state = jax.eval_shape(tx.init, params)
    updates, new = jax.eval_shape(tx.update, frozen, state, params)
    expected, _ = jax.eval_shape(tx.update, {**frozen, "w": None}, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(frozen)
    assert jax.tree.leaves(updates) == jax.tree.leaves(expected)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.structure(jax.eval_shape(mo.apply_updates, params, updates)) == jax.tree.structure(params)


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(8)
@every_rule
@every_storage
def test_a_missing_gradient_keeps_its_leaf_to_the_bit_and_moves_the_others(rule, storage):
    tx = runner(rule, storage, debias=rule not in NOT_DEBIASABLE)
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((3,), jnp.bfloat16)}
    signal = [gradients(params, seed) for seed in range(4)]
    partial = [signal[0], {**signal[1], "a": None}, {**signal[2], "a": None}, signal[3]]
    state = full = only = tx.init(params)
    for g, h in zip(partial, signal, strict=True):
        before = slot(state, "a")
        updates, state = tx.update(g, state, params)
        expected, full = tx.update(h, full, params)
        np.testing.assert_array_equal(updates["b"], expected["b"])
        assert_bit_equal(slot(state, "b"), slot(full, "b"))
        if g["a"] is None:
            assert updates["a"] is None
            assert_bit_equal(slot(state, "a"), before)
            assert mo.apply_updates(params, updates)["a"] is params["a"]
        else:
            _, only = tx.update(h, only, params)
    if not (RULES[rule]().reads_step or resolve(storage).reads_step):
        # The missing steps might as well not have happened.
        assert_bit_equal(slot(state, "a"), slot(only, "a"))


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda g: {"a": g["a"]}, r"lack params\['b'\]\['c'\]"),
        (lambda g: {**g, "d": g["a"]}, r"have params\['d'\]"),
        (lambda g: {"a": g["a"], "b": [g["b"]["c"]]}, r"lack params\['b'\]\['c'\]"),
        (lambda g: {**g, "b": {"c": g["b"]["c"][:1]}}, r"params\['b'\]\['c'\] must have shape \(2, 3\), got \(1, 3\)"),
        (lambda g: {**g, "n": g["a"]}, r"a gradient for params\['n'\], which was None at init"),
    ],
    ids=["missing", "extra", "container", "shape", "was none"],
)
@every_storage
def test_gradients_of_another_tree_are_rejected_by_path(change, match, storage):
    params = {"a": jnp.ones((3,)), "b": {"c": jnp.ones((2, 3))}, "n": None}
    for tx in (runner("ema", storage), runner("grokfast_average", storage, debias=True)):
        with pytest.raises(ValueError, match=match):
            tx.update(change(params), tx.init(params))


def test_of_many_paths_that_differ_a_few_are_named():
    params = {f"layer_{i:02}": {"kernel": jnp.ones(2)} for i in range(40)}
    tx = runner("ema")
    for given, at_init, words in (({}, params, "lack"), (params, {}, "have")):
        match = rf"the gradients {words} .*layer_01'\]\['kernel'\] and 38 more, "
        with pytest.raises(ValueError, match=match) as caught:
            tx.update(given, tx.init(at_init))
        assert len(str(caught.value)) < 300


def test_gradients_in_another_container_with_equal_paths_are_rejected():
    tx = runner("ema")
    with pytest.raises(ValueError, match="containers"):
        tx.update((jnp.ones(2),), tx.init([jnp.ones(2)]))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float8_e4m3fn", "float8_e5m2", "key"])
@every_storage
def test_leaves_that_are_no_floats_are_rejected_at_init_by_path(dtype, storage):
    leaf = jax.random.key(0) if dtype == "key" else jnp.zeros((2,), dtype)
    tx = runner("ema", storage)
    with pytest.raises(
        TypeError, match=r"params\['x'\]\[0\] must have a dtype of .*float32.*, got (key.*|" + dtype + "): keep it from"
    ):
        tx.init({"ok": jnp.ones(2), "x": [leaf]})


@pytest.mark.parametrize("leaf", [jax.nn.relu, "relu", object()], ids=["function", "string", "object"])
def test_leaves_that_are_no_arrays_are_rejected_by_path(leaf):
    # As in a module of Equinox that is not filtered.
    tx, params = runner("ema"), {"ok": jnp.ones(2), "x": jnp.ones(2)}
    calls = [lambda: tx.init({"x": leaf}), lambda: tx.update({**params, "x": leaf}, tx.init(params))]
    for call in (*calls, lambda: mo.average_params(0.9).init({"x": leaf})):
        with pytest.raises(TypeError, match=r"params\['x'\] must have a dtype of .*got .*equinox") as caught:
            call()
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize("rule", [mo.heavy_ball, mo.ema, lambda c: mo.grokfast(0.5, c)], ids=["sum", "average", "age"])
def test_a_schedule_of_more_than_a_number_is_refused_where_it_would_change_a_shape(rule):
    for leaf, value in ((jnp.float32(1), jnp.full(1, 0.5)), (jnp.ones((2, 3)), jnp.full(3, 0.5))):
        tx = mo.scale_by_momentum(rule(lambda step, value=value: value))
        with pytest.raises(ValueError, match=r"a coefficient must be a scalar at every step, got shape \("):
            tx.update(leaf, tx.init(leaf))


@pytest.mark.parametrize(("leaf", "gradient"), [("float32", "complex64"), ("complex64", "float32")])
@every_storage
def test_a_gradient_must_be_real_where_its_leaf_is_and_complex_where_it_is(leaf, gradient, storage):
    tx = runner("ema", storage)
    with pytest.raises(TypeError, match=r"params\['x'\] must be (real|complex) as at init, got " + gradient):
        tx.update({"x": jnp.ones(2, gradient)}, tx.init({"x": jnp.ones(2, leaf)}))


def test_apply_updates_skips_none_and_keeps_dtypes():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    new = mo.apply_updates(params, {"a": jnp.full(2, 0.5), "b": None})
    np.testing.assert_array_equal(np.float32(new["a"]), 1.5)
    assert new["a"].dtype == jnp.bfloat16
    assert new["b"] is params["b"]


@pytest.mark.one_in(8)
@every_rule
def test_a_nan_spoils_its_own_element_and_no_other(rule):
    tx = runner(rule, debias=rule not in NOT_DEBIASABLE)
    clean = {"a": normal((2, 3)), "b": normal((3,), 1)}
    bad = {**clean, "a": clean["a"].at[0, 1].set(jnp.nan)}
    state = tx.init(clean)
    _, state = tx.update(clean, state)
    (u, s), (expected, t) = tx.update(bad, state), tx.update(clean, state)
    where = np.zeros((2, 3), bool)
    where[0, 1] = True
    for got, right in zip((u, *mo.velocity(s)), (expected, *mo.velocity(t)), strict=True):
        np.testing.assert_array_equal(got["b"], right["b"])
        np.testing.assert_array_equal(np.asarray(got["a"])[~where], np.asarray(right["a"])[~where])
    assert np.isnan(u["a"][0, 1])
    # At least one velocity remembers it; a chain of past gradients does so one after the other.
    assert any(np.isnan(v["a"][0, 1]) for v in mo.velocity(s))


@pytest.mark.one_in(9)
@every_storage
def test_apply_if_finite_skips_the_step_and_training_goes_on(storage):
    tx = optax.apply_if_finite(mo.sgd(0.1, 0.9, dampening=0.5, storage=storage), 5)
    params = normal((4,))
    signal = list(normal((5, 4)))
    spoilt = [*signal[:2], jnp.full(4, jnp.nan), jnp.full(4, jnp.inf), *signal[2:]]
    (p, state), (q, clean) = (descend(tx, params, s) for s in (spoilt, signal))
    np.testing.assert_array_equal(p, q)
    assert_bit_equal(state.inner_state, clean.inner_state)
    assert int(state.total_notfinite) == 2
    # Stopped right after the bad step, the state is that from before it.
    assert_bit_equal(descend(tx, params, spoilt[:3])[1].inner_state, descend(tx, params, signal[:2])[1].inner_state)


@pytest.mark.one_in(4)
@every_storage
def test_velocity_is_found_in_every_wrapped_state(storage):
    g = {"a": normal((2, 3)), "b": normal((3,), 1)}
    heavy = mo.scale_by_momentum(mo.heavy_ball(0.9), storage=storage)

    def factory(scale):
        return optax.chain(optax.scale(scale), heavy)

    wrapped = {
        "chain": optax.chain(optax.clip(1e9), heavy, optax.scale(-0.1)),
        "masked": optax.masked(heavy, {"a": True, "b": False}),
        "partition": optax.partition({"m": heavy, "z": optax.set_to_zero()}, {"a": "m", "b": "z"}),
        "inject": optax.inject_hyperparams(factory)(1.0),
        "multi": optax.MultiSteps(heavy, 1),
        "finite": optax.apply_if_finite(heavy, 3),
    }
    for name, tx in wrapped.items():
        _, state = jax.jit(tx.update)(g, tx.init(g), g)
        (v,) = mo.velocity(state)
        stored = g["a"].astype("bfloat16").astype("float32") if storage == "bfloat16" else g["a"]
        if storage in ("float32", "bfloat16"):
            np.testing.assert_array_equal(v["a"], stored, err_msg=name)
        assert v["a"].dtype == jnp.float32
        if name in ("masked", "partition"):
            assert isinstance(v["b"], optax.MaskedNode)
        else:
            assert v["b"].shape == (3,)


def test_velocity_gives_one_tree_for_each_stored_velocity_rule_by_rule():
    g = {"a": jnp.ones(2)}
    aggregated = runner("aggregated")
    tx = optax.chain(aggregated, runner("ema"), optax.scale(2.0))
    state = tx.init(g)
    for _ in range(2):
        _, state = tx.update(g, state)
    fast, slow, average = mo.velocity(state)
    np.testing.assert_allclose(fast["a"], 1.9, rtol=1e-6)
    np.testing.assert_allclose(slow["a"], 1.99, rtol=1e-6)
    u = np.array([1.0, (1 + 1.9 + 1.99) / 3])
    np.testing.assert_allclose(average["a"], 0.1 * (0.9 * u[0] + u[1]), rtol=1e-6)
    assert mo.velocity(optax.adam(0.1).init(g)) == ()
    assert mo.velocity(mo.sgd(0.1, None).init(g)) == ()
