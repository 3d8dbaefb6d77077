"""Velocities of one rule as those of another with the same updates: the run goes on as it would have."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import RULES, assert_bit_equal
from interop.live_states import PARAMS, assert_close, go_on

import momentum_optax as mo
from momentum_optax.interop import Recipe

interop = mo.interop


def constant_rules():
    for name, make in RULES.items():
        rule = make().pruned()
        if not rule.reads_step and name not in ("ademamix_mix", "nadam_mix", "grokfast_average"):
            yield name


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", list(constant_rules()))
def test_a_rule_goes_on_in_other_velocities(name, x64):
    rule = RULES[name]().pruned()
    T = (
        np.eye(rule.order) * 2.0
        + np.triu(np.full((rule.order,) * 2, 0.3), 1)
        - np.tril(np.full((rule.order,) * 2, 0.2), -1)
    )
    other = rule.change_basis(T)
    like = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    one, two = (mo.scale_by_momentum(r) for r in (rule, other))
    whole, _ = go_on(one, one.init(like), range(9), like)
    _, state = go_on(one, one.init(like), range(5), like)
    state = interop.change_basis(state, rule, other, into=two.init(like))
    got, _ = go_on(two, state, range(5, 9), like)
    assert_close(got, whole[5:], rtol=1e-12, atol=1e-13)


SAME = {
    "ema and heavy ball": (mo.ema(0.9), mo.heavy_ball(0.9).scale(0.1)),
    "two forms of Nesterov": (mo.nesterov(0.9), mo.torch_nesterov(0.9)),
    "Lion and its normal form": (mo.lion_mix(), mo.quasi_hyperbolic(0.99, 0.9 / 0.99)),
    "AccSGD and its normal form": (
        mo.accelerated(),
        mo.quasi_hyperbolic(*mo.accelerated().normal_form()[1:]).scale(mo.accelerated().normal_form()[0]),
    ),
    "AggMo in another order": (mo.aggregated((0.5, 0.9, 0.99)), mo.aggregated((0.99, 0.5, 0.9))),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pair", SAME)
@pytest.mark.parametrize("back", [False, True])
def test_published_rules_with_the_same_updates_take_over_from_each_other(pair, back, x64):
    a, b = SAME[pair][::-1] if back else SAME[pair]
    like = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    one, two = (mo.scale_by_momentum(r) for r in (a, b))
    whole, _ = go_on(one, one.init(like), range(9), like)
    _, state = go_on(one, one.init(like), range(5), like)
    got, _ = go_on(two, interop.change_basis(state, a, b, into=two.init(like)), range(5, 9), like)
    assert_close(got, whole[5:], rtol=1e-9, atol=1e-12)


RECIPES = [
    Recipe("torch_sgd", lr=0.1, momentum=0.9),
    Recipe("keras_sgd", learning_rate=0.1, momentum=0.9),
    Recipe("caffe_sgd", base_lr=0.1, momentum=0.9),
    Recipe("qhoptim_qhm", lr=1.0, momentum=0.9, nu=1.0),
    Recipe("flash_sgd", lr=0.2, momentum=0.9, dampening=0.5),
]


@pytest.mark.one_in(8)
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(RECIPES, 2)), ids=lambda r: r.dialect)
def test_dialects_take_over_from_each_other(source, target):
    one, two = source.transformation(), target.transformation()
    whole, _ = go_on(one, one.init(PARAMS), range(9))
    _, state = go_on(one, one.init(PARAMS), range(5))
    state = interop.change_basis(state, source.filter(), target.filter(), into=two.init(PARAMS))
    got, _ = go_on(two, state, range(5, 9))
    assert_close(got, whole[5:], rtol=3e-6, atol=1e-6)


def test_a_dampened_run_goes_on_past_its_first_step_only():
    damped = Recipe("torch_sgd", lr=0.2, momentum=0.9, dampening=0.5)
    plain = Recipe("torch_sgd", lr=0.1, momentum=0.9)
    one, two = damped.transformation(), plain.transformation()
    whole, _ = go_on(one, one.init(PARAMS), range(9))
    _, state = go_on(one, one.init(PARAMS), range(5))
    given = (damped.filter(), plain.filter())
    got, _ = go_on(two, interop.change_basis(state, *given, into=two.init(PARAMS)), range(5, 9))
    assert_close(got, whole[5:], rtol=3e-6, atol=1e-6)
    with pytest.raises(
        ValueError, match="the first step of 'dense/bias' is pending, and target has a different first step"
    ):
        interop.change_basis(one.init(PARAMS), *given, into=two.init(PARAMS))
    # The other way the ages say that the first step is past.
    _, state = go_on(two, two.init(PARAMS), range(5))
    back = interop.change_basis(state, *given[::-1], into=one.init(PARAMS))
    whole, _ = go_on(two, two.init(PARAMS), range(9))
    assert_close(go_on(one, back, range(5, 9))[0], whole[5:], rtol=3e-6, atol=1e-6)
    # Equal past their first steps, which differ.
    other = Recipe("torch_sgd", lr=0.125, momentum=0.9, dampening=0.2)
    with pytest.raises(ValueError, match="the first step of 'dense/bias' is pending"):
        interop.change_basis(
            one.init(PARAMS), damped.filter(), other.filter(), into=other.transformation().init(PARAMS)
        )
    # And a pending step stays pending where both have one.
    kept = interop.change_basis(one.init(PARAMS), given[0], given[0], into=one.init(PARAMS))
    assert_bit_equal(kept, one.init(PARAMS))


def basis(state_rule, source, target, into_rule, **options):
    state, into = (mo.scale_by_momentum(r).init(PARAMS) for r in (state_rule, into_rule))
    return interop.change_basis(state, source, target, into=into, **options)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (
            (mo.ema(0.9), mo.ema(0.9), mo.ema(0.8), mo.ema(0.8)),
            "must have the same updates and order, got impulse responses",
        ),
        ((mo.ema(0.9), mo.ema(0.9), mo.heavy_ball(0.9), mo.heavy_ball(0.9)), "must have the same updates"),
        (
            (mo.ema(0.9), mo.aggregated((0.5, 0.9)), mo.ema(0.9), mo.ema(0.9)),
            "source must be the rule of its state, of order 1, got 2",
        ),
        (
            (mo.ema(0.9), mo.ema(0.9), mo.ema(0.9), mo.aggregated((0.5, 0.9))),
            "target must be the rule of its state, of order 2, got 1",
        ),
        (
            (mo.schedule_free(), mo.schedule_free(), mo.ema(0.9), mo.ema(0.9)),
            r"source must have constant coefficients: give source.at\(step\)",
        ),
        (
            (mo.ademamix_mix(), mo.ademamix_mix(), mo.ademamix_mix(), mo.ademamix_mix()),
            "source must not change after the first gradient",
        ),
        (
            (mo.contrib.grokfast_average(5),) * 4,
            "source must not change after the first gradient, got one that changes at gradient 11",
        ),
        ((mo.aggregated((0.5, 0.5)),) * 4, "must need all its velocities, got a rule that fewer could express"),
    ],
)
def test_rules_that_cannot_take_over_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        basis(*arguments)


def test_errors_of_a_change_of_basis():
    ema = mo.ema(0.9)
    with pytest.raises(TypeError, match="source must be a Filter"):
        basis(ema, "ema", ema, ema)
    state = mo.scale_by_momentum(ema).init(PARAMS)
    debiased = mo.scale_by_momentum(ema, debias=True).init(PARAMS)
    with pytest.raises(ValueError, match="opt_state must not debias"):
        interop.change_basis(debiased, ema, ema, into=state)
    into = mo.scale_by_momentum(ema).init({"head": jnp.zeros(2)})
    with pytest.raises(ValueError, match="the other state has the entry 'dense/bias'"):
        interop.change_basis(state, ema, ema, into=into)
    into = mo.scale_by_momentum(ema).init(PARAMS | {"head": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"'head' must have shape \(3,\), got \(2,\)"):
        interop.change_basis(state, ema, ema, into=into)
