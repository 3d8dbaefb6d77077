"""`eval_params`: the state says where the point to evaluate is, wherever in it the rule is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, gradients

import momentum_optax as mo
from momentum_optax.state.checkpoint import formats

LIKE = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
RATE = 0.25
NESTEROV = mo.nesterov(0.5)
BEHIND = mo.primal_averaging(0.9, 0.7)
FINITE = {"w": True, "b": True}


def nesterov(rate=RATE, rule=NESTEROV):
    return optax.chain(mo.scale_by_momentum(rule), optax.scale_by_learning_rate(rate))


def after_steps(tx, steps=3, params=LIKE):
    """Parameters and state after some steps."""
    state, step = tx.init(params), jax.jit(optax.with_extra_args_support(tx).update)
    for t in range(steps):
        u, state = step(gradients(params, t), state, params)
        params = mo.apply_updates(params, u)
    return params, state


def two_sequences(rate=lambda t: RATE, steps=3, like=LIKE):
    """Nesterov's x in NumPy: the gradient is taken at y, and x is y less its step."""

    def run(x, *signal):
        y, v = np.asarray(x), 0.0
        for t, g in enumerate(signal):
            v = 0.5 * (v + np.asarray(g))
            x = y - rate(t) * np.asarray(g)
            y = x - rate(t) * v
        return x

    return jax.tree.map(run, like, *(gradients(like, t) for t in range(steps)))


def primal_average(steps=3):
    """GPA's x in NumPy, on plain steps at `RATE`."""

    def run(x, *signal):
        x = z = np.asarray(x)
        for g in signal:
            z = z - RATE * np.asarray(g)
            x = 0.9 * x + 0.1 * z
        return x

    return jax.tree.map(run, LIKE, *(gradients(LIKE, t) for t in range(steps)))


def check_close(got, expected, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 2e-6} | tolerance)), got, expected)


BEFORE = {
    "alone": nesterov,
    "sgd": lambda: mo.sgd(RATE, NESTEROV),
    "stochastic, counted": lambda: mo.sgd(RATE, NESTEROV, storage="bfloat16"),
    "masked": lambda: optax.masked(nesterov(), FINITE),
    "partition": lambda: optax.partition({"x": nesterov(), "y": nesterov()}, {"w": "x", "b": "y"}),
    "a mask for each": lambda: optax.chain(
        optax.masked(nesterov(), {"w": True, "b": False}), optax.masked(nesterov(), {"w": False, "b": True})
    ),
    "injected": lambda: optax.inject_hyperparams(mo.sgd, hyperparam_dtype=jnp.float32)(RATE, momentum=NESTEROV),
    "injected decay": lambda: optax.inject_hyperparams(
        lambda d: mo.sgd(RATE, mo.nesterov(d)), hyperparam_dtype=jnp.float32
    )(0.5),
    "guarded": lambda: mo.guarded(nesterov()),
    "guarded by leaf": lambda: mo.guarded(nesterov(), "leaf"),
    "apply_if_finite": lambda: optax.apply_if_finite(nesterov(), 3),
    "MultiSteps": lambda: optax.MultiSteps(nesterov(), 1),
    "compress": lambda: mo.compress(optax.chain(optax.trace(0.0), nesterov()), {"trace"}),
    "monitor": lambda: mo.monitor(mo.sgd(RATE, NESTEROV), NESTEROV),
    "restart": lambda: optax.chain(mo.scheduled_restart(mo.scale_by_momentum(NESTEROV), 100), optax.scale(-RATE)),
    "behind another momentum": lambda: optax.chain(mo.scale_by_momentum(mo.ema(0.0)), nesterov()),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", BEFORE)
def test_a_rule_before_the_rate_is_found_wherever_it_is(name):
    params, state = after_steps(BEFORE[name]())
    tolerance = {"rtol": 0.02} if name == "stochastic, counted" else {}
    check_close(mo.eval_params(state, params, RATE), two_sequences(), **tolerance)
    check_close(jax.jit(mo.eval_params)(state, params, jnp.float32(RATE)), mo.eval_params(state, params, RATE))


def test_a_rule_behind_the_rate_takes_minus_one_or_says_so_itself():
    base = optax.scale_by_learning_rate(RATE)
    params, state = after_steps(optax.chain(base, mo.scale_by_momentum(BEHIND)))
    check_close(mo.eval_params(state, params, -1), primal_average())
    params, state = after_steps(mo.with_momentum(base, BEHIND))
    check_close(mo.eval_params(state, params), primal_average())
    assert_bit_equal(mo.eval_params(state, params), mo.eval_params(state, params, -1))


def test_the_point_of_complex_parameters_needs_no_promotion():
    params = {"z": jnp.array([1 + 2j, 3j], jnp.complex64)}
    with jax.numpy_dtype_promotion("strict"):
        tx = nesterov()
        state = tx.update(params, tx.init(params))[1]
        for rate in (RATE, jnp.float32(RATE)):
            # The velocity is the decayed gradient.
            expected = params["z"] * np.complex64(1 + RATE * NESTEROV.B[0])
            check_close(mo.eval_params(state, params, rate), {"z": expected})


@pytest.mark.parametrize("counted", ["by the schedule", pytest.param("by the rule", marks=pytest.mark.slow)])
def test_a_schedule_is_read_at_the_last_step(counted, x64):
    like = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), LIKE)
    rate = optax.cosine_decay_schedule(0.3, 40)
    if counted == "by the schedule":
        tx = nesterov(rate)
    else:
        tx = optax.inject_hyperparams(lambda rate: nesterov(rate, mo.nesterov(lambda t: 0.5)))(rate)
    params, state = after_steps(tx, 20, like)
    expected = two_sequences(lambda t: 0.15 * (1 + np.cos(np.pi * t / 40)), 20, like)
    check_close(mo.eval_params(state, params, rate), expected, rtol=0, atol=1e-12)
    assert not np.allclose(mo.eval_params(state, params, 0.3)["w"], expected["w"], atol=1e-3)


def two_rules():
    return mo.with_momentum(mo.sgd(RATE, NESTEROV), BEHIND)


def test_of_two_rules_for_the_same_parameters_the_path_says_which():
    params, state = after_steps(two_rules())
    with pytest.raises(ValueError, match=r"several .* same parameters, at 'inner/2', 'momentum', got None"):
        mo.eval_params(state, params)
    fast = mo.eval_params(state, params, path="momentum")
    (inner, outer) = mo.velocity(state)
    check_close(fast, jax.tree.map(lambda p, v: p - 0.3 * v, params, outer))
    check_close(
        mo.eval_params(state, params, RATE, path="inner"), jax.tree.map(lambda p, v: p + RATE * v, params, inner)
    )
    with pytest.raises(ValueError, match=r"path must be the place of .*, of 'inner/2', 'momentum', got 'outer'"):
        mo.eval_params(state, params, RATE, "outer")


def test_rules_of_several_rates_are_taken_one_after_the_other():
    tx = optax.partition({"x": nesterov(RATE), "y": nesterov(1.0)}, {"w": "x", "b": "y"})
    params, state = after_steps(tx)
    point = mo.eval_params(state, params, RATE, "inner_states/x")
    assert_bit_equal(point["b"], params["b"])
    point = mo.eval_params(state, point, 1.0, "inner_states/y")
    check_close(point, {"w": two_sequences()["w"], "b": two_sequences(lambda t: 1.0)["b"]})
    # One that says where it is, and one that does not.
    mixed = optax.partition({"x": nesterov(), "y": mo.with_momentum(optax.scale(-RATE), BEHIND)}, {"w": "x", "b": "y"})
    params, state = after_steps(mixed)
    check_close(mo.eval_params(state, params, RATE), {"w": two_sequences()["w"], "b": primal_average()["b"]})


STATE = nesterov().init(LIKE)
WITH = mo.with_momentum(optax.scale(-RATE), BEHIND).init(LIKE)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mo.eval_params(STATE, LIKE), r"given for the rule at '0': the rate .* or -1 where"),
        (
            lambda: mo.eval_params(NESTEROV, STATE, LIKE, RATE),
            r"got Filter\(.*: the state knows .*eval_params\(opt_state, params, learn",
        ),
        (lambda: mo.eval_params(WITH, LIKE, RATE), "learning_rate must be None for with_momentum.* got 0.25"),
        (lambda: mo.eval_params(WITH, LIKE, lambda t: -1.0), "learning_rate must be None for with_momentum"),
        (lambda: mo.eval_params(STATE, LIKE, "0.1"), "learning_rate must be a number, .* got '0.1'"),
        (lambda: mo.eval_params(STATE, LIKE, lambda t: 0.1), r"schedule\(step - 1\), got a schedule: .* has 0 counts"),
        (lambda: mo.eval_params(STATE, LIKE, RATE, 0), "path must be a str"),
        (lambda: mo.eval_params(mo.sgd(RATE, 0.9).init(LIKE), LIKE, RATE), "such as nesterov, got none: then the par"),
        (lambda: mo.eval_params(optax.adam(RATE).init(LIKE), LIKE, RATE), "such as nesterov, got none"),
        (lambda: mo.eval_params(nesterov(), LIKE, RATE), "opt_state must be an optimizer's state"),
        (lambda: mo.eval_params(STATE, {"w": LIKE["w"]}, RATE), r"made for: they lack params\['b'\]"),
        (lambda: mo.eval_params(STATE, {**LIKE, "c": LIKE["b"]}, RATE), r"they have params\['c'\] too"),
        (lambda: mo.eval_params(STATE, {**LIKE, "b": {"c": LIKE["b"]}}, RATE), r"they lack params\['b'\]"),
        (lambda: mo.eval_params(STATE, {**LIKE, "b": None}, RATE), r"they lack params\['b'\]"),
        (lambda: mo.eval_params(STATE, [LIKE["b"], LIKE["w"]], RATE), r"they lack params\['b'\]"),
        (lambda: mo.eval_params(STATE, {**LIKE, "b": jnp.ones(4)}, RATE), r"\(3,\) for params\['b'\], got \(4,\)"),
        (
            lambda: mo.eval_params(mo.scale_by_momentum(NESTEROV, debias=True).init(LIKE), LIKE, RATE),
            "at '' is debiased, .* debias=False",
        ),
        (
            lambda: mo.scale_by_momentum(
                mo.Filter(0.9, 1.0, 0.9, 1.0, mo.heavy_ball(0.9, dampening=0.5, first_step="gradient").B)
            ),
            "lookahead of a rule must be .* got a PerLeafSchedule",
        ),
    ],
)
def test_what_cannot_be_known_is_an_error_with_a_way_out(call, words):
    with pytest.raises((TypeError, ValueError), match=words) as error:
        call()
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64, jnp.complex128])
def test_the_look_ahead_has_the_precision_of_the_widest_leaf_and_its_own_buffer(dtype, x64):
    decay = jnp.float32(0.9)
    tx = mo.scale_by_momentum(mo.torch_nesterov(decay))
    state = tx.init({"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, dtype)})
    wide = jnp.float64 if dtype in (jnp.float64, jnp.complex128) else jnp.float32
    assert [x.dtype for x in state.lookahead] == [wide]
    after = tx.update({"a": None, "b": None}, state)[1]
    for x in (*state.lookahead, *after.lookahead):
        assert x.dtype == wide
        assert not x.weak_type
        assert x.unsafe_buffer_pointer() != decay.unsafe_buffer_pointer()


def test_the_look_ahead_of_a_worker_stays_of_its_type_under_shard_map():
    tx = mo.scale_by_momentum(NESTEROV)
    mesh = jax.make_mesh((1,), ("workers",), axis_types=(jax.sharding.AxisType.Auto,))
    one = jax.sharding.PartitionSpec("workers")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=one, out_specs=one)
    def steps(states):
        state = jax.tree.map(lambda x: x[0], states)
        state, _ = jax.lax.scan(lambda s, _: (tx.update(LIKE, s)[1], None), state, length=3)
        return jax.tree.map(lambda x: x[None], state)

    after = steps(jax.tree.map(lambda x: x[None], tx.init(LIKE)))
    assert float(after.lookahead[0][0]) == 1.0


def test_the_look_ahead_of_the_last_step_stays_through_a_change_of_the_rule():
    params, state = after_steps(mo.sgd(RATE, mo.torch_nesterov(0.5)))
    point = mo.eval_params(state, params, RATE)
    check_close(point, two_sequences())
    for rule in (mo.torch_nesterov(0.9), mo.triple_momentum(4.0, 1.0)):
        assert_bit_equal(
            mo.eval_params(mo.convert(state, "float32", like=mo.sgd(RATE, rule).init(LIKE)), params, RATE), point
        )
    without = mo.convert(state, "float32", like=mo.sgd(RATE, 0.5).init(LIKE))
    assert optax.tree.get(without, "lookahead") is None
    # The heavy ball's parameters are the point, until a rule with another one makes a step.
    again = mo.convert(without, "float32", like=mo.sgd(RATE, NESTEROV).init(LIKE))
    assert_bit_equal(mo.eval_params(again, params, RATE), params)
    selected = mo.reset(state, mo.sgd(RATE, mo.torch_nesterov(0.7)).init(LIKE), lambda path: path == "w")
    check_close(mo.eval_params(selected, params, RATE), {"w": params["w"], "b": point["b"]})


@pytest.mark.parametrize(
    ("storage", "source", "known"),
    [
        ("float32", "init", True),
        ("float32", "shapes", False),
        # The state of a storage that rounds counts steps: the look-ahead of another step may be another one.
        pytest.param("bfloat16", "init", False, marks=pytest.mark.slow),
        pytest.param("bfloat16", "the state", True, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_of_the_first_format_takes_the_look_ahead_of_its_target(storage, source, known):
    tx = mo.sgd(RATE, NESTEROV, storage=storage)
    params, state = after_steps(tx)
    older = {k: x for k, x in mo.checkpoint.fields(state).items() if "lookahead" not in k}
    assert formats.FORMAT == 2
    assert mo.checkpoint.fields(state).keys() - older.keys() == {"2/lookahead/0"}
    target = {"init": tx.init(LIKE), "shapes": jax.eval_shape(tx.init, LIKE), "the state": state}[source]
    new = mo.checkpoint.migrate(older, mo.checkpoint.describe(older) | {"format": 1}, target)
    if known:
        assert_bit_equal(new, state)
    else:
        with pytest.raises(ValueError, match="at '2' is unknown, since its checkpoint is older"):
            mo.eval_params(new, params, RATE)
    u, new = tx.update(gradients(LIKE, 3), new, params)
    assert_bit_equal((u, new), tx.update(gradients(LIKE, 3), state, params))
