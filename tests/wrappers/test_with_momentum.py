"""`with_momentum`: the published loops, what the optimizer inside is shown, and what may be around and inside."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from behind import LOOPS, RULES, STEPS, expected, primal_averaging_loop, rate, runs
from conformance import assert_bit_equal, gradients
from flax import nnx
from flax_models import as_pure
from jax.sharding import PartitionSpec

import momentum_optax as mo

GPA = RULES["primal averaging"]
LIKE = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
TOLERANCE = 1e-12


def test_every_published_loop_under_a_cosine_rate_and_the_point_to_evaluate(x64):
    txs = {name: mo.with_momentum(optax.adam(rate()), rule) for name, rule in RULES.items()}
    decayed = optax.adamw(rate(), weight_decay=0.5)
    txs["decays at z"] = mo.with_momentum(decayed, GPA, inner_params="fast")
    txs["decays at y"] = mo.with_momentum(decayed, GPA)
    loops = {name: loop() for name, loop in LOOPS.items()}
    loops |= {f"decays at {point}": primal_averaging_loop(0.5, point) for point in ("z", "y")}
    points = {}
    for name, got in runs(txs, mo.eval_params).items():
        points[name] = expected(loops[name])
        for ours, theirs in zip(got, points[name], strict=True):
            assert ours.shape == (STEPS, 6)
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=name)
    for stored, evaluated in points.values():
        assert abs(stored - evaluated).max() > 1e-2
    assert abs(points["decays at z"][0] - points["decays at y"][0]).max() > 1e-2


@pytest.mark.slow
def test_lookahead_is_that_of_optax():
    base, tx = optax.lookahead(optax.adam(0.1), 5, 0.5), mo.with_momentum(optax.adam(0.1), RULES["Lookahead"])
    theirs = optax.LookaheadParams.init_synced(LIKE)
    ours, state, other = LIKE, tx.init(LIKE), base.init(theirs)
    for t in range(12):
        g = gradients(LIKE, t)
        u, other = base.update(g, other, theirs)
        theirs = optax.apply_updates(theirs, u)
        u, state = tx.update(g, state, ours)
        ours = optax.apply_updates(ours, u)
        for a, b in ((ours, theirs.fast), (mo.eval_params(state, ours), theirs.slow)):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6), a, b)
    assert not np.allclose(theirs.fast["w"], theirs.slow["w"], rtol=1e-3)


def test_each_leaf_is_kept_in_its_storage_and_evaluated():
    def run(storage):
        tx = mo.with_momentum(optax.sgd(0.1), GPA, storage=storage, inner_params="fast")
        params, state, step = LIKE, tx.init(LIKE), jax.jit(tx.update)
        for t in range(3):
            u, state = step(gradients(LIKE, t), state, params)
            params = optax.apply_updates(params, u)
        return params, mo.eval_params(state, params)

    nearest = mo.storage.bfloat16("nearest")
    storages = {"w": "float32", ".*": nearest}, "float32", nearest
    for got, wide, narrow in zip(*map(run, storages), strict=True):
        assert_bit_equal(got, {"w": wide["w"], "b": narrow["b"]})
        assert not np.array_equal(wide["b"], narrow["b"])


def test_two_velocities_take_two_bytes():
    tx = mo.with_momentum(optax.sgd(0.1), RULES["outer Nesterov"], storage="int8")
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((512, 512), jnp.float32))
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert 2.0 <= kept / 512**2 <= 2.1


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_one_byte_follows_the_run_in_float32(name):
    signal = np.random.default_rng(0).normal(size=(60, 16, 128)).astype(np.float32) + 0.5

    def moved(storage):
        tx = mo.with_momentum(optax.sgd(0.1), RULES[name], storage=storage)
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(jnp.zeros((16, 128))), signal)[1].sum(0)

    ours, theirs = jax.jit(lambda: (moved(mo.storage.int8(min_size=1)), moved("float32")))()
    # The noise of one byte, and no bias.
    assert 0 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.06
    assert abs(np.mean(ours - theirs) / np.mean(theirs)) < 0.005


@pytest.mark.slow
def test_it_is_the_chain_and_a_state_of_it_goes_where_others_go():
    rule, base = mo.primal_averaging(0.9, 0.7), optax.adam(0.1)
    tx, chain = mo.with_momentum(base, rule), optax.chain(base, mo.scale_by_momentum(rule))
    state, other = tx.init(LIKE), chain.init(LIKE)
    for t in range(3):
        u, state = tx.update(gradients(LIKE, t), state, LIKE)
        expected, other = chain.update(gradients(LIKE, t), other, LIKE)
        assert_bit_equal(u, expected)
    assert_bit_equal(tuple(state), other)
    assert_bit_equal(mo.velocity(state), mo.velocity(other))
    assert_bit_equal(mo.eval_params(state, LIKE), mo.eval_params(other, LIKE, -1))
    # Adam alone takes its own state along, and so does the way back.
    assert_bit_equal(mo.convert(state, "float32", like=base.init(LIKE)), state.inner)
    assert_bit_equal(mo.convert(state.inner, "float32", like=tx.init(LIKE)).inner, state.inner)
    narrow = mo.convert(state, mo.storage.int8(min_size=1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.03 * abs(b).max()), mo.velocity(narrow), mo.velocity(state)
    )
    fresh = mo.reset(state, tx.init(LIKE))
    assert_bit_equal(fresh.momentum, tx.init(LIKE).momentum)
    assert_bit_equal(fresh.inner, state.inner)
    doubled = mo.rescale(state, {"velocity": 2.0})
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, 2 * b), mo.velocity(doubled), mo.velocity(state))
    layout = mo.checkpoint.describe(state, rules=mo.checkpoint.rules_of(tx, LIKE))
    mo.checkpoint.check(layout, state, rules=rule)


def around_and_inside():
    """Optimizers that make the steps of Adam with GPA behind it."""
    adam = optax.adam(0.1)
    return {
        "compress around": mo.compress(mo.with_momentum(adam, GPA), {"mu": "float32"}),
        "compress inside": mo.with_momentum(mo.compress(adam, {"mu": "float32"}), GPA),
        "guarded": mo.guarded(mo.with_momentum(adam, GPA)),
        "guarded by leaf": mo.guarded(mo.with_momentum(adam, GPA), "leaf"),
        "apply_if_finite": optax.apply_if_finite(mo.with_momentum(adam, GPA), 3),
        "injected": optax.inject_hyperparams(
            lambda mu: mo.with_momentum(adam, mo.primal_averaging(mu, 0.7)), hyperparam_dtype=jnp.float32
        )(0.95),
        "injected fast": optax.inject_hyperparams(
            lambda mu: mo.with_momentum(adam, mo.primal_averaging(mu, 0.7), inner_params="fast"),
            hyperparam_dtype=jnp.float32,
        )(0.95),
        "masked": optax.masked(mo.with_momentum(adam, GPA), {"w": True, "b": True}),
        "fast": mo.with_momentum(adam, GPA, inner_params="fast"),
        "every step of MultiSteps": optax.MultiSteps(mo.with_momentum(adam, GPA), 1),
    }


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", around_and_inside())
def test_wrappers_around_and_inside_change_no_step(name):
    plain, tx = mo.with_momentum(optax.adam(0.1), GPA), around_and_inside()[name]
    params, other = LIKE, LIKE
    state, alone = tx.init(params), plain.init(other)
    step, plain_step = (jax.jit(optax.with_extra_args_support(x).update) for x in (tx, plain))
    for t in range(4):
        u, state = step(gradients(LIKE, t), state, params)
        params = optax.apply_updates(params, u)
        u, alone = plain_step(gradients(LIKE, t), alone, other)
        other = optax.apply_updates(other, u)
    for a, b in ((params, other), (mo.eval_params(state, params), mo.eval_params(alone, other))):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


@pytest.mark.slow
def test_the_live_state_of_nnx_runs_and_is_evaluated():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    start = as_pure(nnx.state(model, nnx.Param))
    tx = mo.with_momentum(optax.adam(0.1), GPA, inner_params="fast")
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    g = jax.tree.map(jnp.ones_like, start)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    u, state = tx.update(g, tx.init(start), start)
    live = mo.eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    assert_bit_equal(as_pure(live), mo.eval_params(state, optax.apply_updates(start, u)))


def test_the_state_is_split_as_the_parameters_are():
    mesh = jax.make_mesh((1,), ("data",))
    split, whole = (jax.NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    tx = mo.with_momentum(optax.adam(0.1), GPA, storage=mo.storage.int8(min_size=1))
    placed = mo.sharding.state_shardings(tx, LIKE, {"w": split, "b": split})
    assert placed.momentum.velocity.codes[0]["w"].spec[0] == "data"
    assert placed.inner[0].mu["w"].spec[0] == "data"
    assert placed.momentum.lookahead == (whole,)


def test_extra_arguments_reach_the_optimizer_and_a_leaf_without_a_gradient_stays():
    seen = {}

    def update(updates, state, params=None, *, value, **extra):
        seen["value"] = value
        return updates, state

    tx = mo.with_momentum(optax.GradientTransformationExtraArgs(optax.init_empty_state, update), GPA)
    state = tx.update(LIKE, tx.init(LIKE), value=3.0)[1]
    u, after = tx.update({"w": None, "b": LIKE["b"]}, state, value=4.0)
    assert seen["value"] == 4.0
    assert u["w"] is None
    assert_bit_equal(mo.velocity(after)[0]["w"], mo.velocity(state)[0]["w"])
    assert not np.array_equal(mo.velocity(after)[0]["b"], mo.velocity(state)[0]["b"])


def test_the_fast_iterate_moves_by_the_updates_alone():
    seen = []

    def update(updates, state, params):
        seen.append(params)
        return updates, state

    spy = optax.GradientTransformation(optax.init_empty_state, update)
    rule = mo.aggregated((0.5, 0.8))
    tx = mo.with_momentum(spy, rule, inner_params="fast")
    params, state = {**LIKE, "none": None}, tx.init({**LIKE, "none": None})
    for _ in range(3):
        u, state = tx.update({**LIKE, "none": None}, state, params)
        params = mo.apply_updates(params, u)
    gain = rule.dc_gain()
    for before, after in itertools.pairwise(seen):
        np.testing.assert_allclose(after["w"] - before["w"], gain * np.ones((2, 3)), rtol=1e-5)
    # No more updates: the parameters come to rest where the fast iterate is.
    _, state = tx.update({**LIKE, "none": None}, state, params)
    still = jax.tree.map(jnp.zeros_like, {**LIKE, "none": None})
    for _ in range(60):
        u, state = tx.update(still, state, params)
        params = mo.apply_updates(params, u)
    np.testing.assert_allclose(params["b"], seen[-1]["b"], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mo.with_momentum(GPA, GPA), r"tx must be a transformation .*scale_by_momentum\(rule\)"),
        (lambda: mo.with_momentum(optax.adam(0.1), 0.9), "rule must be a Filter"),
        (lambda: mo.with_momentum(optax.adam(0.1), GPA, inner_params="z"), "must be one of 'stored', 'fast', got 'z'"),
        (lambda: mo.with_momentum(optax.adam(0.1), RULES["Lookahead"], inner_params="fast"), "only a constant rule"),
        (lambda: mo.with_momentum(optax.adam(0.1), mo.ema(0.9), debias=True, inner_params="fast"), "debias=True"),
        (lambda: mo.with_momentum(optax.adam(0.1), mo.heavy_ball(1.0), inner_params="fast"), "a pole at 1"),
        (lambda: mo.with_momentum(optax.adam(0.1), GPA, storage="int7"), "storage must"),
        (
            lambda: mo.with_momentum(optax.adam(0.1), GPA, inner_params="fast").update(
                LIKE, mo.with_momentum(optax.adam(0.1), GPA).init(LIKE)
            ),
            "params must be given",
        ),
        (
            lambda: mo.with_momentum(optax.adam(0.1), GPA).update(LIKE, optax.adam(0.1).init(LIKE)),
            r"the state must be a WithMomentumState, .*mo\.convert",
        ),
        (
            lambda: mo.with_momentum(optax.adam(0.1), GPA).update(
                LIKE, mo.with_momentum(optax.adam(0.1), mo.ema(0.9)).init(LIKE)
            ),
            r"has no look-ahead, .*mo\.convert",
        ),
    ],
)
def test_what_cannot_be_is_said(make, words):
    with pytest.raises((TypeError, ValueError), match=words) as error:
        make()
    assert len(str(error.value)) < 300


def test_debiasing_divides_the_updates_behind_the_optimizer():
    tx = mo.with_momentum(optax.scale(-0.5), mo.ema(0.9), debias=True)
    u, state = tx.update(LIKE, tx.init(LIKE))
    np.testing.assert_allclose(u["w"], -0.5 * np.ones((2, 3)), rtol=1e-6)
    u, _ = tx.update(jax.tree.map(jnp.zeros_like, LIKE), state)
    np.testing.assert_allclose(u["w"], -0.5 * 0.09 / 0.19 * np.ones((2, 3)), rtol=1e-6)
