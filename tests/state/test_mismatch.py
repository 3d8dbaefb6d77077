"""A state that belongs to another optimizer is refused in a sentence; the call that it names helps."""

import jax.numpy as jnp
import optax
import pytest
from conformance import assert_bit_equal
from state.running import APART, BY_OPTAX, FAST, ONE_VELOCITY, PARAMS, assert_goes_on, gradients, made, outcome

import momentum_optax as mo
from momentum_optax.state.mismatch import StateMismatchError


@pytest.mark.one_in(8)
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


@pytest.mark.one_in(8)
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


@pytest.mark.one_in(4)
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


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", sorted(ONE_VELOCITY.keys() - {"no_momentum"}))
def test_a_state_restored_without_its_classes_names_the_call_that_gives_them_back(name):
    tx, state = made(name)
    plain = without_names(state)
    message = outcome(tx, plain)
    assert "mo.checkpoint.from_fields(mo.checkpoint.fields(opt_state), tx.init(params))" in message
    assert_bit_equal(mo.checkpoint.from_fields(mo.checkpoint.fields(plain), tx.init(PARAMS)), state)


def test_an_error_of_the_gradients_is_not_said_to_be_one_of_the_state():
    tx, state = made("float32")
    with pytest.raises(ValueError, match=r"the gradients lack params\['b'\]"):
        tx.update({"w": PARAMS["w"]}, state)
    with pytest.raises(TypeError, match="previous_gradient must be given"):
        made("mars")[0].update(gradients(0), made("mars")[1], PARAMS)


TABLE = jnp.ones((6, 4))
MOMENTUM = mo.row_sparse(mo.heavy_ball(0.9), 0.1)
OTHER_TABLES = {
    "Optax's": (lambda: optax.trace(0.9).init(TABLE), "must be a RowSparseState, got a TraceState"),
    "a chain's": (lambda: mo.sgd(0.1, 0.9).init(TABLE), "must be a RowSparseState, got a tuple of 4"),
    "another rule's": (
        lambda: mo.row_sparse(mo.aggregated((0.5, 0.9)), 0.1).init(TABLE),
        "must have 1 entries in velocity, got a tuple of 2",
    ),
    "a restored one": (MOMENTUM.init(TABLE)._asdict, "must be a RowSparseState, got a dict"),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("call", ["read", "update", "flush"])
@pytest.mark.parametrize("name", OTHER_TABLES)
def test_a_table_refuses_the_state_of_another_optimizer_in_a_sentence(name, call):
    make, problem = OTHER_TABLES[name]
    rows = jnp.array([0, 2])
    arguments = {"read": (rows,), "update": (jnp.ones((2, 4)), rows), "flush": ()}[call]
    with pytest.raises(StateMismatchError) as error:
        getattr(MOMENTUM, call)(TABLE, make(), *arguments)
    assert problem in str(error.value)
    assert "begin with init(table)" in str(error.value)
    assert len(str(error.value)) < 300
    getattr(MOMENTUM, call)(TABLE, MOMENTUM.init(TABLE), *arguments)


def test_the_call_that_is_named_gives_a_restored_table_its_class_back():
    state = MOMENTUM.init(TABLE)
    plain = {"step": state.step, "velocity": list(state.velocity), "last": state.last}
    assert_bit_equal(mo.checkpoint.from_fields(mo.checkpoint.fields(plain), MOMENTUM.init(TABLE)), state)
