"""`compress` against the optimizers themselves: numbers, types, memory, and the ways in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compressed import (
    BYTES,
    OPTIMIZERS,
    PARAMS,
    STORAGES,
    distance,
    every_optimizer,
    every_storage,
    opened,
    run,
    signal,
)
from conformance import assert_bit_equal, avals, pointers
from flax import nnx

import momentum_optax as mo
from momentum_optax.wrappers.fields import decompress_field


@pytest.mark.one_in(12)
@every_optimizer
def test_float32_is_the_optimizer_itself_to_the_bit(name):
    tx, fields = OPTIMIZERS[name]
    ours, state = run(mo.compress(tx(), fields, "float32"), 20)
    theirs, expected = run(tx(), 20)
    assert_bit_equal(ours, theirs)
    assert_bit_equal(opened(state), expected)


@pytest.mark.filterwarnings("ignore:storage int8 turns the orthogonalised direction")
@pytest.mark.one_in(12)
@pytest.mark.parametrize(
    ("name", "storage"), [*((name, "int8") for name in OPTIMIZERS), ("adam", "bfloat16"), ("adam", "float32")]
)
def test_types_never_drift_and_a_scan_runs(name, storage):
    make, fields = OPTIMIZERS[name]
    tx = mo.compress(make(), fields, STORAGES[storage])
    state = tx.init(PARAMS)
    assert avals(state) == avals(jax.eval_shape(tx.init, PARAMS))
    stacked = jax.tree.map(lambda *g: jnp.stack(g), *signal(4))
    last, updates = jax.lax.scan(lambda s, g: tx.update(g, s, PARAMS)[::-1], state, stacked)
    assert [x.dtype for x in jax.tree.leaves(last)] == [x.dtype for x in jax.tree.leaves(state)]
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_nearest_bfloat16_is_the_accumulator_dtype_of_optax():
    def both(decay):
        ours = mo.compress(optax.trace(decay), {"trace"}, mo.storage.bfloat16("nearest"))
        return run(ours, 20)[0], run(optax.trace(decay, accumulator_dtype=jnp.bfloat16), 20)[0]

    # Half of a bfloat16 is one, so that both do the same arithmetic. (A scalar is not compressed.)
    assert_bit_equal(*([(u["w"], u["b"]) for u in out] for out in both(0.5)))
    # Optax rounds the decayed velocity once more: a step moves the two apart by at most half a unit of 2^-8 there and
    # one where they are stored, of which 1/(1 - 7/8) steps are remembered.
    ours, theirs = both(0.875)
    most = max(float(jnp.abs(u["w"]).max()) for u in theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["w"], b["w"], rtol=0, atol=8 * 1.5 * 2.0**-8 * most)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("storage", "most"), [(mo.storage.bfloat16(), 0.01), (BYTES, 0.06)], ids=["bfloat16", "int8"])
def test_a_kept_momentum_stays_close_to_the_exact_one(storage, most):
    _, exact = run(optax.adamw(1e-3), 40)
    _, state = run(mo.compress(optax.adamw(1e-3), {"mu"}, storage), 40)
    ours, theirs = optax.tree.get(opened(state), "mu"), optax.tree.get(exact, "mu")
    assert 0 < distance(ours["w"], theirs["w"]) < most
    assert_bit_equal(optax.tree.get(opened(state), "nu"), optax.tree.get(exact, "nu"))


def test_a_leaf_of_one_element_is_as_exact_as_its_optimizer_has_it():
    params = {"scalar": jnp.float32(0.5), "lone": jnp.ones((1, 1)), "pair": jnp.ones((1, 2))}
    _, exact = run(optax.adam(1e-2), 5, params)
    _, state = run(mo.compress(optax.adam(1e-2), {"mu"}, "bfloat16"), 5, params)
    ours, theirs = opened(state)[0].mu, exact[0].mu
    for name in ("scalar", "lone"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert 0 < distance(ours["pair"], theirs["pair"]) < 0.02


def test_bfloat16_parameters_keep_their_dtypes_with_wider_gradients():
    params = {"w": jnp.ones((8, 16), jnp.bfloat16)}
    tx = mo.compress(optax.adam(1e-2), {"mu"}, BYTES)
    state = tx.init(params)
    g = {"w": jnp.ones((8, 16), jnp.float32)}
    _, new = jax.jit(tx.update)(g, state, params)
    assert avals(new) == avals(state)
    assert opened(new)[0].mu["w"].dtype == jnp.bfloat16


def test_a_replay_is_bit_equal_and_every_step_has_its_own_noise():
    tx = mo.compress(optax.adam(1e-2), {"mu"}, BYTES)
    assert_bit_equal(run(tx, 5), run(tx, 5))
    _, one = run(tx, 1)
    _, two = run(mo.compress(optax.adam(1e-2), {"mu"}, mo.storage.int8(1, min_size=32)), 1)
    assert (one.inner[0].mu.parts.codes[0]["w"] != two.inner[0].mu.parts.codes[0]["w"]).any()


def test_what_cannot_be_kept_stays_as_it_is():
    params = {"i": jnp.arange(4), "e": jnp.zeros((0, 3)), "s": jnp.float32(1), "w": jnp.ones((8, 8)), "n": None}
    inner = optax.GradientTransformation(
        lambda p: optax.TraceState(jax.tree.map(jnp.zeros_like, p)),
        lambda g, s, p=None: (g, optax.TraceState(jax.tree.map(lambda t, x: t + x, s.trace, g))),
    )
    tx = mo.compress(inner, {"trace"}, BYTES)
    state = tx.init(params)
    for step in range(3):
        _, state = tx.update(params, state)
        trace = opened(state).trace
        # The first scale is 2.5 times the gradient, and the second no less than 0.9 of it: a root's rounding.
        assert step == 2 or distance(trace["w"], np.full((8, 8), step + 1)) < 0.02
    np.testing.assert_array_equal(trace["i"], 3 * np.arange(4))
    assert float(trace["s"]) == 3.0
    assert trace["e"].shape == (0, 3)
    assert trace["i"].dtype == jnp.int32
    # The scale is 1.35 times the largest value of the second step, 2 to 2 %. Of 3 that are more than a scale each
    # element becomes one scale or two, with the mean right.
    scale = 1.35 * 2
    assert np.all((trace["w"] > 0.98 * scale) & (trace["w"] < 1.04 * 2 * scale))
    assert abs(trace["w"].mean() - 3) < 4.5 * np.sqrt((3 - scale) * (2 * scale - 3) / trace["w"].size)


@pytest.mark.one_in(4)
@every_storage
def test_donation_of_parameters_and_state(storage):
    tx = mo.compress(optax.adamw(1e-2), {"mu"}, storage)
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
    tx = mo.compress(optax.contrib.schedule_free(optax.sgd(0.1), 0.1), {"z"}, "float32")
    where = pointers((PARAMS, tx.init(PARAMS)))
    assert len(set(where)) == len(where)


def test_bytes_of_the_state_and_no_float_copy_in_a_compiled_init():
    params = {"w": jnp.zeros((256, 1024))}
    tx = mo.compress(optax.adam(1e-2), {"mu"})
    mu = jax.eval_shape(tx.init, params).inner[0].mu
    used = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(mu))
    rows = 256
    assert 256 * 1024 <= used <= 256 * 1024 + 12 * rows + 64
    memory = jax.jit(tx.init).lower(params).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 1024


@every_storage
def test_init_takes_shapes_in_place_of_arrays(storage):
    shapes = jax.eval_shape(lambda: PARAMS)
    tx = mo.compress(optax.adamw(1e-2), {"mu"}, storage)
    assert avals(tx.init(shapes)) == avals(tx.init(PARAMS))
    assert avals(jax.eval_shape(tx.init, shapes)) == avals(tx.init(PARAMS))


@pytest.mark.parametrize("select", [{"mu"}, lambda path, leaf: "mu" in jax.tree_util.keystr(path)], ids=["name", "any"])
@every_storage
def test_every_part_is_a_tree_like_the_parameters(select, storage):
    tx = mo.compress(optax.adamw(1e-2), select, storage)
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


def test_a_leaf_without_a_gradient_keeps_its_state_where_optax_would_lose_it():
    tx = mo.compress(optax.ema(0.9), {"ema"}, BYTES)
    g = signal(2)
    _, state = tx.update(g[0], tx.init(PARAMS))
    u, new = tx.update({**g[1], "w": None}, state)
    assert u["w"] is None
    assert avals(new) == avals(state)
    assert_bit_equal(opened(new).ema["w"], opened(state).ema["w"])
    assert not np.array_equal(opened(new).ema["b"], opened(state).ema["b"])


def test_an_init_that_cannot_be_traced_is_run():
    # Boolean indices must be known.
    tx = optax.trace(0.9)
    tx = tx._replace(init=lambda params: optax.TraceState(jax.tree.map(lambda x: x[x < 0], params)))
    state = mo.compress(tx, {"trace"}, "bfloat16").init({"w": jnp.array([-1.0, -2.0, 3.0])})
    np.testing.assert_array_equal(decompress_field(state.inner.trace)["w"], [-1, -2])


def test_weak_types_of_the_parameters_do_not_cost_a_second_compilation():
    params = {"w": jnp.full((8, 16), 0.5)}
    assert params["w"].weak_type
    tx = mo.compress(optax.adam(1e-2), {"mu"}, BYTES)
    _, state = run(tx, 3, params)  # which sees to it that there was one compilation
    assert avals(state) == avals(tx.init(params))


@pytest.mark.slow
def test_inside_optax_wrappers():
    inner = mo.compress(optax.adam(1e-2), {"mu"}, "float32")
    for wrap in (
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, {"w": True, "b": False, "s": True, "n": None}),
        lambda tx: optax.apply_if_finite(tx, 2),
        lambda tx: optax.chain(optax.clip(0.5), tx),
    ):
        assert_bit_equal(run(wrap(inner), 6)[0], run(wrap(optax.adam(1e-2)), 6)[0])
    run(optax.MultiSteps(mo.compress(optax.adam(1e-2), {"mu"}, BYTES), 2), 2)


def test_injected_hyperparameters_reach_the_optimizer():
    make = optax.inject_hyperparams(lambda rate: mo.compress(optax.adam(rate), {"mu"}, "float32"))
    tx = make(rate=1e-2)
    state = tx.init(PARAMS)
    state.hyperparams["rate"] = jnp.float32(0.0)
    u, _ = jax.jit(tx.update)(signal(1)[0], state, PARAMS)
    assert not u["w"].any()


def test_extra_arguments_reach_the_optimizer():
    tx = mo.compress(optax.chain(optax.sgd(0.1, 0.9), optax.contrib.reduce_on_plateau()), {"trace"}, BYTES)
    u, _ = tx.update(signal(1)[0], tx.init(PARAMS), PARAMS, value=jnp.float32(1.0))
    assert u["w"].any()


def test_an_nnx_optimizer_trains():
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, mo.compress(optax.adamw(1e-2), {"mu"}, BYTES), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, g = nnx.value_and_grad(lambda m: ((m(jnp.ones((4, 8))) - 1) ** 2).mean())(model)
        optimizer.update(model, g)
        return value

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
