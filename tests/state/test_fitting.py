"""Converted states continue as NumPy does: schedules, first steps, debiasing, wrappers, cycles."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals
from state.running import PARAMS, SCHEDULE, SGD, gradients, made, outcome

import momentum_optax as mo
from momentum_optax.state.mismatch import StateMismatchError


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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(4)
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
