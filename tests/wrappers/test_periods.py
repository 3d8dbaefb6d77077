"""Which steps a periodic rule counts, and where it is in its period, under wrappers and after a resume."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal

import momentum_optax as mo

PERIOD = 3
OUTER = mo.outer_nesterov(PERIOD, 0.5, 0.4)
TWICE = mo.outer_nesterov(2 * PERIOD, 0.5, 0.4)
BASE = optax.scale(-0.5)
LIKE = {"w": jnp.zeros(2), "b": jnp.zeros(2)}
SIGNAL = [np.array([t + 1.0, (-1.0) ** t]) for t in range(16)]
BAD = np.array([np.nan, 1.0])
MEANS = [(a + b) / 2 for a, b in zip(SIGNAL[::2], SIGNAL[1::2], strict=True)]


def periods(signal):
    """The parameters after the steps for these gradients, with outer Nesterov steps, in NumPy."""
    x, slow, buffer = np.zeros(2), np.zeros(2), 0.0
    for t, g in enumerate(signal):
        x = x - 0.5 * g
        if (t + 1) % PERIOD == 0:
            buffer = 0.4 * buffer + slow - x
            x = slow = slow - 0.5 * (slow - x + 0.4 * buffer)
    return x


def heavy_ball(signal):
    """The velocities of a heavy ball of decay 0.5."""
    v, out = 0.0, []
    for g in signal:
        v = 0.5 * v + g
        out.append(v)
    return out


def run(tx, signal, params=LIKE, state=None):
    """Parameters and state after a step for each gradient; both leaves get the same."""
    state = tx.init(params) if state is None else state
    step = jax.jit(optax.with_extra_args_support(tx).update)
    for g in signal:
        tree = {name: jnp.asarray(g, jnp.float32) for name in LIKE} if isinstance(g, np.ndarray) else g
        u, state = step(tree, state, params)
        params = mo.apply_updates(params, u)
    return params, state


def with_bad(signal, at):
    return [*signal[:at], BAD, *signal[at:]]


def with_zeros(signal):
    """A zero before each gradient: what the rule sees where the optimizer inside does not move."""
    return [x for g in signal for x in (np.zeros(2), g)]


def behind(tx, rule=OUTER):
    return mo.with_momentum(tx, rule)


CASES = {
    # The rule is inside the wrapper: what the wrapper skips, it does not see, and its period waits.
    "alone": (behind(BASE), SIGNAL, SIGNAL, 16),
    "in MultiSteps": (optax.MultiSteps(behind(BASE), 2), SIGNAL, MEANS, 8),
    "in guarded": (mo.guarded(behind(BASE)), with_bad(SIGNAL, 4), SIGNAL, 16),
    "in apply_if_finite": (optax.apply_if_finite(behind(BASE), 3), with_bad(SIGNAL, 4), SIGNAL, 16),
    # The wrapper is inside: the rule sees a zero, and counts it.
    "around guarded": (behind(mo.guarded(BASE)), with_bad(SIGNAL, 4), [*SIGNAL[:4], np.zeros(2), *SIGNAL[4:]], 17),
    "around apply_if_finite": (
        behind(optax.apply_if_finite(BASE, 3)),
        with_bad(SIGNAL, 4),
        [*SIGNAL[:4], np.zeros(2), *SIGNAL[4:]],
        17,
    ),
    "around MultiSteps": (behind(optax.MultiSteps(BASE, 2).gradient_transformation()), SIGNAL, with_zeros(MEANS), 16),
    # There a period of k micro-batches times as many steps is that of the steps.
    "around MultiSteps, in micro-batches": (
        behind(optax.MultiSteps(BASE, 2).gradient_transformation(), TWICE),
        SIGNAL,
        MEANS,
        16,
    ),
    "around accumulated": (
        behind(mo.accumulated(mo.heavy_ball(0.5), 2, BASE)),
        SIGNAL,
        with_zeros(heavy_ball(MEANS)),
        16,
    ),
    "around accumulated, in micro-batches": (
        behind(mo.accumulated(mo.heavy_ball(0.5), 2, BASE), TWICE),
        SIGNAL,
        heavy_ball(MEANS),
        16,
    ),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", CASES)
def test_a_period_counts_the_updates_that_reach_the_rule(name):
    tx, signal, seen, count = CASES[name]
    params, state = run(tx, signal)
    for x in params.values():
        np.testing.assert_allclose(x, periods(seen), rtol=1e-5)
    (step,) = {
        int(x.step) for x in jax.tree.leaves(state, is_leaf=is_momentum) if is_momentum(x) and x.step is not None
    }
    assert step == count


@pytest.mark.slow
@pytest.mark.parametrize("at", [5, 8])
@pytest.mark.parametrize("name", CASES)
def test_a_run_under_a_wrapper_that_is_resumed_within_a_period_is_the_run(name, at):
    tx, signal, seen, _ = CASES[name]
    saved = jax.device_get(run(tx, signal[:at]))
    resumed = run(tx, signal[at:], *saved)
    assert_bit_equal(resumed, run(tx, signal))
    np.testing.assert_allclose(resumed[0]["w"], periods(seen), rtol=1e-5)


def is_momentum(x):
    return isinstance(x, mo.transform.MomentumState)


def test_a_run_that_is_resumed_within_a_period_is_the_run():
    tx = behind(BASE)
    params, state = run(tx, SIGNAL[:10])
    saved = jax.device_get((params, state))
    resumed = run(tx, SIGNAL[10:], *saved)
    assert_bit_equal(resumed, run(tx, SIGNAL))
    # A state without its velocities begins a period; one of chosen parameters goes on in the common one.
    fresh = mo.reset(state, tx.init(LIKE))
    assert int(fresh.momentum.step) == 0
    again, _ = run(tx, SIGNAL[10:], params, fresh)
    begun = run(tx, SIGNAL[10:], params)[0]
    assert_bit_equal(again, begun)
    assert not np.allclose(again["w"], resumed[0]["w"], rtol=1e-2)
    assert int(mo.reset(state, tx.init(LIKE), lambda path: path == "w").momentum.step) == 10


def test_a_leaf_without_a_gradient_when_the_others_meet_waits_for_the_next_meeting():
    tx = mo.guarded(behind(BASE), "leaf")
    # The third step is a meeting, and bad for w; the sixth is the next.
    g = {"w": jnp.asarray(BAD, jnp.float32), "b": jnp.asarray(SIGNAL[2], jnp.float32)}
    params, state = run(tx, [*SIGNAL[:2], g, *SIGNAL[3:6]])
    assert int(state.inner.momentum.step) == 6
    np.testing.assert_allclose(params["b"], periods(SIGNAL[:6]), rtol=1e-5)
    moved = -0.5 * np.sum([*SIGNAL[:2], *SIGNAL[3:6]], axis=0)
    np.testing.assert_allclose(params["w"], 0.5 * 1.4 * moved, rtol=1e-5)


def test_a_periodic_rule_is_no_rule_of_accumulated():
    with pytest.raises(ValueError, match=r"needs the mean gradient itself; use optax\.MultiSteps"):
        mo.accumulated(OUTER, 2)
