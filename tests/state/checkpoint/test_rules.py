"""The rules of a checkpoint: another rule is noticed although its state has the same form."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, check, describe, fields, rules_of

PARAMS = {"w": jnp.ones((4, 8)), "b": jnp.ones(8)}
OPTIMIZERS = {
    "sgd": lambda decay: mo.sgd(0.1, decay),
    "scheduled": lambda decay: mo.sgd(0.1, optax.linear_schedule(0.5, decay, 100)),
    "dampened": lambda decay: mo.sgd(0.1, decay, dampening=0.5),
    "lion": lambda decay: mo.lion(0.1, 0.9, decay),
    "muon": lambda decay: optax.masked(mo.muon(0.1, decay), {"w": True, "b": False}),
    "torch": lambda decay: mo.interop.torch_sgd(lr=0.1, momentum=decay),
    "guarded": lambda decay: mo.guarded(mo.sgd(0.1, mo.nesterov(decay), storage="int8"), "leaf"),
    "restart": lambda decay: mo.adaptive_restart(mo.nesterov(decay)),
    "accumulated": lambda decay: mo.accumulated(mo.ema(decay), 4),
    "partition": lambda decay: optax.partition({"a": mo.sgd(0.1, decay), "b": mo.sgd(0.1, 0.8)}, {"w": "a", "b": "b"}),
    "compress": lambda decay: mo.compress(optax.chain(mo.sgd(0.1, decay), optax.scale_by_adam()), {"mu"}, "bfloat16"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_rule_of_the_same_order_is_noticed(name):
    make = OPTIMIZERS[name]
    abstract = jax.eval_shape(make(0.9).init, PARAMS)
    layout = json.loads(json.dumps(describe(abstract, rules=rules_of(make(0.9), PARAMS))))
    check(layout, abstract, rules=rules_of(make(0.9), PARAMS))
    # The states have one form, so that nothing else could notice.
    check(layout, jax.eval_shape(make(0.91).init, PARAMS))
    with pytest.raises(CheckpointError, match=r"^rule 0 of the checkpoint is another one: .* must be .*, got .*"):
        check(layout, abstract, rules=rules_of(make(0.91), PARAMS))


def test_rules_are_found_however_often_shapes_were_asked_before():
    tx = mo.sgd(0.1, 0.9)
    jax.eval_shape(tx.init, PARAMS)
    assert [len(rules_of(tx, PARAMS)) for _ in range(2)] == [1, 1]


def test_rules_are_compared_by_their_coefficients():
    def compare(saved, now):
        check(describe({}, rules=saved), {}, rules=now)

    ball = mo.heavy_ball(0.9)
    compare(ball, [ball])
    compare(ball, mo.heavy_ball(lambda t: 0.9))  # a schedule that is constant is the number
    compare(mo.heavy_ball(jnp.float32(0.9)), ball)
    with pytest.raises(CheckpointError, match=r"B\[0\] must be 0\.1\d*, got 1$"):
        compare(ball, mo.ema(0.9))
    # What a leaf does first.
    with pytest.raises(CheckpointError, match=r"B\[0\] must be 0\.5 at step 0, got 1"):
        compare(mo.heavy_ball(0.9, dampening=0.5, first_step="gradient"), mo.heavy_ball(0.9, dampening=0.5))
    # What a schedule does late.
    with pytest.raises(CheckpointError, match=r"A\[0\]\[0\] must be 0\.9 at step 1000, got 0\.8"):
        compare(mo.heavy_ball(lambda t: jnp.where(t < 200, 0.9, 0.8)), mo.heavy_ball(lambda t: 0.9))
    with pytest.raises(CheckpointError, match=r"the order must be 2, got 1"):
        compare(ball, mo.aggregated((0.5, 0.9)))
    with pytest.raises(CheckpointError, match=r"of 2 rules, got 1"):
        compare(ball, [ball, ball])
    with pytest.raises(CheckpointError, match=r"described with rules= to compare them, got none"):
        check(describe({}), {}, rules=ball)
    with pytest.raises(TypeError, match=r"rules must be what rules_of gives, a Filter or a list of them, got 0\.9"):
        describe({}, rules=0.9)
    # What is traced is unknown, and agrees with anything; inside, schedules are numbers all the same.
    seen = []

    def inside(decay):
        seen.extend(rules_of(mo.scale_by_momentum(mo.heavy_ball(lambda t: decay * (t + 1))), PARAMS))
        seen.extend(rules_of(mo.sgd(0.1, optax.linear_schedule(0.5, 0.9, 100)), PARAMS))
        return decay

    jax.jit(inside)(0.5)
    assert seen[0]["A"][0][0] == [None] * 10
    np.testing.assert_allclose(seen[1]["A"][0][0][-1], 0.9, rtol=1e-6)
    compare(seen[:1], ball)


@pytest.mark.parametrize("name", ["sgd", "scheduled", "dampened", "lion", "muon", "torch", "guarded", "restart"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_monitor_notices_a_rule_that_is_not_the_one_inside(name, compiled):
    rules = {
        "sgd": mo.heavy_ball,
        "scheduled": lambda decay: mo.heavy_ball(optax.linear_schedule(0.5, decay, 100)),
        "dampened": lambda decay: mo.heavy_ball(decay, dampening=0.5, first_step="gradient"),
        "lion": lambda decay: mo.lion_mix(0.9, decay),
        "muon": mo.muon_mix,
        "torch": mo.heavy_ball,
        "guarded": mo.nesterov,
        "restart": mo.nesterov,
    }  # fmt: skip

    def init(rule):
        tx = mo.monitor(OPTIMIZERS[name](0.9), rule)
        return (jax.jit(tx.init) if compiled else tx.init)(PARAMS)

    init(rules[name](0.9))
    with pytest.raises(ValueError, match=r"^rule must be the one that tx runs .*must be .*, got") as error:
        init(rules[name](0.95))
    assert len(str(error.value)) < 300


def test_a_monitor_takes_a_traced_rule_as_it_is():
    def init(decay):
        return mo.monitor(mo.sgd(0.1, decay), mo.heavy_ball(0.5)).init(PARAMS)

    assert optax.tree.get(jax.jit(init)(0.9), "velocity") is not None


def test_fields_of_an_optimizer_with_rules_survive_json():
    state = mo.sgd(0.1, 0.9).init(PARAMS)
    layout = describe(state, rules=mo.heavy_ball(0.9))
    assert json.loads(json.dumps(layout)) == layout
    assert fields(state).keys() <= layout["fields"].keys()
