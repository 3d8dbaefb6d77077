"""Noise of rows: it has no period, and differs between rows, velocities and writes."""

import jax.numpy as jnp
import numpy as np

from momentum_optax.storage.rows import GROWTH, RowNumbers, element_noise, element_phase, seeds


def noise_of(rows, like, k, power=0):
    return element_noise(RowNumbers.of(rows, like, 2), like, k, power)


def test_the_noise_that_a_state_carries_has_no_period_and_differs_from_write_to_write():
    like = jnp.zeros((64, 512))
    rows = seeds(like, jnp.zeros((64, 1)), 3, 5)
    writes = [np.asarray(noise_of(rows, like, k, power)) / 2.0**32 for k, power in ((0, 0), (0, 1), (1, 0))]
    for noise in writes:
        power = abs(np.fft.fft(np.exp(2j * np.pi * noise))) ** 2 / 512
        assert power.max() < np.log(64 * 512) + 12
        assert abs(np.corrcoef(noise) - np.eye(64)).max() < 6 / np.sqrt(512), "rows have their own noise"
    related = np.corrcoef([noise.ravel() for noise in writes]) - np.eye(3)
    assert abs(related).max() < 5 / np.sqrt(64 * 512)
    # What is read after a write is what was written with.
    np.testing.assert_array_equal(noise_of(rows * np.uint32(GROWTH), like, 1), noise_of(rows, like, 1, 1))
    for other in ((4, 5), (3, 6)):
        noise = np.asarray(noise_of(seeds(like, jnp.zeros((64, 1)), *other), like, 0)) / 2.0**32
        assert abs(np.corrcoef(noise.ravel(), writes[0].ravel())[0, 1]) < 5 / np.sqrt(64 * 512)


def test_phases_take_all_their_values_in_turn_and_differ_between_elements():
    like = jnp.zeros((64, 512))
    rows = seeds(like, jnp.zeros((64, 1)), 3, 5)
    writes = np.stack(
        [element_phase(RowNumbers.of(rows * np.uint32(GROWTH**t % 2**32), like, 1), like, 0) for t in range(20)]
    )
    for t in range(12):
        for length in (2, 4, 8):
            # Each half once in two writes, each quarter once in four, each eighth once in eight.
            parts = np.sort(writes[t : t + length] * length // 8, 0)
            np.testing.assert_array_equal(parts, np.broadcast_to(np.arange(length)[:, None, None], parts.shape))
    counts = np.apply_along_axis(np.bincount, 1, writes[0], minlength=8)
    assert abs(counts / 64 - 1).max() < 5 / np.sqrt(64), "in each row"
    noise = np.asarray(noise_of(rows, like, 0, 1)) / 2.0**31
    for x in (noise, abs(noise)):
        assert abs(np.corrcoef(writes[0].ravel(), x.ravel())[0, 1]) < 5 / np.sqrt(64 * 512)
