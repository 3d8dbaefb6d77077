"""Compressed states of Optax's own optimizers, against those optimizers; and states that change storage."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals, gradients, own_jit, pointers
from flax import nnx

import momentum_optax as mo
from momentum_optax.wrappers.fields import CompressedField, decompress_field, is_compressed
from momentum_optax.wrappers.selection import SECOND_MOMENTS

# By way of importlib, since the package may give the functions the names of their modules.
compress = importlib.import_module("momentum_optax.wrappers.compress").compress
convert = importlib.import_module("momentum_optax.state.convert").convert
STATE = importlib.import_module("momentum_optax.wrappers.compress").CompressedState

BYTES = mo.storage.int8(min_size=32)  # of the leaves below, w is compressed and b is not
STORAGES = {"float32": mo.storage.float32(), "bfloat16": mo.storage.bfloat16(), "int8": BYTES}
every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
PARAMS = {"w": jnp.full((16, 64), 0.5, jnp.float32), "b": jnp.linspace(-1.0, 1.0, 8), "s": jnp.float32(2.0), "n": None}

OPTIMIZERS = {
    "adam": (lambda: optax.adam(1e-2), {"mu"}),
    "adamw": (lambda: optax.adamw(1e-2), {"mu"}),
    "nadam": (lambda: optax.nadam(1e-2), {"mu"}),
    "lion": (lambda: optax.lion(1e-2), {"mu"}),
    "adan": (lambda: optax.adan(1e-2), {"m", "v", "g"}),
    "muon": (lambda: optax.contrib.muon(1e-2), {"mu"}),
    "ademamix": (lambda: optax.contrib.ademamix(1e-2), {"m1", "m2"}),
    "trace": (lambda: optax.sgd(1e-2, 0.9, nesterov=True), {"trace"}),
    "ema": (lambda: optax.chain(optax.ema(0.9), optax.scale(-1e-2)), {"ema"}),
    "signum": (lambda: optax.chain(optax.ema(0.9), optax.scale_by_sign(), optax.scale(-1e-2)), {"ema"}),
    "rmsprop": (lambda: optax.rmsprop(1e-2, momentum=0.9), {"trace"}),
    "amsgrad": (lambda: optax.amsgrad(1e-2), {"mu"}),
    "schedule_free": (lambda: optax.contrib.schedule_free(optax.sgd(1e-2), 1e-2, b1=0.9), {"z"}),
    "masked": (lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False, "s": True, "n": None}), {"mu"}),
    "partition": (
        lambda: optax.partition(
            {"a": optax.adam(1e-2), "t": optax.sgd(1e-2, 0.9)}, lambda p: {**dict.fromkeys(p, "t"), "w": "a", "n": None}
        ),
        {"mu", "trace"},
    ),
    "inject": (lambda: optax.inject_hyperparams(optax.adam)(1e-2), {"mu"}),
    "multi_steps": (lambda: optax.MultiSteps(optax.adam(1e-2), 2), {"mu", "acc_grads"}),
    "if finite": (lambda: optax.apply_if_finite(optax.adam(1e-2), 2), {"mu"}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def signal(steps, params=PARAMS):
    return [gradients(params, seed) for seed in range(steps)]


def run(tx, steps, params=PARAMS):
    """Updates of compiled steps, and the last state; the parameters stay where they are."""
    state, step, out = tx.init(params), own_jit(tx.update), []
    for g in signal(steps, params):
        u, state = step(g, state, params)
        out.append(u)
    assert step._cache_size() == 1
    return out, state


def opened(state):
    """The state of the optimizer inside, every field decoded."""
    return jax.tree.map(
        lambda x: decompress_field(x) if isinstance(x, CompressedField) else x,
        state.inner,
        is_leaf=lambda x: isinstance(x, CompressedField),
    )


def distance(a, b):
    """Norm of the difference, relative to that of `b`."""
    flat = [np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(t)]) for t in (a, b)]
    return np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1])


# What it computes.


@pytest.mark.one_in(2)
@every_optimizer
def test_float32_is_the_optimizer_itself_to_the_bit(name):
    tx, fields = OPTIMIZERS[name]
    ours, state = run(compress(tx(), fields, "float32"), 20)
    theirs, expected = run(tx(), 20)
    assert_bit_equal(ours, theirs)
    assert_bit_equal(opened(state), expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("name", "storage"), [*((name, "int8") for name in OPTIMIZERS), ("adam", "bfloat16"), ("adam", "float32")]
)
def test_types_never_drift_and_a_scan_runs(name, storage):
    make, fields = OPTIMIZERS[name]
    tx = compress(make(), fields, STORAGES[storage])
    state = tx.init(PARAMS)
    assert avals(state) == avals(jax.eval_shape(tx.init, PARAMS))
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *signal(4))
    last, updates = jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], state, stacked)
    assert [x.dtype for x in jax.tree.leaves(last)] == [x.dtype for x in jax.tree.leaves(state)]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_nearest_bfloat16_is_the_accumulator_dtype_of_optax():
    def both(decay):
        ours = compress(optax.trace(decay), {"trace"}, mo.storage.bfloat16("nearest"))
        return run(ours, 20)[0], run(optax.trace(decay, accumulator_dtype=jnp.bfloat16), 20)[0]

    # Half of a bfloat16 is one, so that both do the same arithmetic. (A scalar is not compressed.)
    assert_bit_equal(*([(u["w"], u["b"]) for u in out] for out in both(0.5)))
    # Optax rounds the decayed velocity once more: a step moves the two apart by at most half a unit of 2^-8 there and
    # one where they are stored, of which 1/(1 - 7/8) steps are remembered.
    ours, theirs = both(0.875)
    most = max(float(jnp.abs(u["w"]).max()) for u in theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["w"], b["w"], rtol=0, atol=8 * 1.5 * 2.0**-8 * most)


@pytest.mark.parametrize(("storage", "most"), [(mo.storage.bfloat16(), 0.01), (BYTES, 0.06)], ids=["bfloat16", "int8"])
def test_a_kept_momentum_stays_close_to_the_exact_one(storage, most):
    _, exact = run(optax.adamw(1e-3), 40)
    _, state = run(compress(optax.adamw(1e-3), {"mu"}, storage), 40)
    ours, theirs = optax.tree.get(opened(state), "mu"), optax.tree.get(exact, "mu")
    assert 0 < distance(ours["w"], theirs["w"]) < most
    assert_bit_equal(optax.tree.get(opened(state), "nu"), optax.tree.get(exact, "nu"))


def test_a_leaf_of_one_element_is_as_exact_as_its_optimizer_has_it():
    params = {"scalar": jnp.float32(0.5), "lone": jnp.ones((1, 1)), "pair": jnp.ones((1, 2))}
    _, exact = run(optax.adam(1e-2), 5, params)
    _, state = run(compress(optax.adam(1e-2), {"mu"}, "bfloat16"), 5, params)
    ours, theirs = opened(state)[0].mu, exact[0].mu
    for name in ("scalar", "lone"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert 0 < distance(ours["pair"], theirs["pair"]) < 0.02


def test_values_that_are_not_zero_at_init_are_kept():
    params = {"w": jax.random.normal(jax.random.key(0), (32, 128))}
    make = OPTIMIZERS["schedule_free"][0]
    for init in (lambda tx: tx.init(params), lambda tx: jax.jit(tx.init)(params)):
        z = optax.tree.get(opened(init(compress(make(), {"z"}, BYTES))), "z")
        assert distance(z, params) < 0.03
        z = optax.tree.get(opened(init(compress(make(), {"z"}, "float32"))), "z")
        assert_bit_equal(z, params)


def test_bfloat16_parameters_keep_their_dtypes_with_wider_gradients():
    params = {"w": jnp.ones((8, 16), jnp.bfloat16)}
    tx = compress(optax.adam(1e-2), {"mu"}, BYTES)
    state = tx.init(params)
    g = {"w": jnp.ones((8, 16), jnp.float32)}
    _, new = jax.jit(tx.update)(g, state, params)
    assert avals(new) == avals(state)
    assert opened(new)[0].mu["w"].dtype == jnp.bfloat16


def test_every_field_has_the_storage_that_a_mapping_gives_it():
    tx = compress(optax.adam(1e-2), {"mu": BYTES, "nu": "bfloat16"})
    _, state = run(tx, 10)
    adam = state.inner[0]
    assert adam.mu.parts.codes[0]["w"].dtype == jnp.int8
    assert adam.nu.parts.values[0]["w"].dtype == jnp.bfloat16
    _, exact = run(optax.adam(1e-2), 10)
    assert distance(optax.tree.get(opened(state), "nu"), optax.tree.get(exact, "nu")) < 0.01


def test_a_replay_is_bit_equal_and_every_step_has_its_own_noise():
    tx = compress(optax.adam(1e-2), {"mu"}, BYTES)
    assert_bit_equal(run(tx, 5), run(tx, 5))
    _, one = run(tx, 1)
    _, two = run(compress(optax.adam(1e-2), {"mu"}, mo.storage.int8(1, min_size=32)), 1)
    assert (one.inner[0].mu.parts.codes[0]["w"] != two.inner[0].mu.parts.codes[0]["w"]).any()


# What is chosen.


def test_a_predicate_chooses_single_leaves():
    def big(path, leaf):
        return "mu" in jax.tree_util.keystr(path) and leaf.size > 100

    state = compress(optax.adam(1e-2), big, BYTES).init(PARAMS)
    kept = state.inner[0].mu
    assert kept.parts.codes[0]["w"].dtype == jnp.int8
    assert kept.plain["b"].shape == (8,)
    assert state.inner[0].nu.plain["w"].shape == (16, 64)
    tx = compress(optax.adam(1e-2), big, "float32")
    assert_bit_equal(run(tx, 5)[0], run(optax.adam(1e-2), 5)[0])


def test_what_cannot_be_kept_stays_as_it_is():
    params = {"i": jnp.arange(4), "e": jnp.zeros((0, 3)), "s": jnp.float32(1), "w": jnp.ones((8, 8)), "n": None}
    inner = optax.GradientTransformation(
        lambda p: optax.TraceState(jax.tree.map(jnp.zeros_like, p)),
        lambda g, s, p=None: (g, optax.TraceState(jax.tree.map(lambda t, x: t + x, s.trace, g))),
    )
    tx = compress(inner, {"trace"}, BYTES)
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state)
    trace = opened(state).trace
    np.testing.assert_array_equal(trace["i"], 3 * np.arange(4))
    assert float(trace["s"]) == 3.0
    assert trace["e"].shape == (0, 3)
    assert trace["i"].dtype == jnp.int32
    assert distance(trace["w"], 3 * np.ones((8, 8))) < 0.1  # the first write, without a scale, is coarse


@pytest.mark.parametrize("storage", ["int8", BYTES], ids=["name", "object"])
def test_squares_are_refused_by_a_storage_that_is_not_fit(storage):
    for make, name in (
        (optax.adam(1e-2), "nu"),
        (optax.rmsprop(1e-2), "nu"),
        (optax.adagrad(1e-2), "sum_of_squares"),
        (optax.adan(1e-2), "n"),
        (optax.contrib.prodigy(), "exp_avg_sq"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' holds second moments.*'float32', 'bfloat16'.*got Int8"):
            compress(make, {name}, storage).init(PARAMS)
        compress(make, {name}, "bfloat16").init(PARAMS)
        compress(make, {name}, storage, second_moments=()).init(PARAMS)
    with pytest.raises(ValueError, match="'nu' holds second moments"):
        compress(optax.adam(1e-2), lambda path, leaf: True, storage).init(PARAMS)


def test_the_names_of_squares_are_fields_of_optax():
    known = [optax.ScaleByAdamState, optax.ScaleByAmsgradState, optax.ScaleByRssState, optax.FactoredState]
    named = {name for state in known for name in state._fields} - {"count", "mu"}
    assert named <= SECOND_MOMENTS


def test_errors_say_what_is_allowed():
    adam = optax.adam(1e-2)
    with pytest.raises(ValueError, match=r"fields of floats .*\('mu', 'nu'\), got 'momentum'"):
        compress(adam, {"mu", "momentum"}).init(PARAMS)
    with pytest.raises(ValueError, match="got 'count'"):
        compress(adam, {"count"}).init(PARAMS)
    with pytest.raises(ValueError, match=r"true of a leaf .*'mu', 'nu'"):
        compress(adam, lambda path, leaf: False).init(PARAMS)
    with pytest.raises(ValueError, match="at least one field"):
        compress(adam, set())
    with pytest.raises(ValueError, match="storage must be one of 'float32'"):
        compress(adam, {"mu"}, "int7")
    with pytest.raises(ValueError, match="must not be compressed already"):
        compress(compress(adam, {"mu"}), {"nu"}, "bfloat16").init(PARAMS)
    with pytest.raises(ValueError, match=r"kept as Float32Velocity, got Int8Velocity: mo\.convert"):
        compress(adam, {"mu"}, "float32").update(PARAMS, compress(adam, {"mu"}, BYTES).init(PARAMS))
    for select in ("mu", 3, int, {1}):
        with pytest.raises(TypeError, match="select must"):
            compress(adam, select)
    with pytest.raises(TypeError, match="tx must be a transformation"):
        compress(mo.heavy_ball(0.9), {"mu"})
    with pytest.raises(TypeError, match="second_moments must"):
        compress(adam, {"mu"}, second_moments="nu")


# How the state behaves.


@every_storage
def test_donation_of_parameters_and_state(storage):
    tx = compress(optax.adamw(1e-2), {"mu"}, storage)
    params = jax.tree.map(jnp.array, PARAMS)
    state = tx.init(params)
    where = pointers((params, state))
    assert len(set(where)) == len(where)

    def step(params, state, g):
        u, state = tx.update(g, state, params)
        return optax.apply_updates(params, u), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for g in signal(2, params):
        params, state = step(params, state, g)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))


def test_values_kept_from_init_share_no_buffer_with_the_parameters():
    tx = compress(optax.contrib.schedule_free(optax.sgd(0.1), 0.1), {"z"}, "float32")
    where = pointers((PARAMS, tx.init(PARAMS)))
    assert len(set(where)) == len(where)


def test_bytes_of_the_state_and_no_float_copy_in_a_compiled_init():
    params = {"w": jnp.zeros((256, 1024))}
    tx = compress(optax.adam(1e-2), {"mu"})
    mu = jax.eval_shape(tx.init, params).inner[0].mu
    used = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(mu))
    rows = 256
    assert 256 * 1024 <= used <= 256 * 1024 + 8 * rows + 64
    memory = jax.jit(tx.init).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 1024


@every_storage
def test_init_takes_shapes_in_place_of_arrays(storage):
    shapes = jax.eval_shape(lambda: PARAMS)
    tx = compress(optax.adamw(1e-2), {"mu"}, storage)
    assert avals(tx.init(shapes)) == avals(tx.init(PARAMS))
    assert avals(jax.eval_shape(tx.init, shapes)) == avals(tx.init(PARAMS))


@pytest.mark.parametrize("select", [{"mu"}, lambda path, leaf: "mu" in jax.tree_util.keystr(path)], ids=["name", "any"])
@every_storage
def test_every_part_is_a_tree_like_the_parameters(select, storage):
    tx = compress(optax.adamw(1e-2), select, storage)
    specs = jax.tree.map(lambda x: "spec", PARAMS)
    state = optax.tree.map_params(tx, lambda x, spec: spec, tx.init(PARAMS), specs, transform_non_params=lambda x: None)
    parts = optax.tree.get(state, "mu").parts
    assert all(tree == specs for part in parts for tree in part)
    assert all(
        x.ndim == p.ndim
        for part in tx.init(PARAMS).inner[0].mu.parts
        for tree in part
        for x, p in zip(jax.tree.leaves(tree), jax.tree.leaves(PARAMS), strict=True)
    )


def test_fields_are_found_by_name():
    _, state = run(compress(optax.adamw(1e-2), {"mu"}, BYTES), 2)
    assert int(optax.tree.get(state, "step")) == 2
    assert isinstance(optax.tree.get(state, "mu"), CompressedField)
    assert compress(optax.adamw(1e-2), {"mu"}, "float32").init(PARAMS).step is None


def test_a_leaf_without_a_gradient_keeps_its_state_where_optax_would_lose_it():
    tx = compress(optax.ema(0.9), {"ema"}, BYTES)
    g = signal(2)
    _, state = tx.update(g[0], tx.init(PARAMS))
    u, new = tx.update({**g[1], "w": None}, state)
    assert u["w"] is None
    assert avals(new) == avals(state)
    assert_bit_equal(opened(new).ema["w"], opened(state).ema["w"])
    assert not np.array_equal(opened(new).ema["b"], opened(state).ema["b"])


def test_weak_types_of_the_parameters_do_not_cost_a_second_compilation():
    params = {"w": jnp.full((8, 16), 0.5)}
    assert params["w"].weak_type
    tx = compress(optax.adam(1e-2), {"mu"}, BYTES)
    _, state = run(tx, 3, params)  # which sees to it that there was one compilation
    assert avals(state) == avals(tx.init(params))


def test_inside_optax_wrappers():
    inner = compress(optax.adam(1e-2), {"mu"}, "float32")
    for wrap in (
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, {"w": True, "b": False, "s": True, "n": None}),
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.chain(optax.clip(0.5), tx),
    ):
        assert_bit_equal(run(wrap(inner), 6)[0], run(wrap(optax.adam(1e-2)), 6)[0])
    run(optax.MultiSteps(compress(optax.adam(1e-2), {"mu"}, BYTES), 2), 2)


def test_injected_hyperparameters_reach_the_optimizer():
    make = optax.inject_hyperparams(lambda rate: compress(optax.adam(rate), {"mu"}, "float32"))
    tx = make(rate=1e-2)
    state = tx.init(PARAMS)
    state.hyperparams["rate"] = jnp.float32(0.0)
    u, _ = jax.jit(tx.update)(signal(1)[0], state, PARAMS)
    assert not u["w"].any()


def test_extra_arguments_reach_the_optimizer():
    tx = compress(optax.chain(optax.sgd(0.1, 0.9), optax.contrib.reduce_on_plateau()), {"trace"}, BYTES)
    u, _ = tx.update(signal(1)[0], tx.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    assert u["w"].any()


def test_an_nnx_optimizer_trains():
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, compress(optax.adamw(1e-2), {"mu"}, BYTES), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, g = nnx.value_and_grad(lambda m: ((m(jnp.ones((4, 8))) - 1) ** 2).mean())(model)
        optimizer.update(model, g)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


# From one storage to another.

TRANSFORMS = {
    "heavy_ball": lambda s: mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s),
    "scheduled": lambda s: mo.scale_by_momentum(mo.nesterov(mo.schedules.fista()), storage=s),
    "aggregated": lambda s: mo.scale_by_momentum(mo.aggregated((0.0, 0.9, 0.99)), storage=s),
    "debiased": lambda s: mo.scale_by_momentum(mo.ema(0.9), storage=s, debias=True),
    "chained": lambda s: mo.sgd(0.1, 0.9, dampening=0.3, weight_decay=0.1, storage=s),
    "none": lambda s: optax.chain(
        mo.scale_by_momentum(mo.aggregated((0.0,)), storage=s), mo.scale_by_momentum(mo.ema(0.9), storage=s)
    ),
    "adam": lambda s: compress(optax.adam(1e-2), {"mu"}, s),
    "partition": lambda s: compress(OPTIMIZERS["partition"][0](), {"mu", "trace"}, s),
    "both": lambda s: optax.chain(mo.scale_by_momentum(mo.ema(0.9), storage=s), compress(optax.adam(1e-2), {"mu"}, s)),
}


def velocities(state):
    """All velocities and compressed fields, decoded."""
    found = [
        optax.tree.get_all_with_path(opened(x), name)
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, STATE))
        if isinstance(x, STATE)
        for name in ("mu", "trace")
    ]
    return mo.velocity(state), [v for pairs in found for _, v in pairs]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("old", "new"), [("float32", "int8"), ("int8", "bfloat16"), ("bfloat16", "float32")])
def test_a_converted_state_is_one_of_the_new_optimizer_with_the_old_velocities(name, old, new):
    make = TRANSFORMS[name]
    params = {**PARAMS, "empty": jnp.zeros((0, 2))}
    _, state = run(make(STORAGES[old]), 3, params)
    tx = make(STORAGES[new])
    like = jax.eval_shape(tx.init, params)
    converted = convert(state, STORAGES[new], like=like)
    assert avals(converted) == avals(like)
    most = {"float32": 1e-12, "bfloat16": 2.0**-7, "int8": 0.05}[new]
    assert distance(velocities(converted), velocities(state)) < most
    g = signal(1, params)[0]
    u, after = jax.jit(tx.update)(g, converted, params)
    assert avals(after) == avals(like)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(u))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_float32_to_bytes_and_back_needs_no_example(name):
    make = TRANSFORMS[name]
    state = run(make("float32"), 3)[1]
    there = convert(state, BYTES)
    assert avals(there) == avals(make(BYTES).init(PARAMS))
    back = convert(there, "float32")
    assert distance(velocities(back), velocities(there)) == 0.0
    assert_bit_equal(run(make("float32"), 3)[1], state)  # the state that was given is as it was


def test_a_converted_state_goes_on_as_the_old_one():
    def make(s):
        return optax.chain(mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s), optax.scale(-0.1))

    _, state = run(make("float32"), 5)
    exact, ours, tx = state, convert(state, BYTES), make(BYTES)
    for g in signal(10):
        _, exact = make("float32").update(g, exact)
        _, ours = tx.update(g, ours)
    assert distance(mo.velocity(ours), mo.velocity(exact)) < 0.05


def test_a_mapping_converts_what_it_names():
    tx = compress(optax.adam(1e-2), {"mu": "float32", "nu": "float32"})
    _, state = run(tx, 3)
    new = convert(state, {"mu": BYTES, "nu": "bfloat16"})
    assert avals(new) == avals(compress(optax.adam(1e-2), {"mu": BYTES, "nu": "bfloat16"}).init(PARAMS))
    new = convert(state, {"mu": BYTES})
    assert_bit_equal(new.inner[0].nu, state.inner[0].nu)
    assert convert(new, {"mu": "float32"}).step is not None  # nu might need it
    assert convert(new, "float32").step is None


@pytest.mark.parametrize("new", ["bfloat16", {"velocity": "bfloat16", "mu": "bfloat16"}], ids=["all", "by name"])
def test_a_converted_state_goes_on_counting(new):
    # Both count for their storage, and the first for its schedule too.
    rule = mo.nesterov(mo.schedules.fista())
    tx = optax.chain(mo.scale_by_momentum(rule, storage="bfloat16"), compress(optax.adam(1e-2), {"mu"}, "bfloat16"))
    state = tuple(s._replace(step=jnp.int32(3)) for s in tx.init({"w": jnp.ones(4)}))
    # Float32 needs no count, and the schedule does.
    assert int(convert(convert(state, "float32"), new)[0].step) == 3
    assert [int(s.step) for s in convert(state, new)] == [3, 3]


def test_a_conversion_is_told_which_fields_are_squares():
    state = compress(optax.adam(1e-2), {"mu", "nu"}, "float32", second_moments=()).init(PARAMS)
    assert avals(convert(state, BYTES, second_moments=())) == avals(
        convert(state, {"mu": BYTES, "nu": BYTES}, second_moments=())
    )
    with pytest.raises(ValueError, match="'mu' holds second moments"):
        convert(state, BYTES, second_moments={"mu"})


def test_an_example_gives_a_converted_state_its_width_back(x64):
    params = {"w": jnp.ones((4, 4), jnp.float64)}
    tx = mo.scale_by_momentum(mo.ema(0.9))
    there = convert(tx.init(params), "bfloat16")
    assert mo.velocity(convert(there, "float32"))[0]["w"].dtype == jnp.float32
    back = convert(there, "float32", like=jax.eval_shape(tx.init, params))
    assert avals(back) == avals(tx.init(params))


def test_conversion_errors():
    state = compress(optax.adam(1e-2), {"mu": BYTES, "nu": "float32"}).init(PARAMS)
    with pytest.raises(ValueError, match="'nu' holds second moments"):
        convert(state, "int8")
    with pytest.raises(ValueError, match=r"it has 'mu', 'nu'\), got 'velocity'"):
        convert(state, {"velocity": "int8"})
    for squares in ("uint8", {"velocity": "uint8"}):
        with pytest.raises(ValueError, match="'velocity' may hold values of either sign"):
            convert(mo.scale_by_momentum(mo.ema(0.9)).init(PARAMS), squares)
    with pytest.raises(ValueError, match="it has none"):
        convert(optax.adam(1e-2).init(PARAMS), "int8")
    with pytest.raises(ValueError, match="like must have the structure"):
        convert(state, "float32", like=optax.sgd(1e-2, 0.9).init(PARAMS))
    other = compress(optax.adam(1e-2), {"mu", "nu"}, "float32").init({**PARAMS, "w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="like must have the shapes"):
        convert(state, "float32", like=other)
    with pytest.raises(ValueError, match="storage must be one of"):
        convert(state, "int7")
    convert(compress(optax.adan(1e-2), {"v"}, "float32").init(PARAMS), "int8")  # of either sign


def gpt2_small():
    """The shapes of GPT-2 small, 148 leaves."""
    wide, layer = 768, {}
    for name, n, m in (
        ("attention", wide, 3 * wide),
        ("out", wide, wide),
        ("up", wide, 4 * wide),
        ("down", 4 * wide, wide),
    ):
        layer[name] = {"kernel": (n, m), "bias": (m,)}
    layer |= {f"norm{i}": {"scale": (wide,), "bias": (wide,)} for i in range(2)}
    shapes = {"tokens": (50257, wide), "positions": (1024, wide), "norm": {"scale": (wide,), "bias": (wide,)}}
    shapes |= {f"layer{i}": layer for i in range(12)}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


@pytest.mark.parametrize("select", [{"mu": "int8"}, {"mu": "int8", "nu": "uint8"}], ids=["one field", "two fields"])
def test_init_of_a_whole_model_computes_nothing(select):
    """Fields that start at zero need no scale. XLA used to fold maxima over 38 million zeros, three times a leaf."""
    params = gpt2_small()
    tx = mo.compress(optax.adamw(1e-3), select)
    program = jax.make_jaxpr(tx.init)(params)
    assert len(jax.tree.leaves(params)) == 148
    # One for each array of the state.
    assert len(program.eqns) <= len(program.jaxpr.outvars) + 2 * 148
    assert {e.primitive.name for e in program.eqns} <= {"broadcast_in_dim", "convert_element_type"}


def test_what_starts_elsewhere_than_at_zero_is_still_written_with_a_scale():
    params = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
    tx = mo.compress(optax.contrib.schedule_free_sgd(0.1), {"z"}, mo.storage.int8(min_size=1))
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        (kept,) = [x for x in jax.tree.leaves(state, is_leaf=is_compressed) if is_compressed(x)]
        error = jnp.linalg.norm(decompress_field(kept)["w"] - params["w"]) / jnp.linalg.norm(params["w"])
        assert error < 0.02
