"""The table of rules and storages is complete, and what `scale_by_momentum` refuses at construction."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import (
    NOT_DEBIASABLE,
    RULES,
    SQUARES,
    STORAGES,
    descend,
    every_rule,
    normal,
    numeric_arguments,
    public_rules,
    public_storages,
    runner,
)

import momentum_optax as mo


def test_every_public_rule_and_storage_has_a_row():
    assert set(RULES) == public_rules()
    assert {name for name in public_rules() if not hasattr(mo.contrib, name)} <= set(vars(mo))
    assert set(STORAGES) | SQUARES == public_storages() == set(mo.storage.names._BY_NAME)
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
    with pytest.raises(
        ValueError, match="debias must be False for a rule whose response to a constant oscillates, got"
    ):
        mo.scale_by_momentum(rule, debias=True)


def test_the_error_for_many_poles_that_alternate_names_one():
    rule = mo.Filter(np.diag(-np.linspace(0.1, 0.9, 12)), np.ones(12), np.ones(12), 1.0)
    with pytest.raises(ValueError, match=r"got a pole -0\.1$"):
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


@pytest.mark.one_in(2)
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


@pytest.mark.one_in(12)
@every_rule
def test_storage_and_debiasing_change_the_trajectory(rule):
    signal = list(normal((5, 3)))
    plain = descend(runner(rule), jnp.zeros(3), signal)[0]
    for storage in STORAGES:
        stored = descend(runner(rule, storage), jnp.zeros(3), signal)[0]
        assert (np.asarray(plain) != np.asarray(stored)).any() == (storage != "float32")
    # A constant gradient leaves an optimistic step unchanged, so it is debiased already.
    if rule not in NOT_DEBIASABLE | {"optimistic"}:
        assert (np.asarray(plain) != np.asarray(descend(runner(rule, debias=True), jnp.zeros(3), signal)[0])).any()
