"""The contracts of `scale_by_momentum`, for every rule with every storage, and its agreement with Optax and PyTorch."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import (
    NOT_DEBIASABLE,
    OWN_SCHEDULE,
    REAL,
    RULES,
    SQUARES,
    STATIC,
    STORAGES,
    assert_bit_equal,
    avals,
    chained,
    descend,
    every_rule,
    every_storage,
    gradients,
    pointers,
    public_rules,
    public_storages,
    runner,
    slot,
    trajectory,
)

import momentum_optax as mo
from momentum_optax.storage import resolve

EPS = 2.0**-24  # the largest relative error of one float32 rounding

every_runner = pytest.mark.parametrize(
    ("rule", "storage", "debias"),
    [(r, s, d) for r, s, d in itertools.product(RULES, STORAGES, (False, True)) if not (d and r in NOT_DEBIASABLE)],
    ids=lambda value: {True: "debiased", False: "plain"}.get(value, value) if isinstance(value, bool) else value,
)

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


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def injected(decay, *, rule=mo.heavy_ball, hyperparam_dtype=None):
    """The rule with its decay a hyperparameter in the state, as a user of Optax would write it."""

    def factory(decay):
        return mo.scale_by_momentum(rule(decay))

    return optax.inject_hyperparams(factory, hyperparam_dtype=hyperparam_dtype)(decay)


def test_every_public_rule_and_storage_has_a_row():
    assert set(RULES) == public_rules()
    assert {name for name in public_rules() if not hasattr(mo.contrib, name)} <= set(vars(mo))
    assert set(STORAGES) | SQUARES == public_storages() == set(mo.storage._BY_NAME)
    for name, storage in STORAGES.items():
        assert type(mo.storage.resolve(name)) is type(storage())


def test_every_argument_of_a_rule_has_a_value_in_its_row():
    for build in RULES.values():
        assert set(build.keywords) >= set(inspect.signature(build.func).parameters) - {"first_step", "dampening"}


def test_exactly_the_listed_rules_reject_debiasing():
    for name, build in RULES.items():
        if name in NOT_DEBIASABLE:
            with pytest.raises(ValueError, match="debias must be False"):
                mo.scale_by_momentum(build(), debias=True)
        else:
            mo.scale_by_momentum(build(), debias=True)


@pytest.mark.parametrize(
    "rule",
    [
        mo.Filter(0.5, 1.0, 1.0, 0.0),  # 0, 1, 1.5, ...
        mo.Filter(0.5, 1.0, -0.5, 1.0),  # 1, 0.5, 0.25, ...
        mo.Filter(0.0, 1.0, -1.0, 1.0),  # 1, 0, 0, ...
        mo.Filter(0.5, 1.0, 0.0, 0.0),  # 0, 0, ...
        mo.Filter(0.9, 1.0, 1.0, lambda t: 0.0 * t),
    ],
    ids=["late", "fading", "once", "never", "scheduled"],
)
def test_a_rule_whose_response_vanishes_is_not_debiased(rule):
    with pytest.raises(ValueError, match="debias must be False for a rule whose response to a constant can vanish"):
        mo.scale_by_momentum(rule, debias=True)


@pytest.mark.parametrize("rule", [mo.heavy_ball(-0.5), mo.complex_heavy_ball(0.9, 0.4)], ids=["negative", "complex"])
def test_a_rule_whose_memory_alternates_is_not_debiased(rule):
    # The response of the first one is positive throughout: 1, 0.5, 0.75, ...
    with pytest.raises(ValueError, match="debias must be False for a rule whose response to a constant oscillates"):
        mo.scale_by_momentum(rule, debias=True)


def test_an_average_that_takes_nothing_in_is_debiased_to_zero():
    tx = mo.scale_by_momentum(mo.ema(jnp.float32(1.0)), debias=True)
    u, state = tx.update(jnp.ones(3), tx.init(jnp.ones(3)))
    np.testing.assert_array_equal(u, 0)
    np.testing.assert_array_equal(state.velocity.values[0], 0)


def test_counters_stop_at_the_largest_integer():
    rule = mo.heavy_ball(0.5, dampening=lambda t: 0.25 + 0.0 * t, first_step="gradient")
    tx, last = mo.scale_by_momentum(rule, debias=True), jnp.iinfo(jnp.int32).max
    state = jax.tree.map(lambda x: jnp.full_like(x, last) if x.dtype == jnp.int32 else x, tx.init(jnp.ones(3)))
    for _ in range(2):
        _, state = tx.update(jnp.ones(3), state)
    assert state.step == last
    np.testing.assert_array_equal(state.age, last)
    np.testing.assert_array_equal(state.velocity.values[0], 0.75 * 1.5)  # no first step again


# Contract 1: types never drift.


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
@pytest.mark.one_in(2)
@every_runner
def test_state_and_update_keep_their_types_for_every_pair_of_dtypes(rule, storage, debias):
    check_types(runner(rule, storage, debias), REAL, (jnp.complex64,))


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(2)
@every_runner
def test_state_and_update_keep_their_types_in_64_bits(rule, storage, debias, x64):
    check_types(runner(rule, storage, debias), (*REAL, jnp.float64), (jnp.complex64, jnp.complex128))


def test_a_weakly_typed_gradient_gives_a_strongly_typed_state():
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9))
    state = tx.init(1.0)
    _, after = jax.eval_shape(tx.update, jax.eval_shape(jax.grad(lambda x: x * x), 1.0), state)
    assert avals(after) == avals(state)


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
        "is_finite",
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


def slow_decay(kind):
    """A heavy ball with decay 0.999, given in one of the ways in which Optax gives hyperparameters."""
    return {
        "number": mo.scale_by_momentum(mo.heavy_ball(0.999)),
        "array": mo.scale_by_momentum(mo.heavy_ball(jnp.float32(0.999))),
        "schedule": mo.scale_by_momentum(mo.heavy_ball(lambda step: 0.999)),
        "optax schedule": mo.scale_by_momentum(mo.heavy_ball(optax.constant_schedule(0.999))),
        "injected": injected(0.999, hyperparam_dtype=jnp.float32),
        "injected schedule": injected(optax.constant_schedule(0.999), hyperparam_dtype=jnp.float32),
        "injected in the parameters' dtype": injected(0.999),
    }[kind]


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


# Contract 2: compiled once. Contract 3: donation and aliasing.


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(2)
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
@pytest.mark.one_in(2)
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


def numeric_arguments(rule):
    """The arguments in a rule's row that are coefficients."""
    return [name for name, value in RULES[rule].keywords.items() if name not in STATIC and isinstance(value, float)]


@pytest.mark.one_in(2)
@every_rule
def test_traced_scheduled_and_vmapped_arguments_equal_a_python_loop_over_numbers(rule, x64):
    arguments = numeric_arguments(rule)
    assert arguments or rule == "aggregated"
    arguments = arguments or ["decays"]
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


@pytest.mark.rare_storages
@every_rule
@every_storage
def test_every_part_of_the_state_has_the_rank_of_its_parameter(rule, storage):
    tx = runner(rule, storage, debias=rule not in NOT_DEBIASABLE)
    state = jax.eval_shape(tx.init, MIXED)
    for name, leaf in MIXED.items():
        assert {len(x.shape) for x in slot(state, name)} <= {len(leaf.shape)}


# Contract 4: trees.


@pytest.mark.rare_storages("int8")
@pytest.mark.one_in(2)
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


# Contract 5: errors come early and speak.


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (lambda: mo.scale_by_momentum(0.9), TypeError, r"rule must be a Filter .* got 0\.9"),
        (lambda: mo.scale_by_momentum(mo.ema), TypeError, "rule must be a Filter"),
        (lambda: runner("ema", "float12"), ValueError, "storage must be one of .*'float32'.*, got 'float12'"),
        (lambda: runner("ema", 8), TypeError, "storage must be a name or an object .* got 8"),
        (lambda: runner("ema", mo.storage.float32), TypeError, "storage must be a name or an object"),
        (lambda: runner("ema", debias="yes"), TypeError, "debias must be True or False, got 'yes'"),
        (lambda: runner("ema", debias=1), TypeError, "debias must be True or False, got 1"),
        (lambda: runner("complex_heavy_ball", debias=True), ValueError, "debias must be False"),
        (lambda: mo.scale_by_momentum(mo.heavy_ball(-0.5), debias=True), ValueError, "debias must be False"),
        (lambda: mo.sgd(-0.1), ValueError, r"learning_rate must be in \[0, inf\), got -0\.1"),
        (lambda: mo.sgd(float("nan")), ValueError, "learning_rate must be .* got nan"),
        (lambda: mo.sgd(float("inf")), ValueError, "learning_rate must be .* got inf"),
        (lambda: mo.sgd("0.1"), TypeError, "learning_rate must be a number.* got '0.1'"),
        (lambda: mo.sgd(None), TypeError, "learning_rate must be a number.* got None"),
        (lambda: mo.sgd(jnp.ones(2)), TypeError, "learning_rate must be a number, a scalar array"),
        (lambda: mo.sgd(0.1, 1.1), ValueError, r"momentum must be in \[0, 1\], got 1\.1"),
        (lambda: mo.sgd(0.1, -0.5), ValueError, r"momentum must be in \[0, 1\], got -0\.5"),
        (lambda: mo.sgd(0.1, True), TypeError, "momentum must be .* got True"),
        (lambda: mo.sgd(0.1, dampening=1.0), ValueError, r"dampening must be in \[0, 1\), got 1\.0"),
        (lambda: mo.sgd(0.1, weight_decay=-1.0), ValueError, r"weight_decay must be in \[0, inf\), got -1\.0"),
        (lambda: mo.sgd(0.1, nesterov=1), TypeError, "nesterov must be True or False, got 1"),
        (lambda: mo.sgd(0.1, maximize="no"), TypeError, "maximize must be True or False, got 'no'"),
        (lambda: mo.sgd(0.1, storage="int3"), ValueError, "storage must be one of .* got 'int3'"),
        (lambda: mo.sgd(0.1, 0.9, nesterov=True, dampening=0.5), ValueError, r"nesterov needs dampening 0, got 0\.5"),
        (lambda: mo.sgd(0.1, dampening=0.5), ValueError, "dampening needs a momentum in .* got None"),
        (lambda: mo.sgd(0.1, 0.0, dampening=0.5), ValueError, r"dampening needs a momentum in .* got 0\.0"),
        (lambda: mo.sgd(0.1, mo.ema(0.9), nesterov=True), ValueError, "nesterov and dampening must be left out"),
        (lambda: mo.sgd(0.1, mo.ema(0.9), dampening=0.1), ValueError, "nesterov and dampening must be left out"),
        (lambda: mo.sgd(0.1, None, storage="int3"), ValueError, "storage must be one of .* got 'int3'"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_wrong_argument_is_named_with_its_value_at_construction(build, error, match):
    with pytest.raises(error, match=match) as caught:
        build()
    assert caught.type is error


@every_rule
def test_a_number_out_of_range_is_named_by_every_rule(rule):
    for argument in numeric_arguments(rule):
        with pytest.raises(ValueError, match=rf"{argument} must be in .*, got nan"):
            RULES[rule](**{argument: float("nan")})
        with pytest.raises(TypeError, match=rf"{argument} must be a number"):
            RULES[rule](**{argument: "0.5"})


def test_arrays_and_tracers_are_not_range_checked():
    def build(value):
        mo.sgd(value, value, weight_decay=value)
        mo.sgd(value, 0.5, dampening=value)
        tx = mo.scale_by_momentum(mo.heavy_ball(value))
        _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        return tx.update(jnp.ones(2), state)[0]

    for run in (build, jax.jit(build)):
        np.testing.assert_array_equal(run(jnp.float32(1.5)), 2.5)
    assert np.isnan(build(jnp.float32(jnp.nan))).all()


# Contract 6: every argument matters.


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.2},
        {"momentum": 0.8},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": mo.ema(0.9)},
        {"nesterov": True},
        {"dampening": 0.5},
        {"weight_decay": 0.1},
        {"maximize": True},
        *({"storage": STORAGES[name]()} for name in STORAGES if name != "float32"),
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_argument_of_sgd_changes_the_trajectory(change):
    params = normal((3,), seed=1)
    signal = list(normal((4, 3)))
    base, _ = descend(mo.sgd(**{"learning_rate": 0.1, "momentum": 0.9}), params, signal)
    new, _ = descend(mo.sgd(**{"learning_rate": 0.1, "momentum": 0.9, **change}), params, signal)
    assert (np.asarray(base) != np.asarray(new)).all()


@every_rule
def test_storage_and_debiasing_change_the_trajectory(rule):
    signal = list(normal((5, 3)))
    plain = descend(runner(rule), jnp.zeros(3), signal)[0]
    for storage in STORAGES:
        stored = descend(runner(rule, storage), jnp.zeros(3), signal)[0]
        assert (np.asarray(plain) != np.asarray(stored)).any() == (storage != "float32")
    # A constant gradient leaves an optimistic step as it is, so it is debiased already.
    if rule not in NOT_DEBIASABLE | {"optimistic"}:
        assert (np.asarray(plain) != np.asarray(descend(runner(rule, debias=True), jnp.zeros(3), signal)[0])).any()


# Agreement with Optax.


def both(ours, theirs, signal):
    """The updates of two transformations in float32, each compiled on its own."""
    return [np.asarray(jax.jit(lambda g, tx=tx: trajectory(tx, g)[0])(signal)) for tx in (ours, theirs)]


def ulps(a, b):
    """The largest difference in units in the last place of `b`."""
    return np.max(np.abs(np.float64(a) - np.float64(b)) / np.spacing(np.abs(b)))


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_heavy_ball_equals_optax_trace_to_the_bit(decay):
    ours, theirs = both(mo.scale_by_momentum(mo.heavy_ball(decay)), optax.trace(decay), normal((1000, 16)))
    np.testing.assert_array_equal(ours, theirs)


def test_ema_equals_optax_ema_within_two_ulp():
    signal = jnp.abs(normal((1000, 16)))  # of one sign: no cancellation, so a rounding is an ulp of the result
    ours, theirs = both(mo.scale_by_momentum(mo.ema(0.9)), optax.ema(0.9, debias=False), signal)
    assert ulps(ours, theirs) <= 2


def test_torch_nesterov_equals_optax_nesterov():
    theirs_tx = optax.trace(0.9, nesterov=True)
    for rule in (mo.torch_nesterov(0.9), mo.nesterov(0.9)):
        ours, theirs = both(mo.scale_by_momentum(rule), theirs_tx, normal((1000, 16)))
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_the_debiased_ema_is_closer_to_float64_than_that_of_optax(decay):
    n = 1000
    signal = jnp.abs(normal((n, 16)))
    ours, theirs = both(mo.scale_by_momentum(mo.ema(decay), debias=True), optax.ema(decay, debias=True), signal)
    m, oracle = np.zeros(16), []
    for t, g in enumerate(np.float64(signal), start=1):
        m = decay * m + (1 - decay) * g
        oracle.append(m / (1 - decay**t))
    errors = [np.abs(u / np.array(oracle) - 1) for u in (ours, theirs)]
    assert errors[0].max() < errors[1].max()
    # Optax subtracts decay**t, rounded, from 1; we add the same numbers up, one rounding of a product and a sum a step.
    t = np.arange(1, n + 1)[:, None]
    bound = EPS * ((1 + t / 2) * decay**t / (1 - decay**t) + 2 * np.minimum(t, 1 / (1 - decay)) + 4)
    assert (np.abs(ours / np.array(oracle) - theirs / np.array(oracle)) <= bound).all()


def test_a_debiased_constant_stays_that_constant_under_a_scheduled_decay():
    def decay(step):
        return jnp.where(step == 0, 0.5, 0.9)

    tx = mo.scale_by_momentum(mo.ema(decay), debias=True)
    constants = jnp.array([1.0, -8.0, 0.3, 1e-30])
    u = np.asarray(jax.jit(lambda g: trajectory(tx, g)[0])(jnp.tile(constants, (100, 1))))
    # A power of two is filtered as the gain is; XLA then multiplies by the gain's reciprocal, which costs an ulp.
    assert ulps(u[:, :2], np.asarray(constants[:2])) <= 1
    # Otherwise a product and a sum are rounded in each step of both filters, and forgotten at the rate 1 - decay.
    np.testing.assert_allclose(u, np.tile(constants, (100, 1)), rtol=4 * EPS / (1 - 0.9) + 2 * EPS)
    theirs, _ = trajectory(optax.inject_hyperparams(optax.ema)(decay), jnp.ones((3, 2)))
    np.testing.assert_allclose(theirs[:, 0], [1.0, 2.89, 2.20], atol=0.005)


def test_the_signs_of_lion_mix_are_lion():
    ours = optax.chain(
        mo.scale_by_momentum(mo.lion_mix(0.9, 0.99)), optax.scale_by_sign(), optax.scale_by_learning_rate(1.0)
    )
    ours, theirs = both(ours, optax.lion(1.0, b1=0.9, b2=0.99, weight_decay=0.0), normal((200, 64)))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": None}], ids=str
)
def test_sgd_equals_optax_sgd(options):
    ours, theirs = both(mo.sgd(0.1, **options), optax.sgd(0.1, **options), normal((100, 16)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())
    if not options.get("nesterov"):
        np.testing.assert_array_equal(ours, theirs)


def test_a_compiled_heavy_ball_costs_what_optax_trace_costs():
    def cost(tx):
        p = jnp.ones((64, 256))

        def step(p, state, g):
            u, state = tx.update(g, state, p)
            return optax.apply_updates(p, u), state

        return jax.jit(step).lower(p, tx.init(p), p).compile().cost_analysis()

    ours = cost(optax.chain(mo.scale_by_momentum(mo.heavy_ball(0.9)), optax.scale_by_learning_rate(0.1)))
    theirs = cost(optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(0.1)))
    assert {k: ours[k] for k in ("flops", "bytes accessed")} == {k: theirs[k] for k in ("flops", "bytes accessed")}


# Agreement with PyTorch.


def torch_sgd(params, signal, *, lr, momentum, dampening, weight_decay, nesterov, maximize):
    """`torch.optim.SGD` for a dictionary of arrays, after its documentation."""
    params, buffers = dict(params), {}
    for gradient in signal:
        for name, g in gradient.items():
            if g is None:
                continue
            d = (-g if maximize else g) + weight_decay * params[name]
            if momentum:
                b = momentum * buffers[name] + (1 - dampening) * d if name in buffers else d
                buffers[name] = b
                d = d + momentum * b if nesterov else b
            params[name] = params[name] - lr * d
    return params


NAMES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
TORCH = [
    dict(zip(NAMES, values, strict=True))
    for values in itertools.product((0.03, 1.0), (0.0, 0.9), (0.0, 0.5), (0.0, 0.1), (False, True), (False, True))
    # PyTorch rejects nesterov without momentum or with dampening, and ignores dampening without momentum.
    if not (values[4] and (values[1] == 0 or values[2])) and not (values[2] and values[1] == 0)
]


@pytest.mark.parametrize("options", TORCH, ids=lambda options: "-".join(map(str, options.values())))
def test_sgd_equals_torch_also_for_a_leaf_whose_first_gradients_are_missing(options, x64):
    params = {"a": normal((3,), 1, jnp.float64), "late": normal((2,), 2, jnp.float64)}
    signal = [gradients(params, seed) for seed in range(5)]
    signal[0]["late"] = signal[1]["late"] = signal[3]["late"] = None
    ours, _ = descend(mo.sgd(options["lr"], **{k: v for k, v in options.items() if k != "lr"}), params, signal)
    expected = torch_sgd(*jax.tree.map(np.asarray, (params, signal)), **options)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-12)


@pytest.mark.parametrize(
    "kind", [np.asarray, jnp.float32, lambda x: lambda t: x + 0.0 * t], ids=["numpy", "jax", "schedule"]
)
@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_nesterov_takes_a_dampening_whose_value_it_cannot_know(dampening, kind):
    # PyTorch refuses the pair when it is built; its arithmetic, as after a change of a group, is this.
    params, signal = {"a": normal((3,), 1)}, [{"a": normal((3,), seed)} for seed in range(4)]
    ours, _ = descend(mo.sgd(0.1, 0.9, nesterov=True, dampening=kind(dampening)), params, signal)
    expected = torch_sgd(
        *jax.tree.map(np.asarray, (params, signal)),
        **dict(zip(NAMES, (0.1, 0.9, dampening, 0.0, True, False), strict=True)),
    )
    np.testing.assert_allclose(ours["a"], expected["a"], rtol=2e-6, atol=1e-6)


# The learning rate inside and outside the velocity.


def inside(rule, rate):
    return optax.chain(optax.scale_by_learning_rate(rate), mo.scale_by_momentum(rule))


@pytest.mark.one_in(3)
@every_rule
def test_the_learning_rate_meets_the_gradient_or_the_velocity(rule, x64):
    signal = normal((12, 3), dtype=jnp.float64)
    outer, inner = (trajectory(f(RULES[rule](), 0.1), signal)[0] for f in (chained, inside))
    np.testing.assert_allclose(outer, inner, rtol=1e-9, atol=1e-15)

    def drop(step):
        return jnp.where(step < 6, 1.0, 0.1)

    outer, inner = (np.asarray(trajectory(f(RULES[rule](), drop), signal)[0]) for f in (chained, inside))
    np.testing.assert_allclose(outer[:6], inner[:6], rtol=1e-9)
    assert (np.abs(outer[6] - inner[6]) > 1e-3 * np.abs(inner[6])).all()


def test_inside_nesterov_is_the_two_sequence_method_under_a_learning_rate_schedule(x64):
    h, start = np.array([1.0, 0.3, 0.05]), np.array([1.0, -2.0, 3.0])

    def rate(step):
        return 0.5 / (1.0 + step)

    def mu(step):
        return (step + 1.0) / (step + 4.0)

    tx = inside(mo.nesterov(mu), rate)
    y, state = jnp.asarray(start), tx.init(jnp.asarray(start))
    x_oracle = y_oracle = start
    for t in range(30):
        u, state = tx.update(h * y, state)
        y = y + u
        x_new = y_oracle - rate(t) * h * y_oracle
        x_oracle, y_oracle = x_new, x_new + mu(t) * (x_new - x_oracle)
        np.testing.assert_allclose(y, y_oracle, rtol=1e-10)


@pytest.mark.parametrize(
    "rate",
    [
        optax.piecewise_constant_schedule(1.0, {5: 0.1, 10: 0.1}),
        optax.warmup_cosine_decay_schedule(0.0, 1.0, 4, 20, 0.01),
        optax.linear_schedule(0.0, 0.5, 10),
    ],
    ids=["drops", "warm-up from 0 and cosine", "warm-up from 0"],
)
def test_momentum_correction_outside_equals_the_plain_heavy_ball_inside(rate, x64):
    signal = normal((20, 3), dtype=jnp.float64)

    def wide(step):
        return jnp.asarray(rate(step), jnp.float64)  # Optax divides int32 steps in float32

    corrected = chained(mo.heavy_ball(mo.schedules.momentum_correction(0.9, wide)), wide)
    outer, inner = (trajectory(tx, signal)[0] for tx in (corrected, inside(mo.heavy_ball(0.9), wide)))
    np.testing.assert_allclose(outer, inner, rtol=1e-10)


# Gradients that are not finite.


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


# Reading velocities.


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


# Injected hyperparameters.

SGD = {"learning_rate": 0.1, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05}


@pytest.mark.parametrize("argument", [None, *SGD], ids=["constants", *(f"{a} scheduled" for a in SGD)])
def test_injected_hyperparameters_equal_static_ones(argument):
    base = dict(SGD)
    if argument:
        base[argument] = optax.linear_schedule(SGD[argument], SGD[argument] / 2, 5)
    params = {"a": normal((3,), 1), "b": normal((2, 2), 2)}
    signal = [gradients(params, seed) for seed in range(6)]
    tx = optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(**base)
    step = jax.jit(tx.update)
    injected, _ = descend(optax.GradientTransformation(tx.init, step), params, signal)
    assert step._cache_size() == 1
    static, _ = descend(mo.sgd(**base), params, signal)
    for name in params:
        atol = 1e-6 * float(jnp.abs(static[name]).max())
        np.testing.assert_allclose(injected[name], static[name], rtol=0, atol=atol)


@pytest.mark.parametrize("argument", SGD)
def test_an_injected_hyperparameter_can_be_changed_between_two_steps(argument):
    params = {"a": normal((3,), 1)}
    g = [gradients(params, seed) for seed in range(2)]
    tx = optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(**SGD)
    step = jax.jit(tx.update)
    _, state = step(g[0], tx.init(params), params)
    state.hyperparams[argument] = jnp.float32(SGD[argument] / 2)
    u, _ = step(g[1], state, params)
    assert step._cache_size() == 1
    # In NumPy: the velocity after the first step is the first gradient, undampened.
    old, new = SGD, {**SGD, argument: SGD[argument] / 2}
    p = np.float64(params["a"])
    v = np.float64(g[0]["a"]) + old["weight_decay"] * p
    v = new["momentum"] * v + (1 - new["dampening"]) * (np.float64(g[1]["a"]) + new["weight_decay"] * p)
    np.testing.assert_allclose(u["a"], -new["learning_rate"] * v, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_bf16_parameters_get_bf16_updates_from_float32_hyperparameters(nesterov):
    params = {"a": normal((3,), 1, jnp.bfloat16)}
    numbers = {**SGD, "dampening": 0.0}
    tx = optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(**numbers, nesterov=nesterov)
    updates, state = jax.eval_shape(tx.update, params, jax.eval_shape(tx.init, params), params)
    assert updates["a"].dtype == jnp.bfloat16
    assert avals(state) == avals(jax.eval_shape(tx.init, params))
    assert {x.dtype for x in state.hyperparams.values()} == {jnp.dtype("float32")}
