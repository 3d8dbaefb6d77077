"""One compilation, donation and no shared buffers; coefficients given in any way."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    NOT_DEBIASABLE,
    OWN_SCHEDULE,
    RULES,
    avals,
    every_rule,
    every_storage,
    gradients,
    normal,
    numeric_arguments,
    pointers,
    runner,
    slot,
    slow_decay,
    trajectory,
)

import momentum_optax as mo

MIXED = {
    "bf16": jax.ShapeDtypeStruct((3,), jnp.bfloat16),
    "f16": jax.ShapeDtypeStruct((2, 3), jnp.float16),
    "f32": jax.ShapeDtypeStruct((3, 2), jnp.float32),
    "complex": jax.ShapeDtypeStruct((2,), jnp.complex64),
    "scalar": jax.ShapeDtypeStruct((), jnp.float32),
    "empty": jax.ShapeDtypeStruct((0, 3), jnp.float32),
}


def zeros(like):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(32)
@every_rule
@every_storage
def test_a_compiled_step_donates_its_state_compiles_once_and_shares_no_buffer(rule, storage):
    tx = runner(rule, storage, debias=rule not in NOT_DEBIASABLE)

    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state, updates

    compiled = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.ones_like, zeros(MIXED))
    state = jax.jit(tx.init)(params)
    for seed in range(3):
        g = gradients(MIXED, seed)
        old = [x for x in jax.tree.leaves((params, state)) if x.size]
        params, state, updates = compiled(params, state, g)
        assert all(x.is_deleted() for x in old)
        kept = pointers((params, state, updates, g))
        assert len(kept) == len(set(kept))
    assert compiled._cache_size() == 1


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(12)
@every_rule
@every_storage
def test_an_eager_update_shares_no_buffer_with_anything(rule, storage):
    tx = runner(rule, storage, debias=rule not in NOT_DEBIASABLE)
    like = {"a": jnp.ones((4, 2)), "b": jnp.ones((4, 2), jnp.bfloat16)}
    states = [tx.init(like)]
    everything = [like, states[0]]
    for seed in range(2):
        g = gradients(like, seed)
        updates, state = tx.update(g, states[-1], like)
        states.append(state)
        everything += [g, updates, state]
    kept = pointers(everything)
    assert len(kept) == len(set(kept))


@pytest.mark.parametrize(
    "rule",
    [
        *(mo.heavy_ball(0.0), mo.aggregated((0.0, 0.9)), mo.optimistic(1.0, 0.0), mo.pid(1.0, 1.0, 0.0, 0.0)),
        *(mo.Filter(A=1, B=1, C=1, D=0), mo.Filter(A=1, B=0, C=0, D=1), mo.Filter(A=0, B=1, C=1, D=0)),
    ],
    ids=["heavy ball 0", "aggregated 0", "optimistic 0", "pid 0", "integrator", "identity", "delay"],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_coefficients_of_zero_and_one_copy_what_they_pass_through(rule, wrap):
    tx = mo.scale_by_momentum(rule)
    g = normal((4,))
    state = tx.init(g)
    updates, after = wrap(tx.update)(g, state)
    kept = pointers((g, state, updates, after))
    assert len(kept) == len(set(kept))


@pytest.mark.one_in(24)
@every_rule
def test_traced_scheduled_and_vmapped_arguments_equal_a_python_loop_over_numbers(rule, x64):
    arguments = numeric_arguments(rule)
    if not arguments:
        arguments = {"aggregated": ["decays"], "optimized_gradient": [], "optimized_gradient_norm": []}[rule]
    steps, factors = 6, np.array([1.0, 0.97])
    signal = normal((steps, 3), dtype=jnp.float64)
    traces = []

    def values(argument, factor):
        """The argument times `factor`, and a schedule that starts there."""
        value = RULES[rule].keywords[argument]
        if argument == "decays":
            decays = tuple(d * factor for d in value)
            return decays, tuple(lambda step, d=d: d * (1 - 0.01 * step) for d in decays)
        return value * factor, lambda step: value * factor * (1 - 0.002 * step)

    def run(factor):
        traces.append(factor)
        out = {}
        for argument in arguments:
            constant, scheduled = values(argument, factor)
            out[argument] = trajectory(mo.scale_by_momentum(RULES[rule](**{argument: constant})), signal)[0]
            if rule not in OWN_SCHEDULE:
                tx = mo.scale_by_momentum(RULES[rule](**{argument: scheduled}))
                out[argument + " scheduled"] = trajectory(tx, signal)[0]
        return out

    got = jax.jit(jax.vmap(run))(jnp.asarray(factors))
    assert len(traces) == 1
    for i, factor in enumerate(factors.tolist()):
        for argument in arguments:
            constant, scheduled = values(argument, factor)
            expected = RULES[rule](**{argument: constant}).response(signal)
            np.testing.assert_allclose(got[argument][i], expected, rtol=1e-11, atol=1e-13)
            if rule not in OWN_SCHEDULE:
                expected = RULES[rule](**{argument: scheduled}).response(signal)
                np.testing.assert_allclose(got[argument + " scheduled"][i], expected, rtol=1e-11, atol=1e-13)
        # Contract 6 for the rules: each argument matters.
    for argument in arguments:
        assert not np.allclose(got[argument][0], got[argument][1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["number", "array", "schedule", "injected", "injected schedule"], ids=lambda k: k)
def test_a_decay_given_in_any_way_compiles_once_for_five_steps(kind):
    tx = slow_decay(kind)
    g = normal((3,))
    step, state = jax.jit(tx.update), tx.init(g)
    for _ in range(5):
        _, state = step(g, state, g)
    assert step._cache_size() == 1


def test_the_decay_of_a_compiled_step_can_be_an_argument_of_it():
    g = normal((3,))
    step = jax.jit(lambda decay, g, s: mo.scale_by_momentum(mo.nesterov(decay)).update(g, s))
    state = mo.scale_by_momentum(mo.nesterov(0.5)).init(g)
    v = np.zeros(3)
    for decay in (0.5, 0.9, 0.0, 0.99):
        u, state = step(decay, g, state)
        v = decay * (v + np.float64(g))
        np.testing.assert_allclose(u, v + np.float64(g), rtol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.one_in(8)
@pytest.mark.rare_storages
@every_rule
@every_storage
def test_init_takes_shapes_scalars_and_empty_leaves_and_empty_trees(rule, storage):
    tx = runner(rule, storage, debias=rule not in NOT_DEBIASABLE)
    tree = {**MIXED, "none": None, "masked": optax.MaskedNode(), "nested": [{}, ()]}
    state = tx.init(tree)
    assert avals(state) == avals(tx.init(zeros(tree))) == avals(jax.eval_shape(tx.init, tree))
    updates, after = jax.eval_shape(tx.update, tree, state, tree)
    assert avals(after) == avals(state)
    assert updates["none"] is None
    assert updates["masked"] == optax.MaskedNode()
    updates, after = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert avals(after) == avals(tx.init({}))


@pytest.mark.one_in(2)
@pytest.mark.rare_storages
@every_rule
@every_storage
def test_every_part_of_the_state_has_the_rank_of_its_parameter(rule, storage):
    tx = runner(rule, storage, debias=rule not in NOT_DEBIASABLE)
    state = jax.eval_shape(tx.init, MIXED)
    for name, leaf in MIXED.items():
        assert {len(x.shape) for x in slot(state, name)} <= {len(leaf.shape)}
