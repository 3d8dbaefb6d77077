"""States of Optax's transformations, there and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from interop.live_states import PARAMS, assert_close, go_on, grads

import momentum_optax as mo

interop = mo.interop


TRACED = mo.scale_by_momentum(mo.heavy_ball(0.9)).init(PARAMS)


LINES = {
    "trace": (optax.trace(0.9), mo.scale_by_momentum(mo.heavy_ball(0.9)), {"steps": 5}),
    "trace-sgd": (optax.sgd(0.1, 0.9, nesterov=True), mo.sgd(0.1, 0.9, nesterov=True), {"steps": 5}),
    "ema": (optax.ema(0.9, debias=False), mo.scale_by_momentum(mo.ema(0.9)), {}),
    "ema-debiased": (optax.ema(0.9), mo.scale_by_momentum(mo.ema(0.9), debias=True), {"rule": mo.ema(0.9)}),
    "lion": (optax.lion(0.1, weight_decay=0.01), interop.lion(0.1, weight_decay=0.01), {}),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LINES)
def test_optax_states_go_on_here_and_ours_there(name):
    theirs, ours, options = LINES[name]
    like = jax.tree.map(lambda x: x + 1, PARAMS)
    whole, _ = go_on(theirs, theirs.init(like), range(8), like)
    _, state = go_on(theirs, theirs.init(like), range(5), like)
    got, _ = go_on(ours, interop.from_optax(ours.init(like), state, **options), range(5, 8), like)
    assert_close(got, whole[5:])
    _, state = go_on(ours, ours.init(like), range(5), like)
    got, _ = go_on(theirs, interop.to_optax(state, theirs.init(like), steps=5), range(5, 8), like)
    assert_close(got, whole[5:])


LABELS = {"dense": {"kernel": "a", "bias": "b"}, "head": "a"}


def grouped(one):
    return optax.partition({"a": one(0.1, 0.9), "b": one(0.2, 0.5)}, LABELS)


# Rows of `LINES` with several velocities on one side or both; `steps` where Optax does not count them.
GROUPS = {
    "muon": (optax.contrib.muon(0.1), mo.muon(0.1, mo.nadam_mix(0.95, psi=1e6)), {}),
    "muon and another": (
        optax.contrib.muon(0.1, nesterov=False),
        mo.muon(0.1, mo.ema(0.95), others=optax.adamw(0.1, weight_decay=0.0)),
        {},
    ),
    "groups": (grouped(optax.sgd), grouped(mo.sgd), {"steps": 5}),
    "groups here": (optax.sgd(0.1, 0.9), optax.partition(dict.fromkeys("ab", mo.sgd(0.1, 0.9)), LABELS), {"steps": 5}),
    "a mask": (
        optax.masked(optax.lion(0.1), {"dense": True, "head": False}),
        optax.masked(interop.lion(0.1), {"dense": True, "head": False}),
        {},
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "muon" in name else name for name in GROUPS]
)
def test_several_states_go_on_here_and_ours_there(name):
    theirs, ours, options = GROUPS[name]
    whole, _ = go_on(theirs, theirs.init(PARAMS), range(6))
    _, state = go_on(theirs, theirs.init(PARAMS), range(5))
    got, _ = go_on(ours, interop.from_optax(ours.init(PARAMS), state, **options), range(5, 6))
    assert_close(got, whole[5:], rtol=2e-5, atol=1e-6)
    _, state = go_on(ours, ours.init(PARAMS), range(5))
    back = interop.to_optax(state, theirs.init(PARAMS), steps=5)
    got, _ = go_on(theirs, back, range(5, 6))
    assert_close(got, whole[5:], rtol=2e-5, atol=1e-6)


def test_muons_velocity_comes_with_the_state_of_its_adam():
    theirs, ours = optax.contrib.muon(0.1), mo.muon(0.1)
    state = jax.tree.map(lambda x: x + 1, theirs.init(PARAMS))
    here = interop.from_optax(ours.init(PARAMS), state)
    (v,) = mo.velocity(here)
    np.testing.assert_array_equal(v["dense"]["kernel"], 1)
    assert isinstance(v["head"], optax.MaskedNode)
    there = interop.to_optax(here, theirs.init(PARAMS), steps=1)
    for name in ("ScaleByAdamState", "MuonState"):
        found = [optax.tree.get(s, name) for s in (state, there)]
        assert_bit_equal(*(x._replace(ns_coeffs=()) if name == "MuonState" else x for x in found))
    assert_bit_equal(optax.tree.get(here, "ScaleByAdamState"), optax.tree.get(state, "ScaleByAdamState"))


def test_a_state_of_compress_has_another_way():
    theirs, ours = optax.adamw(0.1), mo.compress(optax.adamw(0.1), {"mu"}, "bfloat16")
    with pytest.raises(
        ValueError, match=r"got one of compress alone: mo.convert\(optax_state, storages, like=opt_state\)"
    ):
        interop.from_optax(ours.init(PARAMS), theirs.init(PARAMS))
    _, state = go_on(theirs, theirs.init(PARAMS), range(2))
    there = mo.convert(state, {"mu": "bfloat16"}, like=ours.init(PARAMS))
    assert_bit_equal(there.inner[0].nu, state[0].nu)
    sgd = mo.compress(optax.sgd(0.1, 0.9), {"trace"}, "bfloat16").init(PARAMS)
    for call in (interop.from_optax, interop.to_optax):
        with pytest.raises(ValueError, match=r"must keep its velocity in full, got one of compress: mo.convert"):
            call(TRACED, sgd)
    assert_bit_equal(
        interop.from_optax(TRACED, mo.convert(sgd, "float32", like=optax.sgd(0.1, 0.9).init(PARAMS))), TRACED
    )


def test_adams_momentum_goes_on_here_and_ours_there():
    adam, ours = optax.scale_by_adam(b1=0.9), mo.scale_by_momentum(mo.ema(0.9), debias=True)
    _, there = go_on(adam, adam.init(PARAMS), range(5))
    got, here = go_on(ours, interop.from_optax(ours.init(PARAMS), there, rule=mo.ema(0.9)), range(5, 8))
    m = there.mu
    for t, u in zip(range(5, 8), got, strict=True):
        m = jax.tree.map(lambda x, g: 0.9 * x + 0.1 * g, m, grads(t))
        assert_close(u, jax.tree.map(lambda x, t=t: x / (1 - 0.9 ** (t + 1)), m), rtol=2e-6)
    back = interop.to_optax(here, there, steps=8)
    assert int(back.count) == 8
    assert_close(back.mu, m)
    assert_bit_equal(back.nu, there.nu)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (
            lambda: interop.from_optax(TRACED, optax.adagrad(0.1).init(PARAMS)),
            "TraceState, EmaState, ScaleByLionState, ScaleByAdamState, MuonState, got 'ScaleByRssState'",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.contrib.schedule_free_sgd(0.1).init(PARAMS)),
            "must hold a state with a velocity, .*, got 'ScheduleFreeState'",
        ),
        (
            lambda: interop.from_optax(TRACED, (optax.trace(0.9).init(PARAMS),) * 2),
            "optax_state must hold one velocity per parameter, got two for 'dense/bias'",
        ),
        (
            lambda: interop.from_optax(
                mo.muon(0.1).init(PARAMS),
                optax.contrib.muon(
                    0.1, muon_weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: None, tree)
                ).init(PARAMS),
            ),
            "must have ScaleByAdamState for the same parameters, got 7 and 5 arrays in it",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.trace(0.9).init({"head": jnp.zeros(2)})),
            "the other state lacks the entry 'dense/bias'",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.trace(0.9).init(PARAMS | {"tail": jnp.zeros(2)})),
            "the other state has the entry 'tail'",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.trace(0.9).init(PARAMS | {"head": jnp.zeros(3)})),
            r"'head' must have shape \(2,\), got \(3,\)",
        ),
        (
            lambda: interop.from_optax(TRACED, optax.ema(0.9).init(PARAMS), steps=3),
            "steps must be the count of optax_state, 0, or None, got 3",
        ),
        (
            lambda: interop.from_optax(
                mo.scale_by_momentum(mo.ema(0.9), debias=True).init(PARAMS), optax.ema(0.9).init(PARAMS)
            ),
            "rule and the number of steps must be given",
        ),
        (
            lambda: interop.to_optax(TRACED, optax.ema(0.9).init(PARAMS)),
            "steps must be given, since optax_state counts them",
        ),
        (
            lambda: interop.to_optax(TRACED, optax.trace(0.9).init(PARAMS | {"head": jnp.zeros(3)})),
            r"'head' must have shape \(3,\), got \(2,\)",
        ),
        (
            lambda: interop.to_optax(TRACED, optax.trace(0.9).init({"head": jnp.zeros(2)})),
            "the other state lacks the entry",
        ),
        (
            lambda: interop.to_optax(
                mo.scale_by_momentum(mo.nesterov(lambda t: 0.9)).init(PARAMS), optax.ema(0.9).init(PARAMS), steps=3
            ),
            "steps must be what opt_state has counted, 0",
        ),
    ],
)
def test_optax_states_that_do_not_fit_are_named(function, match):
    with pytest.raises(ValueError, match=match):
        function()
