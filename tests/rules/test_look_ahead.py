"""Nesterov's rule in its two published forms."""

import momentum_optax as mo
from momentum_optax import rules


def test_the_two_nesterovs_differ_under_a_schedule():
    decay = mo.schedules.nesterov_convex()
    assert not mo.equivalent(rules.nesterov(decay), rules.torch_nesterov(decay), rtol=1e-2)
