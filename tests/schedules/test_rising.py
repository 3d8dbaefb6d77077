"""What single schedules that rise towards 1 promise beside their values."""

import pytest
from schedule_cases import FISTA

from momentum_optax import schedules


def test_fista_is_exact_far_beyond_its_table():
    schedule = schedules.fista()
    worst = max(abs(schedule(t) - FISTA[t]) for t in range(900, 200_000, 997))
    assert worst < 1e-13


def test_fista_forgets_like_three_over_k():
    assert 1 - schedules.fista()(10**6) == pytest.approx(3e-6, rel=1e-3)


def test_sutskever_drops_at_the_end():
    schedule = schedules.sutskever(0.995, stage=100, drop_at=5000)
    assert schedule(4999) == pytest.approx(min(1 - 0.5 / 50, 0.995))
    assert schedule(5000) == 0.9
    assert schedules.sutskever(0.6, stage=1, drop_at=1)(5) == 0.6
