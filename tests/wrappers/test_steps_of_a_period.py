"""Which steps count for a rule with a period: those that the rule makes, under every wrapper that leaves some out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo

# Multiples of 1/64, whose means are exact in the float32 of MultiSteps.
GRADIENTS = np.round(64 * np.random.default_rng(0).normal(size=14)) / 64
LOOKAHEAD, CYCLES = mo.lookahead(3, 0.5), mo.heavy_ball(mo.schedules.cyclical(0.2, 0.9, 3))


def end(tx, gradients, start=None):
    """The parameter and the state after a run."""
    x, state = (jnp.zeros(()), tx.init(jnp.zeros(()))) if start is None else start
    for g in gradients:
        updates, state = tx.update(jnp.asarray(g, x.dtype), state, x)
        x = optax.apply_updates(x, updates)
    return x, state


def lookahead_loop(gradients):
    fast = slow = 0.0
    for t, g in enumerate(gradients):
        fast = fast + g
        if t % 3 == 2:
            fast = slow = slow + 0.5 * (fast - slow)
    return fast


def cycles_loop(gradients):
    x = v = 0.0
    for t, g in enumerate(gradients):
        v = (0.9, 0.9 - 0.7 * 2 / 3, 0.9 - 0.7 * 2 / 3)[t % 3] * v + g
        x = x + v
    return x


PAIRS = GRADIENTS.reshape(-1, 2)
WITH_BAD = np.insert(GRADIENTS, (4, 9), (np.nan, np.inf))
CASES = {
    "apply_if_finite": (optax.apply_if_finite(mo.scale_by_momentum(LOOKAHEAD), 9), WITH_BAD, lookahead_loop, GRADIENTS),
    "guarded": (mo.guarded(mo.scale_by_momentum(LOOKAHEAD)), WITH_BAD, lookahead_loop, GRADIENTS),
    "MultiSteps": (optax.MultiSteps(mo.scale_by_momentum(LOOKAHEAD), 2), GRADIENTS, lookahead_loop, PAIRS.mean(1)),
    "accumulated": (mo.accumulated(CYCLES, 2), GRADIENTS, cycles_loop, PAIRS.mean(1)),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("wrapper", CASES)
def test_only_the_steps_that_the_rule_makes_count(wrapper, x64):
    tx, given, loop, made = CASES[wrapper]
    assert float(end(tx, given)[0]) == pytest.approx(loop(made), rel=1e-12)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_resumed_run_keeps_its_place_in_the_period(at, x64):
    tx = mo.scale_by_momentum(LOOKAHEAD)
    saved = jax.device_get(end(tx, GRADIENTS[:at]))
    resumed, _ = end(mo.scale_by_momentum(LOOKAHEAD), GRADIENTS[at:], jax.tree.map(jnp.asarray, saved))
    assert float(resumed) == pytest.approx(lookahead_loop(GRADIENTS), rel=1e-12)
