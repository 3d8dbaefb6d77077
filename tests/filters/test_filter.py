"""Filters: construction, responses, changes of basis and normal forms, against simulation and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from tests.filters.simulation import AGGMO, random_rule, simulate

SUM = mo.Filter(1.0, 1.0, 1.0, 1.0)  # of all gradients so far


def test_scalars_stand_for_a_rule_of_order_one():
    rule = mo.Filter(0.9, 1, 0.9, 1)
    assert (rule.order, rule.A, rule.B, rule.C, rule.D) == (1, ((0.9,),), (1.0,), (0.9,), 1.0)
    assert np.array_equal(mo.Filter([[0.9]], [1.0], [0.9], 1.0).impulse_response(5), rule.impulse_response(5))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_impulse_response_is_the_simulated_one(order):
    rule = random_rule(order, order)
    impulse = np.eye(1, 12)[0]
    np.testing.assert_allclose(rule.impulse_response(12), simulate(rule, impulse), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(rule.impulse_response(12, start=7), simulate(rule, impulse), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dc_gain_is_where_a_constant_gradient_settles(order):
    rule = random_rule(order, 10 + order)
    np.testing.assert_allclose(rule.dc_gain(), simulate(rule, np.ones(2000))[-1], rtol=1e-10)


def test_dc_gain_of_known_rules():
    assert mo.heavy_ball(0.9).dc_gain() == pytest.approx(10, rel=1e-14)
    assert mo.ema(0.99).dc_gain() == pytest.approx(1, rel=1e-13)
    assert AGGMO.dc_gain() == pytest.approx((1 + 10 + 100) / 3, rel=1e-13)
    assert mo.Filter(1.0, 1.0, 1.0, 1.0).dc_gain() == np.inf


@pytest.mark.parametrize("order", [1, 2, 3, 8])
def test_transfer_function_is_that_of_the_state_space(order):
    rule = random_rule(order, 20 + order)
    numerator, denominator = rule.transfer_function()
    A, B, C, D = rule.matrices()
    for z in (1.7, -2.0, 1.1 + 1.3j):
        direct = C @ np.linalg.solve(z * np.eye(order) - A, B) + D
        powers = z ** -np.arange(order + 1.0)
        np.testing.assert_allclose((numerator @ powers) / (denominator @ powers), direct, rtol=1e-10)


def test_transfer_function_of_a_moving_average_is_its_window():
    # The shift matrix is nilpotent: eigenvalues of it come out wrong, so a formula through them would fail here.
    numerator, denominator = mo.contrib.grokfast_average(50, 5.0).at(99).transfer_function()
    np.testing.assert_allclose(denominator, np.eye(1, 50)[0], atol=1e-12)
    np.testing.assert_allclose(numerator, np.full(50, 0.1) + np.eye(1, 50)[0], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_change_of_basis_keeps_the_updates_and_moves_the_velocities(order):
    rule = random_rule(order, 30 + order)
    T = np.random.default_rng(order).normal(size=(order, order))
    other = rule.change_basis(T)
    assert mo.equivalent(rule, other)
    A, B, _, _ = rule.matrices()
    A2, B2, _, _ = other.matrices()
    np.testing.assert_allclose(T @ A2, A @ T, atol=1e-12)
    np.testing.assert_allclose(T @ B2, B, atol=1e-12)


def test_a_change_of_basis_of_a_scheduled_rule_keeps_the_updates():
    rule = mo.ademamix_mix(lambda t: 0.5 + 0.001 * t, 0.99, lambda t: 0.1 * t)
    assert mo.equivalent(rule, rule.change_basis([[2.0, 1.0], [0.0, -3.0]]))


def test_a_change_of_basis_keeps_the_evaluation_point():
    rule = mo.nesterov(0.9)
    (scaled,) = rule.change_basis(4.0).lookahead
    assert scaled == 4.0 * rule.lookahead[0]


def test_minimality_finds_velocities_that_do_not_matter():
    assert mo.aggregated((0.9, 0.99)).is_minimal()
    assert not mo.aggregated((0.9, 0.9)).is_minimal()
    assert not AGGMO.is_minimal()
    assert AGGMO.pruned().is_minimal()
    assert not mo.Filter(0.9, 0.0, 1.0, 1.0).is_minimal()
    assert mo.complex_heavy_ball(0.9, 0.3).is_minimal()
    assert not mo.robust_momentum(10.0, 1.0, 0.9).is_minimal()  # its upper end is plain descent


def test_scale_multiplies_the_update_and_the_evaluation_point():
    rule = mo.triple_momentum(10.0, 1.0)
    np.testing.assert_allclose(rule.scale(3.0).impulse_response(9), 3 * rule.impulse_response(9))
    assert rule.scale(3.0).lookahead[0] == pytest.approx(3 * rule.lookahead[0])


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        (mo.heavy_ball(0.0), 0),
        (mo.nesterov(0.0), 0),
        (mo.mars_mix(0.0, 0.5), 0),
        (mo.ema(0.9), 1),
        (AGGMO, 2),
        (mo.aggregated((0.0, 0.0)), 0),
        (mo.optimistic(), 1),
        (mo.optimistic(1.0, 0.0), 0),
        (mo.Filter(((0.5, 0.0), (1.0, 0.5)), (1.0, 0.0), (0.0, 1.0), 0.0), 2),
        (mo.Filter(((0.5, 1.0), (0.0, 0.5)), (1.0, 0.0), (1.0, 0.0), 0.0), 1),
        (mo.heavy_ball(jnp.float32(0.0)), 1),
        (mo.heavy_ball(lambda t: 0.0 * t), 1),
    ],
)
def test_only_velocities_that_can_matter_are_kept(rule, order):
    pruned = rule.pruned()
    assert pruned.order == order
    assert mo.equivalent(rule, pruned)


def test_normal_form_goes_back_to_the_rule():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        rule = mo.Filter(rng.uniform(-0.95, 0.95), rng.normal(), rng.normal(), rng.normal())
        form = rule.normal_form()
        assert mo.equivalent(rule, mo.Filter(*_quasi_hyperbolic(form.decay, form.nu)).scale(form.scale))


def _quasi_hyperbolic(b, n):
    """The paper's rule in state space; `mo.quasi_hyperbolic` refuses the negative poles drawn here."""
    return b, 1 - b, n * b, 1 - n * b


@pytest.mark.parametrize(
    "rule", [mo.optimistic().at(1), AGGMO, mo.Filter(0.5, 1.0, -0.5, 1.0), mo.heavy_ball(0.0), SUM]
)
def test_no_normal_form_without_one_pole_and_a_gain(rule):
    with pytest.raises(ValueError, match="quasi-hyperbolic form"):
        rule.normal_form()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((((1.0, 2.0),), (1.0,), (1.0,), 1.0), ValueError, "A must be square"),
        (((1.0, 2.0), 1.0, 1.0, 1.0), ValueError, "A must be a scalar or rows"),
        ((0.5, (1.0, 2.0), 1.0, 1.0), ValueError, "B must have 1 entries"),
        ((((0.5, 0.0), (0.0, 0.5)), 1.0, (1.0, 1.0), 1.0), ValueError, "B must have 2 entries"),
        ((float("nan"), 1.0, 1.0, 1.0), ValueError, r"A\[0\]\[0\].*nan"),
        ((0.5, 1.0, 1.0, float("inf")), ValueError, "D must be.*inf"),
        ((0.5, "1", 1.0, 1.0), TypeError, r"B\[0\] must be.*'1'"),
        ((0.5, 1.0, True, 1.0), TypeError, r"C\[0\] must be.*True"),
        ((0.5, 1.0, 1.0, 1j), TypeError, "D must be.*1j"),
        ((0.5, 1.0, 1.0, jnp.float32), TypeError, "D must be"),
        ((0.5, 1.0, 1.0, mo.heavy_ball(0.9)), TypeError, "D must be"),
    ],
)
def test_wrong_coefficients_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        mo.Filter(*arguments)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: AGGMO.pruned().change_basis([[1.0, 2.0], [3.0]]),
            r"T must be 2 rows of 2 numbers, got \[\[1.0, 2.0\]",
        ),
        (lambda: AGGMO.pruned().change_basis([1.0, 2.0]), r"T must be 2 rows of 2 numbers, got shape \(2,\)"),
        (lambda: mo.heavy_ball(0.9).change_basis("x"), "T must be 1 rows of 1 numbers, got 'x'"),
        (lambda: jax.jit(lambda T: mo.heavy_ball(0.9).change_basis(T).D)(2.0), "T must be 1 rows of 1 numbers, got "),
        (lambda: mo.heavy_ball(0.9).response(1.0), "signal must have an axis of steps, .* got 1.0"),
        (lambda: mo.heavy_ball(0.9).scale(float("nan")), r"gain must be in \(-inf, inf\), got nan"),
        (lambda: mo.equivalent(mo.ema(0.9), mo.ema(0.9), rtol=-1.0), r"rtol must be in \[0, inf\), got -1.0"),
        (lambda: mo.heavy_ball(lambda t: 0.9).dc_gain(), "must be numbers"),
        (lambda: mo.heavy_ball(0.9).change_basis(0.0), "T must be invertible"),
        (lambda: mo.heavy_ball(0.9).change_basis(float("nan")), "T must be invertible"),
        (lambda: AGGMO.pruned().change_basis([[1.0, 2.0], [2.0, 4.0]]), "T must be invertible"),
        # Singular but for rounding: NumPy inverts it, to numbers that are wrong from the first digit on.
        (lambda: AGGMO.pruned().change_basis([[0.1, 0.3], [0.2, 0.6]]), "T must be invertible"),
        (lambda: mo.heavy_ball(0.9).change_basis([[1.0, 0.0], [0.0, 1.0]]), "T must be 1 rows"),
        (lambda: mo.equivalent(mo.ema(0.9), mo.ema(0.9), steps=0), "steps must be at least 1, got 0"),
        (lambda: mo.heavy_ball(0.9).impulse_response(-1), "n must be at least 0, got -1"),
    ],
)
def test_wrong_requests_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mo.heavy_ball(0.9).scale(None), "gain must be a number, a scalar array or a schedule .* got None"),
        (lambda: mo.heavy_ball(0.9).scale_gradient([1.0]), r"gain must be a number, .* got \[1.0\]"),
        (lambda: mo.ema(0.9).response([1.0, 1j]), r"signal must be real, got \[1.0, 1j\]"),
        (lambda: mo.equivalent(mo.ema(0.9), mo.ema(0.9), 0.1), "learning_rates must be two, .* got 0.1"),
        (lambda: mo.equivalent(mo.ema(0.9), mo.ema(0.9), (1, 1, 1)), r"learning_rates must be two, .* got \(1, 1, 1\)"),
        (lambda: mo.equivalent(mo.ema(0.9), mo.ema(0.9), (1.0, "x")), r"learning_rates\[1\] must be .* got 'x'"),
        (lambda: mo.equivalent(mo.ema(0.9), mo.ema(0.9), rtol="x"), "rtol must be a number, got 'x'"),
        (lambda: mo.heavy_ball(jax.random.key(0)), "decay must be a number, a scalar array or a schedule"),
        (lambda: mo.heavy_ball(Tensor()), "decay must be a number, a scalar array or a schedule .* got a tensor"),
    ],
)
def test_requests_of_the_wrong_type_are_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()


class Tensor:
    """A scalar of another library, whose dtypes are not NumPy's."""

    shape, dtype = (), "torch.float32"

    def __repr__(self):
        return "a tensor"
