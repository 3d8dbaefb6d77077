"""Noise for stochastic rounding: a hash that depends on all of its numbers and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from momentum_optax.storage.noise import random_bits, stamp_of


def test_noise_differs_by_seed_step_leaf_velocity_and_element_and_by_nothing_else():
    base = np.asarray(random_bits((64, 32), stamp_of(0, stamp_of(3, 1), 0)))
    assert np.array_equal(base, jax.jit(lambda s: random_bits((64, 32), stamp_of(0, stamp_of(s, 1), 0)))(3))
    for numbers in ((1, 3, 1, 0), (0, 4, 1, 0), (0, 3, 2, 0), (0, 3, 1, 1), (0, 1, 3, 0)):
        seed, step, leaf, k = numbers
        other = np.asarray(random_bits((64, 32), stamp_of(seed, stamp_of(step, leaf), k)))
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.09  # 4 standard errors
    assert len(np.unique(base)) == base.size
    uniform = base.ravel() / 2.0**32
    assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * base.size)
    for lag in (1, 2, 31, 32, 33):
        assert abs(np.corrcoef(uniform[lag:], uniform[:-lag])[0, 1]) < 4 / np.sqrt(base.size)


def test_a_stamp_takes_whole_numbers_modulo_32_bits():
    for number in (-1, 2**31, 2**32 - 1, 2**32 + 5):
        assert int(stamp_of(number, 3)) == int(stamp_of(jnp.uint32(number % 2**32), 3))
