"""Equivalence across forms, orders, schedules and learning rates."""

import momentum_optax as mo


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
