"""LAWA, the mean of the weights at the last k checkpoints, from one copy of the weights instead of k."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from conformance import own_jit

import momentum_optax as mo

# A checkpoint every EVERY steps, averages over the last COPIES of them, END steps in all.
EVERY, COPIES, END = 3, 4, 60
WINDOW, TAIL = EVERY * COPIES, END - EVERY * COPIES
RECIPES = {
    "every fourth checkpoint": (mo.schedules.restarted(mo.schedules.power_average(), WINDOW), 0),
    "the last ones": (mo.schedules.power_average(start=TAIL), TAIL),
    "all so far": (mo.schedules.power_average(), 0),
}


def queued(weights, copies):
    """The mean of the last `copies` checkpoints by step, as its authors have it; from the weights after each step."""
    queue, found = collections.deque(maxlen=copies), {}
    for step, theta in enumerate(np.float64(weights), 1):
        if step % EVERY == 0:
            queue.append(theta)
            found[step] = np.mean(queue, axis=0)
    return found


def followed(start, storage="float32", shape=(3,)):
    """The weights after each step, and the averages of each recipe."""
    txs = [mo.average_params(decay, every=EVERY, start=s, storage=storage) for decay, s in RECIPES.values()]

    @own_jit
    def step(p, states, u):
        states = [tx.update(u, state, p)[1] for tx, state in zip(txs, states, strict=True)]
        return p + u, states, [mo.averaged_params(state, p + u) for state in states]

    p, states, path, averages = start, [tx.init(start) for tx in txs], [], []
    for u in np.random.default_rng(0).normal(size=(END, *shape)):
        p, states, now = step(p, states, jnp.asarray(0.1 * u, start.dtype))
        path.append(p)
        averages.append(now)
    return np.array(path), dict(zip(RECIPES, np.swapaxes(averages, 0, 1), strict=True))


def window(later, earlier, t, s):
    """The recipe of the guide: the mean of the checkpoints after step s up to step t, from the means of all so far."""
    return (t * later - s * earlier) / (t - s)


def test_one_copy_gives_the_mean_of_the_last_checkpoints_at_every_kth_and_at_the_end(x64):
    path, averages = followed(jnp.zeros(3))
    latest = queued(path, COPIES)
    for step in range(WINDOW, END + 1, WINDOW):
        np.testing.assert_allclose(averages["every fourth checkpoint"][step - 1], latest[step], rtol=0, atol=1e-14)
    np.testing.assert_allclose(averages["the last ones"][-1], latest[END], rtol=0, atol=1e-14)
    # Not because the weights stand still, or their mean says nothing of the window.
    assert abs(latest[END] - path[-1]).max() > 0.01
    assert abs(latest[END] - averages["all so far"][-1]).max() > 0.01


def test_saved_means_of_all_checkpoints_give_every_window_after_the_run(x64):
    path, averages = followed(jnp.zeros(3))
    mean = averages["all so far"]
    for copies in (1, 3, 7):
        for step, latest in queued(path, copies).items():
            before = step - copies * EVERY
            if before > 0:
                found = window(mean[step - 1], mean[before - 1], step, before)
                np.testing.assert_allclose(found, latest, rtol=0, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(("storage", "bound"), [("float32", 1e-6), ("bfloat16", 0.01), ("int8", 0.2)])
def test_windows_in_few_bits_are_off_by_a_share_of_what_they_remove(storage, bound):
    start = jnp.asarray(np.random.default_rng(1).normal(size=(8, 256)), jnp.float32)
    path, averages = followed(start, storage, (8, 256))
    latest = queued(path, COPIES)[END]
    removed = np.linalg.norm(latest - path[-1])
    for name in ("every fourth checkpoint", "the last ones"):
        assert np.linalg.norm(averages[name][-1] - latest) < bound * removed, name


@pytest.mark.slow
def test_a_window_in_float32_is_off_by_the_rounding_of_the_means_times_the_ratio_of_the_lengths():
    start = jnp.asarray(1 + np.random.default_rng(1).normal(size=(8, 256)), jnp.float32)
    path, averages = followed(start, "float32", (8, 256))
    mean, size = averages["all so far"], np.abs(path).max()
    for copies in (1, 4, 10):
        before = END - copies * EVERY
        found = window(mean[-1].astype(np.float64), mean[before - 1].astype(np.float64), END, before)
        error = np.abs(found - queued(path, copies)[END]).max()
        # Each write rounds the mean once, by half a unit in the last place.
        assert 0 < error < 2.0**-24 * size * 2 * END / (END - before) * np.sqrt(END / EVERY)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_a_window_that_slides_needs_a_copy_for_each_checkpoint(k):
    # As a filter of the checkpoints, with the newest one as its input.
    shift = tuple(tuple(float(j == i - 1) for j in range(k - 1)) for i in range(k - 1))
    sliding = mo.Filter(shift, (1.0, *(0.0,) * (k - 2)), (1 / k,) * (k - 1), 1 / k)
    np.testing.assert_array_equal(sliding.impulse_response(2 * k), [1 / k] * k + [0] * k)
    assert sliding.is_minimal()
