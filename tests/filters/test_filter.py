"""The algebra of filters, against direct simulation and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.filters import post_write_form, velocity_only_readout

AGGMO = mo.aggregated((0.0, 0.9, 0.99))
SUM = mo.Filter(1.0, 1.0, 1.0, 1.0)  # of all gradients so far


def simulate(rule, gradients):
    """The definition of a filter, written out for numbers."""
    A, B, C, D = rule.matrices()
    v, out = np.zeros(rule.order), []
    for g in gradients:
        out.append(C @ v + D * g)
        v = A @ v + B * g
    return np.array(out)


def random_rule(order, seed):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(order, order))
    A *= 0.9 / max(1e-9, abs(np.linalg.eigvals(A)).max())
    return mo.Filter(A, rng.normal(size=order), rng.normal(size=order), rng.normal())


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


def test_equivalence_across_forms_orders_and_learning_rates():
    assert mo.equivalent(mo.nesterov(0.9), mo.torch_nesterov(0.9))
    assert not mo.equivalent(mo.nesterov(0.9), mo.heavy_ball(0.9))
    assert mo.equivalent(mo.heavy_ball(0.9), mo.ema(0.9), (0.01, 0.1))
    assert not mo.equivalent(mo.heavy_ball(0.9), mo.ema(0.9), (0.01, 0.11))
    assert mo.equivalent(mo.aggregated((0.9, 0.9)), mo.heavy_ball(0.9))
    assert not mo.equivalent(mo.heavy_ball(0.9), mo.heavy_ball(0.9 * 0.999))


def test_equivalence_looks_at_schedules_and_first_steps():
    def decay(t):
        return 0.5 + 0.4 * t / (t + 5)

    assert not mo.equivalent(mo.nesterov(decay), mo.torch_nesterov(decay))
    assert mo.equivalent(mo.nesterov(decay), mo.nesterov(decay).change_basis(3.0))
    damped = mo.heavy_ball(0.9, dampening=0.5)
    assert not mo.equivalent(damped, mo.heavy_ball(0.9, dampening=0.5, first_step="gradient"))
    assert mo.equivalent(mo.heavy_ball(0.9), mo.heavy_ball(0.9, first_step="gradient"))


def test_equivalence_under_a_learning_rate_schedule_is_that_of_the_scheduled_product():
    def rate(t):
        return 0.1 / (1 + t)

    corrected = mo.heavy_ball(mo.schedules.momentum_correction(0.9, rate))
    inside = mo.Filter(0.9, rate, 0.9, rate)
    assert mo.equivalent(corrected, inside, (rate, 1.0))
    assert not mo.equivalent(mo.heavy_ball(0.9), inside, (rate, 1.0))


def test_scale_multiplies_the_update_and_the_evaluation_point():
    rule = mo.triple_momentum(10.0, 1.0)
    np.testing.assert_allclose(rule.scale(3.0).impulse_response(9), 3 * rule.impulse_response(9))
    assert rule.scale(3.0).lookahead[0] == pytest.approx(3 * rule.lookahead[0])


def test_at_an_integer_gives_python_floats_and_at_a_tracer_jax_values():
    rule = mo.chebyshev(10.0, 1.0)
    assert all(isinstance(c, float) for c in rule.at(3).coefficients())
    traced = jax.jit(lambda t: jnp.stack([jnp.asarray(c) for c in rule.at(t).coefficients()]))(3)
    np.testing.assert_allclose(traced, rule.at(3).coefficients(), rtol=3e-7)


def test_a_leaf_has_its_own_first_step():
    rule = mo.grokfast(0.9, 2.0)
    assert rule.reads_age
    assert not rule.reads_step
    assert rule.at(7, age=0).D == 3.0
    assert rule.at(0, age=7).D == pytest.approx(1.2)
    damped = mo.heavy_ball(0.9, dampening=lambda t: 0.1 * t, first_step="gradient")
    assert damped.reads_step
    assert damped.at(5, age=1).D == pytest.approx(0.5)


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


def test_the_algebra_needs_no_jax_values():
    rule = mo.heavy_ball(np.float32(0.9))
    assert rule.is_constant
    assert type(rule.A[0][0]) is float


def test_what_is_made_of_a_first_step_that_follows_a_schedule_follows_it_too():
    rule = mo.heavy_ball(0.9, dampening=lambda t: 0.5 / (t + 1), first_step="gradient")
    other = rule.change_basis(2.0).scale(1.0)  # makes every coefficient anew
    assert other.reads_step
    assert other.reads_age
    signal = jnp.asarray([1.0, -2.0, 0.5])
    v, expected = 0.0, []
    for t, g in enumerate(signal.tolist()):
        v = 0.9 * v + g * (1 - 0.5 / (t + 1) if t else 1.0)
        expected.append(v)
    tx, got = mo.scale_by_momentum(other), []
    state = tx.init(signal[0])
    for g in signal:
        u, state = tx.update(g, state)
        got.append(float(u))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_optax_schedules_serve_as_coefficients():
    rule = mo.heavy_ball(optax.linear_schedule(0.5, 0.9, 4))
    assert [round(float(rule.at(t).C[0]), 4) for t in range(6)] == [0.5, 0.6, 0.7, 0.8, 0.9, 0.9]


@pytest.mark.parametrize(
    ("rule", "late"),
    [
        (mo.heavy_ball(0.9), (1.0, (1.0,), 0.0)),
        (mo.ema(0.99), (1.0, (1.0,), 0.0)),
        (mo.nesterov(0.9), (1.0, (1.0,), 1.0)),
        (mo.nesterov(0.9).scale(0.1), (0.1, (1.0,), 1.0)),
        (mo.aggregated((0.0, 0.9, 0.99)).pruned(), (1 / 3, (1.0, 1.0), 1.0)),
        (mo.lion_mix(), None),  # nothing is saved
        (mo.heavy_ball(1e-6), (1.0, (1.0,), 0.0)),
        (mo.optimistic().at(1), None),  # the new velocity does not contain the old one
        (mo.nesterov(lambda t: 0.9), None),
    ],
)
def test_an_update_is_read_from_the_new_velocities_where_that_saves_multiplications(rule, late):
    found = post_write_form(rule)
    assert (found is None) == (late is None)
    if late:
        assert found[0] == pytest.approx(late[0])
        assert (found[1], found[2]) == (late[1], late[2])
        A, B, C, D = rule.matrices()
        np.testing.assert_allclose(found[0] * (found[1] @ A), C, rtol=1e-12)
        np.testing.assert_allclose(found[0] * (found[1] @ B + found[2]), D, rtol=1e-12)


@pytest.mark.parametrize("off", [1e-6, -1e-6, 1e-9])
def test_a_coefficient_that_is_nearly_one_is_not_taken_for_one(off, x64):
    signal = np.random.default_rng(0).normal(size=20)
    for rule in (
        mo.heavy_ball(0.9).scale(1 + off),
        mo.Filter(0.9, 1.0, 0.9 * (1 + off), 1.0),
        mo.Filter(0.9, 1.0, 0.9, 1 + off),
        mo.aggregated((0.5, 0.9)).scale(2 * (1 + off)),
    ):
        runs = [mo.scale_by_momentum(rule)]
        # Micro-batches of one gradient, where they are possible: they read the update from the velocities too.
        runs += [mo.accumulated(rule, 1)] if velocity_only_readout(rule) else []
        for tx in runs:
            step = jax.jit(lambda state, g, tx=tx: tx.update(g, state)[::-1])
            _, got = jax.lax.scan(step, tx.init(jnp.zeros(())), jnp.asarray(signal))
            np.testing.assert_allclose(got, simulate(rule, signal), rtol=0, atol=1e-13 * 20)


def compiled_bytes(tx):
    """Bytes per parameter of a donated step, as XLA counts them for this CPU."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state

    leaf = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(leaf, jax.eval_shape(tx.init, leaf), leaf).compile()
    return compiled.cost_analysis()["bytes accessed"] / 512**2, compiled.memory_analysis().temp_size_in_bytes


def test_nesterov_moves_the_bytes_of_optax_and_aggregated_needs_no_copy():
    theirs = compiled_bytes(optax.chain(optax.trace(0.9, nesterov=True), optax.scale(-0.1)))
    assert compiled_bytes(optax.chain(mo.scale_by_momentum(mo.nesterov(0.9)), optax.scale(-0.1))) == theirs
    moved, temporary = compiled_bytes(optax.chain(mo.scale_by_momentum(mo.aggregated()), optax.scale(-0.1)))
    assert moved <= 44.01
    assert temporary == 0
