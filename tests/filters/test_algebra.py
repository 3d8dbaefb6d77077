"""Laws of the algebra of filters, on random filters of every order."""

import math

import numpy as np
import pytest
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st

import momentum_optax as mo

laws = settings(derandomize=True, max_examples=40, deadline=None, database=None)
# Zeros and ones are drawn often: they are what rules are made of, and what pruning looks for.
ENTRIES = st.one_of(st.sampled_from([0.0, 1.0, -0.5]), st.floats(-1.0, 1.0).map(lambda x: round(x, 4)))
GAINS = st.floats(0.1, 10.0) | st.floats(-10.0, -0.1)


@st.composite
def filters(draw, orders=(0, 4)):
    """Filters of these orders; the sum of a row of A is at most 1, so that responses stay bounded."""
    K = draw(st.integers(*orders))
    rows = [draw(st.lists(ENTRIES, min_size=K, max_size=K)) for _ in range(K)]
    A = [[a / max(1.0, sum(map(abs, row))) for a in row] for row in rows]
    B, C, lookahead = (draw(st.lists(ENTRIES, min_size=K, max_size=K)) for _ in range(3))
    return mo.Filter(A, B, C, draw(ENTRIES), lookahead)


@st.composite
def bases(draw, order):
    """Well-conditioned matrices: a rotation, scaled along its axes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rotation = np.linalg.qr(rng.normal(size=(order, order)))[0] if order else np.zeros((0, 0))
    return rotation * np.array(draw(st.lists(st.floats(0.2, 5.0), min_size=order, max_size=order)))


SIGNAL = np.random.default_rng(0).normal(size=30)


def assert_same_updates(rule, other, gain=1.0):
    expected = gain * rule.response(SIGNAL)
    np.testing.assert_allclose(other.response(SIGNAL), expected, rtol=0, atol=1e-11 * (1 + abs(expected).max()))


def run(rule):
    """The evaluation point's offset lookahead . v after each gradient of `SIGNAL`."""
    A, B, _, _ = rule.matrices()
    v, out = np.zeros(rule.order), []
    for g in SIGNAL:
        v = A @ v + B * g
        out.append(float(np.array(rule.lookahead) @ v))
    return np.array(out)


@laws
@given(filters(), GAINS, GAINS)
def test_scaling_multiplies_the_updates_and_the_evaluation_point(rule, a, b):
    scaled = rule.scale(a).scale(b)
    assert_same_updates(rule, scaled, a * b)
    np.testing.assert_allclose(run(scaled), a * b * run(rule), rtol=1e-9, atol=1e-11)
    assert mo.equivalent(rule, scaled, (a * b, 1.0))


@laws
@given(filters(), GAINS)
def test_scaling_the_gradient_scales_the_updates_of_a_constant_rule(rule, gain):
    assert_same_updates(rule, rule.scale_gradient(gain), gain)


@laws
@given(st.data(), filters())
def test_a_change_of_basis_keeps_updates_and_evaluation_point_and_has_an_inverse(data, rule):
    T = data.draw(bases(rule.order))
    changed = rule.change_basis(T)
    assert_same_updates(rule, changed)
    np.testing.assert_allclose(run(changed), run(rule), rtol=1e-9, atol=1e-10)
    back = changed.change_basis(np.linalg.inv(T))
    for matrix, expected in zip(back.matrices(), rule.matrices(), strict=True):
        np.testing.assert_allclose(matrix, expected, atol=1e-10)


@laws
@given(filters())
def test_pruning_keeps_the_updates_and_is_done_after_once(rule):
    pruned = rule.pruned()
    assert pruned.order <= rule.order
    assert_same_updates(rule, pruned)
    np.testing.assert_allclose(run(pruned), run(rule), rtol=1e-9, atol=1e-11)
    assert pruned.pruned().matrices()[0].tolist() == pruned.matrices()[0].tolist()


@laws
@given(st.data(), filters(), filters())
def test_equivalence_is_reflexive_symmetric_and_tells_updates_apart(data, f, g):
    assert mo.equivalent(f, f.change_basis(data.draw(bases(f.order))), rtol=1e-8)
    assert mo.equivalent(f, g) == mo.equivalent(g, f)
    ours, theirs = f.impulse_response(20), g.impulse_response(20)
    if abs(ours - theirs).max() > 1e-3 * (1 + abs(ours).max()):
        assert not mo.equivalent(f, g)


@laws
@given(st.floats(-0.95, 0.95).filter(lambda a: abs(a) > 0.05), st.floats(-2, 2), st.floats(-2, 2))
def test_the_normal_form_is_the_rule(pole, h0, h1):
    rule = mo.Filter(pole, 1.0, h1 + pole * h0, h0)
    if abs(h0 + h1) < 0.05 or abs(h1 + pole * h0) < 1e-3:
        return  # without a gain, or without a memory
    form = rule.normal_form()
    assert form.decay == pytest.approx(pole)
    assert form.scale == pytest.approx(rule.dc_gain())
    assert_same_updates(mo.quasi_hyperbolic(form.decay, form.nu).scale(form.scale), rule)


@laws
@given(filters())
def test_responses_and_transfer_functions_are_those_of_scipy(rule):
    numerator, denominator = rule.transfer_function()
    np.testing.assert_allclose(rule.response(SIGNAL), scipy.signal.lfilter(numerator, denominator, SIGNAL), atol=1e-9)
    if rule.order:
        A, B, C, D = rule.matrices()
        theirs, poles = scipy.signal.ss2tf(A, B[:, None], C[None], np.array([[D]]))
        np.testing.assert_allclose(numerator, theirs[0], atol=1e-7)
        np.testing.assert_allclose(denominator, poles, atol=1e-7)


@laws
@given(filters())
def test_the_gain_is_the_transfer_function_at_one(rule):
    numerator, denominator = rule.transfer_function()
    if abs(sum(denominator)) > 1e-3:
        assert rule.dc_gain() == pytest.approx(sum(numerator) / sum(denominator), rel=1e-6, abs=1e-6)
    assert not math.isnan(rule.dc_gain())
