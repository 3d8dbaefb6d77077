"""Schedules made from others: restarts, and the correction for a learning rate that changes."""

import jax.numpy as jnp
import numpy as np

import momentum_optax as mo
from momentum_optax import schedules


def test_restart_by_period_begins_anew():
    schedule = schedules.restarted(schedules.nesterov_convex(), 7)
    assert [schedule(t) for t in (0, 6, 7, 8, 14)] == [0, 6 / 9, 0, 1 / 4, 0]


def test_a_restarted_nesterov_forgets_its_velocity():
    tx = mo.scale_by_momentum(mo.nesterov(schedules.restarted(schedules.nesterov_convex(), 5)))
    state = tx.init(jnp.zeros(3))
    for t in range(6):
        u, state = tx.update(jnp.full(3, 2.0), state)
        assert bool(jnp.all(u == 2.0)) == (t in (0, 5))


def test_the_correction_ends_the_history_where_the_rate_is_zero():
    rates = jnp.array([0.0, 0.1, 0.2, 0.0, 0.1])
    schedule = schedules.momentum_correction(0.5, lambda t: rates[t])
    np.testing.assert_allclose([float(schedule(t)) for t in range(5)], [0, 0, 0.25, 0, 0], rtol=1e-6)
