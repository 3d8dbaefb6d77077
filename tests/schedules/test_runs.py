"""Schedules over a run: what their table does not show."""

import pytest

from momentum_optax import schedules


def test_muons_momentum_stays_high_where_the_length_of_the_run_is_not_given():
    schedule = schedules.muon_momentum()
    assert [schedule(t) for t in (0, 150, 300, 10**6)] == pytest.approx([0.85, 0.9, 0.95, 0.95], rel=1e-15)
