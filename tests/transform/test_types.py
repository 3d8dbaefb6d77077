"""Types never drift, and nothing is computed more coarsely than it must be."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    EPS,
    NOT_DEBIASABLE,
    REAL,
    RULES,
    STORAGES,
    avals,
    every_rule,
    every_storage,
    runner,
    slow_decay,
    trajectory,
)

import momentum_optax as mo

every_runner = pytest.mark.parametrize(
    ("rule", "storage", "debias"),
    [(r, s, d) for r, s, d in itertools.product(RULES, STORAGES, (False, True)) if not (d and r in NOT_DEBIASABLE)],
    ids=lambda value: {True: "debiased", False: "plain"}.get(value, value) if isinstance(value, bool) else value,
)


def check_types(tx, real, complex_):
    """One abstract update of leaves of every pair of dtypes: parameters of the first, gradients of the second."""
    pairs = [*itertools.product(real, real), *itertools.product(complex_, complex_)]
    params = {i: jax.ShapeDtypeStruct((2, 3), p) for i, (p, _) in enumerate(pairs)}
    grads = {i: jax.ShapeDtypeStruct((2, 3), g) for i, (_, g) in enumerate(pairs)}
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    assert avals(after) == avals(state)
    assert avals(updates) == avals(grads)
    assert not any(x.weak_type for x in jax.tree.leaves(state))


@pytest.mark.rare_storages
@pytest.mark.one_in(16)
@every_runner
def test_state_and_update_keep_their_types_for_every_pair_of_dtypes(rule, storage, debias):
    check_types(runner(rule, storage, debias), REAL, (jnp.complex64,))


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(8)
@every_runner
def test_state_and_update_keep_their_types_in_64_bits(rule, storage, debias, x64):
    check_types(runner(rule, storage, debias), (*REAL, jnp.float64), (jnp.complex64, jnp.complex128))


# The second one stores and passes on the gradient itself.
@pytest.mark.parametrize("rule", [mo.heavy_ball(0.9), mo.Filter(0.0, 1.0, 1.0, 1.0)], ids=["sum", "copy"])
def test_a_weakly_typed_gradient_gives_a_strongly_typed_state(rule):
    tx = mo.scale_by_momentum(rule)
    state = tx.init(1.0)
    updates, after = jax.eval_shape(tx.update, jax.eval_shape(jax.grad(lambda x: x * x), 1.0), state)
    assert avals(after) == avals(state)
    assert not updates.weak_type


@pytest.mark.one_in(8)
@pytest.mark.rare_storages
@every_rule
@every_storage
def test_scan_cond_multisteps_and_apply_if_finite_accept_bf16_parameters_with_f32_gradients(rule, storage):
    tx = runner(rule, storage)
    params = jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
    grads = jax.ShapeDtypeStruct((4, 2, 3), jnp.float32)

    def check(tx, signal):
        def scan(p, signal):
            def step(carry, g):
                p, state = carry
                u, state = tx.update(g, state, p)
                u, state = jax.lax.cond(g[0, 0] > 0, tx.update, lambda g, s, p: (g, s), g, state, p)
                return (optax.apply_updates(p, u), state), None

            return jax.lax.scan(step, (p, tx.init(p)), signal)[0]

        assert jax.eval_shape(scan, params, signal)[0].dtype == jnp.bfloat16

    check(tx, grads)
    check(optax.apply_if_finite(tx, 5), grads)
    check(optax.MultiSteps(tx, 2), grads.update(dtype=jnp.bfloat16))


@pytest.mark.one_in(8)
@pytest.mark.rare_storages
@every_runner
def test_nothing_is_computed_in_half_precision(rule, storage, debias):
    tx = runner(rule, storage, debias)
    half = {"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16), "b": jax.ShapeDtypeStruct((3,), jnp.float16)}
    jaxpr = jax.make_jaxpr(tx.update)(half, jax.eval_shape(tx.init, half))
    arithmetic = list(half_precision_arithmetic(jaxpr.jaxpr))
    assert not arithmetic, arithmetic


def half_precision_arithmetic(jaxpr):
    """Names of the primitives that compute with bf16 or f16, also in nested programs; moves and tests are exact."""
    moves = {
        "convert_element_type",
        "copy",
        "copy_p",
        "select_n",
        "broadcast_in_dim",
        "reshape",
        "bitcast_convert_type",
        "slice",
        "stop_gradient",
    }
    for equation in jaxpr.eqns:
        nested = [getattr(x, "jaxpr", x) for x in jax.tree.leaves(equation.params)]
        nested = [x for x in nested if hasattr(x, "eqns")]
        for inner in nested:
            yield from half_precision_arithmetic(inner)
        if not nested and equation.primitive.name not in moves:
            dtypes = [getattr(v.aval, "dtype", None) for v in (*equation.invars, *equation.outvars)]
            if jnp.bfloat16 in dtypes or jnp.float16 in dtypes:
                yield equation.primitive.name


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "kind", ["number", "array", "schedule", "optax schedule", "injected", "injected schedule"], ids=lambda k: k
)
def test_a_decay_of_0_999_stays_that_for_bf16_parameters(kind):
    n = 300
    _, state = jax.jit(lambda g: trajectory(slow_decay(kind), g))(jnp.ones((n, 2), jnp.bfloat16))
    decay = float(np.float32(0.999))
    oracle = (1 - decay**n) / (1 - decay)
    # Two roundings a step; 300 undecayed steps would give 300 in place of 259.
    np.testing.assert_allclose(mo.velocity(state)[0], oracle, rtol=2 * n * EPS)


def test_optax_rounds_an_injected_decay_to_one_for_bf16_parameters_unless_told_its_dtype():
    tx = slow_decay("injected in the parameters' dtype")
    _, state = jax.jit(lambda g: trajectory(tx, g))(jnp.ones((300, 2), jnp.bfloat16))
    np.testing.assert_array_equal(mo.velocity(state)[0], 300.0)
