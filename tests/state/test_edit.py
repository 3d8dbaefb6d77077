"""`reset` against `init`, in any wrapper; errors of `reset` and `rescale`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals
from conformance import gradients as drawn
from state.edited import ADAM, PARAMS, compiled, in_head, steps

import momentum_optax as mo


def test_a_parameter_that_begins_anew_has_its_first_step_again():
    # PyTorch's first gradient enters undampened, and only the first.
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9, dampening=0.75, first_step="gradient"))
    _, state = steps(tx)
    new = mo.reset(state, tx.init(PARAMS), in_head)
    (u,), after = steps(tx, 1, state=new, start=3)
    g, (before,) = drawn(PARAMS, 3), mo.velocity(state)
    np.testing.assert_allclose(u["head"]["w"], g["head"]["w"], rtol=1e-6)
    np.testing.assert_allclose(u["body"], 0.9 * before["body"] + 0.25 * g["body"], rtol=1e-5)
    np.testing.assert_array_equal(after.age["head"]["w"], 1)
    np.testing.assert_array_equal(after.age["body"], 4)


WRAPPED = {
    "guarded": lambda: mo.guarded(mo.sgd(0.1, mo.nesterov(0.9)), "leaf"),
    "restart": lambda: optax.chain(mo.adaptive_restart(mo.nesterov(mo.schedules.fista())), optax.scale(-0.1)),
    "scheduled": lambda: mo.scheduled_restart(mo.sgd(0.1, 0.9), 100),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.ema(0.9)), "mean"),
    "masked": lambda: optax.masked(mo.sgd(0.1, 0.9), {"head": True, "body": False}),
    "injected": lambda: optax.inject_hyperparams(mo.sgd)(learning_rate=0.1, momentum=0.9),
    "accumulated": lambda: optax.MultiSteps(mo.sgd(0.1, 0.9), 1),
    "partitioned": lambda: optax.partition({"a": mo.sgd(0.1, 0.9), "b": mo.sgd(0.2, 0.9)}, {"head": "a", "body": "b"}),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", WRAPPED)
def test_velocities_are_found_in_any_state(name):
    tx = WRAPPED[name]()
    state = steps(tx, 2)[1]
    new = mo.rescale(state, 4.0)
    assert avals(new) == avals(state)
    assert_bit_equal(mo.velocity(new), jax.tree.map(lambda x: 4 * x, mo.velocity(state)))
    fresh = tx.init(PARAMS)
    anew = mo.reset(state, fresh)
    assert avals(anew) == avals(state)
    assert_bit_equal(mo.velocity(anew), mo.velocity(fresh))
    some = mo.velocity(mo.reset(state, fresh, in_head))
    for v, old in zip(some, mo.velocity(state), strict=True):
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(v["head"]))
        assert_bit_equal(v["body"], old["body"])


def test_the_counters_of_wrappers_and_the_anchor_go_on():
    outer = mo.outer.diloco()
    state = outer.init(PARAMS)
    _, momentum = steps(mo.sgd(0.7, 0.9, nesterov=True))
    state = state._replace(momentum=momentum, anchor=drawn(PARAMS, 9))
    new = mo.reset(state, outer.init(PARAMS))
    assert_bit_equal(new.anchor, state.anchor)
    assert_bit_equal(new.momentum, outer.init(PARAMS).momentum)
    tx = WRAPPED["guarded"]()
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, state = compiled(tx)(bad, tx.init(PARAMS), PARAMS)
    assert int(mo.reset(state, tx.init(PARAMS)).skipped["body"].sum()) == 1


def test_fields_of_compress_begin_anew_as_their_optimizer_does():
    tx = mo.compress(optax.adagrad(0.1), {"sum_of_squares": "bfloat16"})
    _, state = steps(tx)
    fresh = tx.init(PARAMS)
    assert_bit_equal(mo.reset(state, fresh), fresh)  # 0.1, not zero
    tx = mo.compress(optax.adam(0.1), {"mu": "bfloat16"})  # nu stays in float32, beside it
    _, state = steps(tx)
    fresh = tx.init(PARAMS)
    new = mo.reset(state, fresh, in_head)
    assert_bit_equal(new.step, state.step)
    assert_bit_equal(new.inner[0].count, state.inner[0].count)
    assert_bit_equal(new.inner[0].nu, {"head": fresh.inner[0].nu["head"], "body": state.inner[0].nu["body"]})
    for a, b, part in zip(fresh.inner[0].mu.parts, state.inner[0].mu.parts, new.inner[0].mu.parts, strict=True):
        assert_bit_equal(part, ({"head": a[0]["head"], "body": b[0]["body"]},))


def test_errors_say_what_is_allowed():
    _, state = steps(mo.sgd(0.1, 0.9))
    for call in (lambda s, f: mo.rescale(s, 2.0, f), lambda s, f: mo.reset(s, mo.sgd(0.1, 0.9).init(PARAMS), f)):
        with pytest.raises(ValueError, match=r"true of a parameter, and is false of all: 'body', 'head/w'"):
            call(state, lambda path: False)
        with pytest.raises(TypeError, match=r"select must return True or False, got 1 for"):
            call(state, lambda path: 1)
        with pytest.raises(TypeError, match=r"select must be a function of a path .*, or None .*, got 'head'"):
            call(state, "head")
    with pytest.raises(TypeError, match=r"fresh must be an optimizer's state, .* got a transformation"):
        mo.reset(state, mo.sgd(0.1, 0.9))
    with pytest.raises(TypeError, match=r"factor must have names of fields as keys, got 1"):
        mo.rescale(state, {"velocity": 2.0, 1: 2.0, "trace": 2.0})
    with pytest.raises(ValueError, match=r"fresh must be .* 2/velocity must be a Float32Velocity, got an Int8Velocity"):
        mo.reset(state, mo.sgd(0.1, 0.9, storage="int8").init(PARAMS))
    with pytest.raises(ValueError, match=r"opt_state must hold a state of scale_by_momentum or compress, got none"):
        mo.reset(*[optax.adam(0.1).init(PARAMS)] * 2)
    with pytest.raises(ValueError, match=r"opt_state must hold velocities"):
        mo.rescale(optax.adam(0.1).init(PARAMS), 2.0)
    with pytest.raises(ValueError, match=r"factor must name fields of floats in opt_state, got 'trace'"):
        mo.rescale(state, {"velocity": 2.0, "trace": 2.0})
    with pytest.raises(ValueError, match=r"fields of floats, got 'count' of int32"):
        mo.rescale(optax.adam(0.1).init(PARAMS), {"count": 2.0})
    with pytest.raises(ValueError, match=r"factor for 'velocity' must be in \(-inf, inf\), got nan"):
        mo.rescale(state, float("nan"))
    with pytest.raises(TypeError, match=r"factor for 'velocity' must be a number or a scalar array, got 'x'"):
        mo.rescale(state, "x")
    with pytest.raises(TypeError, match=r"factor for 'velocity' must be a number or a scalar array, got float32\[3\]$"):
        mo.rescale(state, jnp.ones(3))
    adam = mo.compress(optax.adam(0.1), ADAM).init(PARAMS)
    with pytest.raises(ValueError, match=r"factor for 'nu' must be in \[0, inf\), got -1"):
        mo.rescale(adam, {"nu": -1})
