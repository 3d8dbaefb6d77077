"""A state meets the optimizer that it was made for, or a sentence; and after the call that it names the run goes on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals

import momentum_optax as mo
from momentum_optax.state.mismatch import StateMismatchError

PARAMS = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
BYTES, SQUARES = STORAGES["int8"](), mo.storage.uint8(min_size=1)
SCHEDULE = optax.linear_schedule(0.9, 0.5, 8)
SGD = functools.partial(mo.sgd, 0.1)


def chained(rule, **options):
    return optax.chain(mo.scale_by_momentum(rule, **options), optax.scale_by_learning_rate(0.1))


def compressed(fields):
    return mo.compress(optax.adam(0.1), fields)


# Those with the velocity of one rule of order one: each of them can go on from each other.
ONE_VELOCITY = {
    **{name: lambda name=name: SGD(0.9, storage=STORAGES[name]()) for name in STORAGES},
    "ema": lambda: SGD(mo.ema(0.9)),
    "nesterov": lambda: SGD(mo.nesterov(0.9), storage=BYTES),
    "scheduled": lambda: SGD(SCHEDULE),
    "dampened": lambda: SGD(0.9, dampening=0.5),
    "dampened_int8": lambda: SGD(SCHEDULE, dampening=0.5, storage=BYTES),
    "scheduled_rate": lambda: mo.sgd(lambda t: 0.1 / (t + 1), 0.9),
    "no_momentum": lambda: SGD(None),
    "guarded": lambda: mo.guarded(SGD(0.9)),
    "guarded_leaf": lambda: mo.guarded(SGD(0.9, storage=BYTES), "leaf"),
    "monitor": lambda: mo.monitor(SGD(0.9)),
    "monitor_rule": lambda: mo.monitor(SGD(mo.heavy_ball(0.9)), mo.heavy_ball(0.9)),
    "restart": lambda: mo.adaptive_restart(mo.heavy_ball(0.9)),
    "restart_leaf": lambda: mo.adaptive_restart(mo.heavy_ball(0.9), scope="leaf"),
    "restart_function": lambda: mo.adaptive_restart(mo.heavy_ball(0.9), "function"),
    "restart_steps": lambda: mo.scheduled_restart(SGD(0.9), 4),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.lion_mix()), "mean"),
    "accumulated": lambda: mo.accumulated(mo.heavy_ball(0.9), 2, optax.scale(-0.1)),
    "accumulated_int8": lambda: mo.accumulated(mo.heavy_ball(SCHEDULE), 2, storage=BYTES),
    "storm": lambda: mo.contrib.scale_by_storm(0.1),
    "storm_scheduled": lambda: mo.contrib.scale_by_storm(lambda t: 0.1),
    "lion": lambda: mo.lion(0.1, storage="bfloat16"),
    "mars": lambda: mo.contrib.mars_lion(0.1, gamma=lambda t: 0.02),
}  # fmt: skip
# What is wrong here is said by Optax, which gets the state first: they are converted only.
BY_OPTAX = {
    "injected": lambda: optax.inject_hyperparams(mo.sgd)(learning_rate=0.1, momentum=0.9),
    "masked": lambda: optax.masked(SGD(0.9), {"w": True, "b": True}),
    "chain": lambda: chained(mo.heavy_ball(0.9)),
    "chain_ema": lambda: chained(mo.ema(0.9)),
    "cautious_decay": lambda: optax.chain(
        mo.scale_by_momentum(mo.ema(0.9)), mo.add_cautious_weight_decay(lambda t: 0.1, "sign_bit")
    ),
}
# Those that none of the others can become.
APART = {
    "aggregated": lambda: SGD(mo.aggregated((0.5, 0.9))),
    "debiased": lambda: mo.guarded(mo.scale_by_momentum(mo.ema(0.9), debias=True)),
    "adaptive_storm": lambda: mo.contrib.storm(0.1),
    "yellowfin": mo.contrib.yellowfin,
    "adam": lambda: optax.adam(0.1),
    "optax_sgd": lambda: optax.sgd(0.1, 0.9),
    "optax_ema": lambda: optax.ema(0.9),
    "optax_lion": lambda: optax.lion(0.1),
}  # fmt: skip
COMPRESSED = {
    "mu": lambda: compressed({"mu": BYTES}),
    "mu_bfloat16": lambda: compressed({"mu": "bfloat16"}),
    "mu_float32": lambda: compressed({"mu": "float32"}),
    "both": lambda: compressed({"mu": BYTES, "nu": SQUARES}),
    "nu": lambda: compressed({"nu": "float32"}),
    "predicate": lambda: mo.compress(optax.adam(0.1), lambda path, leaf: "mu" in str(path), BYTES),
    "plain": lambda: optax.with_extra_args_support(optax.adam(0.1)),
}
FIELDS = {
    "mu": {"mu": BYTES}, "mu_bfloat16": {"mu": "bfloat16"}, "mu_float32": {"mu": "float32"}, "nu": {"nu": "float32"},
    "both": {"mu": BYTES, "nu": SQUARES}, "predicate": {"mu": BYTES, "nu": SQUARES}, "plain": "float32",
}  # fmt: skip
ALL = ONE_VELOCITY | BY_OPTAX | APART
IN_BYTES = {"int8", "nesterov", "dampened_int8", "guarded_leaf", "accumulated_int8"}
KEPT = {name: BYTES for name in IN_BYTES} | {"int4": STORAGES["int4"](), "bfloat16": "bfloat16", "lion": "bfloat16"}
SAYS = ("mo.convert", "mo.interop.from_optax", "mo.checkpoint.from_fields")


def gradients(t, like=PARAMS):
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), like)


def step(tx, g, state):
    extra = {"previous_gradient": g, "value": jnp.float32(1)}
    return optax.with_extra_args_support(tx).update(g, state, PARAMS, **extra)


@functools.cache
def made(name):
    """An optimizer and its state after two steps, two micro-batches at least."""
    tx = (ALL | COMPRESSED)[name]()
    state = tx.init(PARAMS)
    one = jax.jit(lambda g, s: step(tx, g, s)[1])
    for t in range(2):
        state = one(gradients(t), state)
    return tx, state


def outcome(tx, state):
    """None if the optimizer takes the state and keeps its form, else the sentence."""
    try:
        after = jax.eval_shape(lambda s: step(tx, gradients(0), s)[1], state)
    except StateMismatchError as error:
        message = str(error)
        assert len(message) < 300
        assert any(call in message for call in SAYS)
        return message
    assert avals(after) == avals(state)
    return None


FAST = ("float32", "scheduled", "dampened", "scheduled_rate", "no_momentum", "guarded", "monitor_rule", "accumulated")
# Off by a rounding of the storage.
CLOSE = {"int4": 0.5, "int8": 0.05, "bfloat16": 0.01, "float32": 0.0}


def assert_goes_on(old, new):
    """A state of one optimizer is taken or refused by another, and taken once it is converted."""
    (_, state), (tx, _) = made(old), made(new)
    outcome(tx, state)
    like = tx.init(PARAMS)
    converted = mo.convert(state, KEPT.get(new, "float32"), like=like)
    assert avals(converted) == avals(like)
    assert outcome(tx, converted) is None
    if "no_momentum" not in {old, new}:
        close = CLOSE[new if new in CLOSE else "int8" if new in KEPT else "float32"]
        pairs = zip(*(jax.tree.leaves(mo.velocity(x)) for x in (converted, state)), strict=True)
        assert all(np.linalg.norm(a - b) <= close * np.linalg.norm(b) for a, b in pairs)


@pytest.mark.parametrize("new", FAST)
def test_each_state_is_taken_or_refused_in_a_sentence_and_goes_on_once_converted(new):
    for old in FAST:
        assert_goes_on(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("new", ONE_VELOCITY)
def test_every_state_goes_on_with_every_optimizer_of_one_velocity(new):
    for old in ONE_VELOCITY | BY_OPTAX:
        assert_goes_on(old, new)


@pytest.mark.parametrize("new", BY_OPTAX)
def test_what_optax_wraps_goes_on_once_converted(new):
    tx = made(new)[0]
    for old in FAST:
        converted = mo.convert(made(old)[1], "float32", like=tx.init(PARAMS))
        assert outcome(tx, converted) is None, old


@pytest.mark.parametrize("new", [*APART, "float32", "guarded", "accumulated", "storm"])
def test_what_cannot_become_the_other_is_refused_twice_in_a_sentence(new):
    tx = made(new)[0]
    for old in APART:
        if old == new or (old, new) in {("debiased", "float32"), ("debiased", "guarded")}:
            continue
        state = made(old)[1]
        if new not in {"adam", "optax_sgd", "optax_ema", "optax_lion"}:
            assert outcome(tx, state), old
        if old in {"debiased", "adaptive_storm"} and new in {"float32", "guarded", "accumulated", "storm"}:
            continue  # their velocity is of one rule of order one
        if (old, new) == ("debiased", "adaptive_storm"):
            continue
        with pytest.raises(ValueError, match="like must") as error:
            mo.convert(state, "float32", like=tx.init(PARAMS))
        assert len(str(error.value)) < 300


IN_FLOATS = {"mu_bfloat16", "mu_float32", "nu", "plain"}


@pytest.mark.parametrize(
    "new", [name if name in IN_FLOATS else pytest.param(name, marks=pytest.mark.slow) for name in COMPRESSED]
)
def test_compressed_fields_are_packed_and_read_in_full(new):
    tx = made(new)[0]
    like = tx.init(PARAMS)
    for old in IN_FLOATS if new in IN_FLOATS else COMPRESSED:
        state = made(old)[1]
        # A predicate is asked at init, and Adam itself has no say.
        if new not in {"plain", "predicate"}:
            said = outcome(tx, state)
            same = FIELDS[old] == FIELDS[new] and old != "predicate"
            assert (said is None) == same, (old, said)
        converted = mo.convert(state, FIELDS[new], like=like)
        assert avals(converted) == avals(like), old
        assert outcome(tx, converted) is None, old


def test_a_field_that_like_compresses_needs_a_storage_that_is_fit_for_it():
    like = jax.eval_shape((ALL | COMPRESSED)["both"]().init, PARAMS)
    with pytest.raises(ValueError, match="storage must say how to keep 'nu', which like compresses"):
        mo.convert(made("plain")[1], {"mu": BYTES}, like=like)
    with pytest.raises(ValueError, match="'nu' holds second moments"):
        mo.convert(made("plain")[1], {"mu": BYTES, "nu": BYTES}, like=like)


@pytest.mark.parametrize("name", ["optax_sgd", "optax_ema", "optax_lion", "adam"])
@pytest.mark.parametrize("ours", ["float32", "ema", "lion", "storm", "guarded", "restart", "monitor"])
def test_optax_states_name_the_function_that_takes_their_velocity(name, ours):
    assert "mo.interop.from_optax(tx.init(params), opt_state)" in outcome(made(ours)[0], made(name)[1])
    if ours == "float32" and name == "optax_sgd":
        state = mo.interop.from_optax(made(ours)[0].init(PARAMS), made(name)[1])
        assert outcome(made(ours)[0], state) is None


def without_names(state):
    """As Orbax restores without a target: dictionaries for NamedTuples, lists for tuples."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return {name: without_names(x) for name, x in zip(state._fields, state, strict=True)} or None
    if isinstance(state, tuple):
        return [without_names(x) for x in state]
    return {k: without_names(x) for k, x in state.items()} if isinstance(state, dict) else state


@pytest.mark.parametrize("name", sorted(ONE_VELOCITY.keys() - {"no_momentum"}))
def test_a_state_restored_without_its_classes_names_the_call_that_gives_them_back(name):
    tx, state = made(name)
    plain = without_names(state)
    message = outcome(tx, plain)
    assert "mo.checkpoint.from_fields(mo.checkpoint.fields(opt_state), tx.init(params))" in message
    assert_bit_equal(mo.checkpoint.from_fields(mo.checkpoint.fields(plain), tx.init(PARAMS)), state)


# Trajectories.


def run(tx, state, begin=2, end=6):
    """The updates of steps in float64, and the state after them."""
    update, out = jax.jit(tx.update), []
    for t in range(begin, end):
        u, state = update(gradients(t), state, PARAMS)
        out.append(np.asarray(u["w"], np.float64))
    return np.array(out), state


def ball(v, mu, share=lambda t: 1.0, begin=2, end=6):
    """NumPy's heavy ball from velocity v."""
    out = []
    for t in range(begin, end):
        v = mu(t) * v + share(t) * np.asarray(gradients(t)["w"], np.float64)
        out.append(-0.1 * v)
    return np.array(out)


def velocity_of(name):
    return np.asarray(mo.velocity(made(name)[1])[0]["w"], np.float64)


@pytest.mark.parametrize("first", [0, 3])
def test_a_schedule_begins_at_the_step_of_like(first):
    tx = made("scheduled")[0]
    like = optax.tree.set(tx.init(PARAMS), step=jnp.int32(first))
    out, _ = run(tx, mo.convert(made("float32")[1], "float32", like=like))
    # From 0.9 to 0.5 in 8 steps.
    np.testing.assert_allclose(out, ball(velocity_of("float32"), lambda t: 0.9 - 0.05 * (t - 2 + first)), rtol=1e-5)
    # A step that was counted goes on, whatever like has.
    out, _ = run(tx, mo.convert(made("dampened_int8")[1], "float32", like=like))
    np.testing.assert_allclose(out, ball(velocity_of("dampened_int8"), lambda t: 0.9 - 0.05 * t), rtol=1e-5)
    # And a constant needs none.
    out, state = run(
        made("float32")[0], mo.convert(made("scheduled")[1], "float32", like=made("float32")[0].init(PARAMS))
    )
    np.testing.assert_allclose(out, ball(velocity_of("scheduled"), lambda t: 0.9), rtol=1e-5)
    assert optax.tree.get(state, "step") is None


@pytest.mark.parametrize("compiled", [False, True])
def test_dampening_finds_the_first_step_past_where_a_leaf_has_a_velocity(compiled):
    tx = made("dampened")[0]

    def convert(state):
        return mo.convert(state, "float32", like=tx.init(PARAMS))

    convert = jax.jit(convert) if compiled else convert
    out, state = run(tx, convert(made("float32")[1]))
    np.testing.assert_allclose(out, ball(velocity_of("float32"), lambda t: 0.9, lambda t: 0.5), rtol=1e-5)
    assert int(optax.tree.get(state, "age")["w"].item()) == 1 + 4
    # A leaf that has received nothing has its first step, undampened, before it.
    fresh = SGD(0.9).init(PARAMS)
    out, _ = run(tx, convert(fresh))
    np.testing.assert_allclose(out, ball(0.0, lambda t: 0.9, lambda t: 1.0 if t == 2 else 0.5), rtol=1e-5)
    # Steps that were counted are ages.
    ages = optax.tree.get(convert(made("scheduled")[1]), "age")
    assert [int(x.item()) for x in ages.values()] == [2, 2]
    # And back.
    out, _ = run(made("float32")[0], mo.convert(made("dampened")[1], "float32", like=made("float32")[0].init(PARAMS)))
    np.testing.assert_allclose(out, ball(velocity_of("dampened"), lambda t: 0.9), rtol=1e-5)


def test_debiasing_can_be_left_out_and_not_added():
    plain, debiased = made("chain_ema")[0], made("debiased")[0]
    out, _ = run(plain, mo.convert(made("debiased")[1], "float32", like=plain.init(PARAMS)))
    v, expected = velocity_of("debiased"), []
    for t in range(2, 6):
        v = 0.9 * v + 0.1 * np.asarray(gradients(t)["w"], np.float64)
        expected.append(-0.1 * v)
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    state = mo.guarded(mo.scale_by_momentum(mo.ema(0.9))).init(PARAMS)
    assert "the state has no gains, which debias=True reads" in outcome(debiased, state)
    assert "has the gains of debias=True" in outcome(mo.guarded(mo.scale_by_momentum(mo.ema(0.9))), made("debiased")[1])
    with pytest.raises(ValueError, match=r"like must not debias a running state .*debias=False"):
        mo.convert(state, "float32", like=debiased.init(PARAMS))


@pytest.mark.parametrize("name", ["guarded", "monitor", "monitor_rule", "restart_steps", "injected", "masked"])
def test_what_is_put_around_or_taken_off_changes_nothing(name):
    plain, wrapped = made("float32")[0], made(name)[0]
    if name == "restart_steps":
        wrapped = mo.scheduled_restart(SGD(0.9), 100)
    expected, _ = run(plain, made("float32")[1])
    on, state = run(wrapped, mo.convert(made("float32")[1], "float32", like=wrapped.init(PARAMS)))
    np.testing.assert_allclose(on, expected, rtol=1e-5)
    again, _ = run(plain, mo.convert(state, "float32", like=plain.init(PARAMS)), 6, 9)
    straight, _ = run(plain, run(plain, made("float32")[1])[1], 6, 9)
    np.testing.assert_allclose(again, straight, rtol=1e-5)


def test_notes_of_wrappers_and_counters_of_schedules_go_on_where_both_have_them():
    def make(scope, rate, momentum):
        return mo.guarded(mo.sgd(rate, momentum), scope)

    rate = lambda t: 0.1 / (t + 1)  # noqa: E731
    tx, new = make("tree", rate, 0.9), make("tree", rate, SCHEDULE)
    state = tx.init(PARAMS)
    for t in range(3):
        bad = jax.tree.map(lambda x, t=t: x * (jnp.nan if t == 1 else 1), gradients(t))
        _, state = tx.update(bad, state, PARAMS)
    converted = mo.convert(state, "float32", like=new.init(PARAMS))
    assert int(converted.skipped) == 1
    assert int(optax.tree.get(converted, "count")) == 2
    # Where the form is another, counting begins anew.
    leaf = make("leaf", 0.1, 0.9)
    assert "one count for all leaves" in outcome(leaf, make("tree", 0.1, 0.9).init(PARAMS))
    converted = mo.convert(state, "float32", like=leaf.init(PARAMS))
    assert [int(x.item()) for x in converted.skipped.values()] == [0, 0]
    assert "ScaleByScheduleState" not in str(jax.tree.structure(converted))


def test_accumulation_begins_and_ends_with_a_cycle():
    rule = mo.heavy_ball(SCHEDULE)
    plain = optax.chain(mo.scale_by_momentum(rule), optax.scale(-0.1))
    tx = mo.accumulated(rule, 2, optax.scale(-0.1))
    state = plain.init(PARAMS)
    for t in range(2):
        _, state = plain.update(gradients(t), state, PARAMS)
    expected, straight = run(plain, state)
    on = mo.convert(state, "float32", like=tx.init(PARAMS))
    assert int(on.gradient_step) == 2
    assert {int(x.item()) for x in on.momentum.age.values()} == {4}
    out = []
    for t in range(2, 6):
        for half in (0.5, 1.5):  # their mean is the gradient
            u, on = tx.update(jax.tree.map(lambda g, half=half: half * g, gradients(t)), on, PARAMS)
        out.append(np.asarray(u["w"], np.float64))
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    off = mo.convert(on, "float32", like=plain.init(PARAMS))
    assert int(off[0].step) == 6
    np.testing.assert_allclose(run(plain, off, 6, 8)[0], run(plain, straight, 6, 8)[0], rtol=1e-5)
    _, within = tx.update(gradients(6), on, PARAMS)
    with pytest.raises(ValueError, match="must be at the end of a cycle of micro-batches, got 1 of them"):
        mo.convert(within, "float32", like=plain.init(PARAMS))


def test_a_momentum_that_one_side_has_not_begins_at_zero_or_is_left_out():
    rate = lambda t: 0.1 / (t + 1)  # noqa: E731
    without, with_one = mo.sgd(rate, None), mo.sgd(rate, 0.9)
    state = without.init(PARAMS)
    for t in range(2):
        _, state = without.update(gradients(t), state)
    new = mo.convert(state, "float32", like=with_one.init(PARAMS))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(mo.velocity(new)))
    assert int(optax.tree.get(new, "count")) == 2
    _, new = with_one.update(gradients(2), new)
    assert "without momentum, got a MomentumState" in outcome(without, new)
    assert_bit_equal(mo.convert(new, "float32", like=without.init(PARAMS)), without.update(gradients(2), state)[1])


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8", "int4"])
def test_what_is_in_that_storage_already_stays_to_the_bit(name):
    state = made(name)[1]
    tx = SGD(SCHEDULE, dampening=0.5, storage=STORAGES[name]())
    converted = mo.convert(state, STORAGES[name](), like=tx.init(PARAMS))
    assert_bit_equal(optax.tree.get(converted, "velocity"), optax.tree.get(state, "velocity"))
    assert_bit_equal(mo.convert(made("both")[1], FIELDS["both"]), made("both")[1])


def test_outer_momentum_and_errors_of_like():
    outer, lossy = mo.outer.diloco(), mo.outer.diloco(exchange="int8")
    state = outer.init(PARAMS)
    with pytest.raises(StateMismatchError, match=r"the OuterState has no residual, .*mo\.convert"):
        jax.eval_shape(
            lambda s: jax.vmap(lambda p: lossy.exchange(p, s, axis_name="w"), axis_name="w")(
                jax.tree.map(lambda x: x[None], PARAMS)
            ),
            state,
        )
    assert avals(mo.convert(state, "float32", like=lossy.init(PARAMS))) == avals(lossy.init(PARAMS))
    tx = made("scheduled")[0]
    with pytest.raises(ValueError, match=r"like must hold arrays, as init gives, where the state lacks something"):
        mo.convert(made("float32")[1], "float32", like=jax.eval_shape(tx.init, PARAMS))
    with pytest.raises(ValueError, match=r"like must have the shapes of the new state, \(8,\) at velocity.*\['b'\]"):
        mo.convert(made("float32")[1], "float32", like=SGD(0.9).init(PARAMS | {"b": jnp.ones(7)}))
    with pytest.raises(ValueError, match=r"like must have the structure of the new state in velocity"):
        mo.convert(made("float32")[1], "float32", like=SGD(0.9).init({"w": PARAMS["w"]}))
    with pytest.raises(ValueError, match=r"storage must be that of like, which keeps velocities as Int8Velocity"):
        mo.convert(made("float32")[1], "float32", like=made("int8")[0].init(PARAMS))


def test_an_error_of_the_gradients_is_not_said_to_be_one_of_the_state():
    tx, state = made("float32")
    with pytest.raises(ValueError, match=r"the gradients lack params\['b'\]"):
        tx.update({"w": PARAMS["w"]}, state)
    with pytest.raises(TypeError, match="previous_gradient must be given"):
        made("mars")[0].update(gradients(0), made("mars")[1], PARAMS)
