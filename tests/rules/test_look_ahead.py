"""Look-ahead rules: Nesterov's two published forms, schedule-free averaging under a warm-up, the optimal bounds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax import rules
from tests.rules.oracles import START, gradient
from tests.rules.trajectories import points


def test_the_two_nesterovs_differ_under_a_schedule():
    decay = mo.schedules.nesterov_convex()
    assert not mo.equivalent(rules.nesterov(decay), rules.torch_nesterov(decay), rtol=1e-2)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("warmup", "power"), [(30, 2.0), (30, 1.0), (0, 2.0)])
def test_behind_a_warm_up_schedule_free_is_that_of_optax(warmup, power, x64):
    theirs = optax.contrib.schedule_free_sgd(0.5, warmup or None, b1=0.9, weight_lr_power=power)
    rate = optax.warmup_constant_schedule(0.0, 0.5, warmup) if warmup else 0.5
    rule = rules.schedule_free(0.9, warmup_steps=warmup, weight_power=power)
    ours = optax.chain(optax.scale_by_learning_rate(rate), mo.scale_by_momentum(rule))
    x = y = jnp.asarray(START)
    state, their_state = ours.init(x), theirs.init(y)
    step, their_step = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(100):
        u, state = step(gradient(np.asarray(x)), state)
        v, their_state = their_step(gradient(np.asarray(y)), their_state, y)
        x, y = x + u, y + v
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-8)  # Optax computes its weights in float32
    assert abs(np.asarray(x) - START).max() > 0.1


@pytest.mark.parametrize("power", [0, 3.5, 120, 1e4])
def test_the_weights_of_schedule_free_may_be_too_small_for_a_float(power):
    steps = 50
    rule = rules.schedule_free(0.9, warmup_steps=steps, weight_power=power)
    for t in range(2 * steps):
        logs = power * np.log(np.minimum(np.arange(1, t + 2), steps))
        share = 1 / np.sum(np.exp(logs - logs[-1]))
        # The rule is `primal_averaging` that keeps the rest.
        assert float(rule.at(t).A[0][0]) == pytest.approx(1 - share, rel=1e-12, abs=1e-12)


def thetas(steps):
    """OGM's, from 1."""
    theta = [1.0]
    for t in range(steps):
        theta.append((1 + math.sqrt(1 + (8 if t == steps - 1 else 4) * theta[-1] ** 2)) / 2)
    return theta


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_optimized_gradient_method_attains_its_bound(steps):
    # On L x^2/2, one of its two worst cases, after N steps from distance R: L R^2/(2 theta_N^2).
    L, R = 3.0, 2.0
    last = points(rules.optimized_gradient(steps), 1 / L, steps, lambda x: L * x, np.array([R]))[-1]
    bound = L * R**2 / (2 * thetas(steps)[-1] ** 2)
    assert L * last[0] ** 2 / 2 == pytest.approx(bound, rel=1e-12)
    if steps == 40:
        assert bound / (L * R**2) == pytest.approx(5.349826014e-4, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_the_optimized_gradient_method_for_the_norm_attains_its_bound(steps):
    # On Huber functions, here many at once: the squared gradient after N steps is 2 L (f(x_0) - f*)/theta_0^2.
    L, corner = 2.0, np.geomspace(1e-3, 10.0, 4000)

    def slope(x):
        return L * np.clip(x, -corner, corner)

    rule = mo.contrib.optimized_gradient_norm(steps)
    last = points(rule, 1 / L, steps, slope, np.ones_like(corner))[-1]
    start = np.where(corner >= 1, L / 2, L * corner * (1 - corner / 2))
    worst = (slope(last) ** 2 / start).max()
    bound = 2 * L / thetas(steps)[-1] ** 2
    assert worst == pytest.approx(bound, rel=1e-2)
    assert worst <= bound * (1 + 1e-12)
