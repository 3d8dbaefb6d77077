"""Residues of averages: whole numbers modulo 2^b, in NumPy's integers."""

import jax.numpy as jnp
import numpy as np
import pytest

from momentum_optax.storage.noise import stamp_of
from momentum_optax.wrappers.residues import read, write

SHAPE = (3, 600)
every_code = pytest.mark.parametrize(("dtype", "bits"), [(jnp.int16, 16), (jnp.int8, 8)])


def normal(seed, scale=1.0):
    return np.float32(scale * np.random.default_rng(seed).normal(size=SHAPE))


def written(average, weights, dtype, unit=None, *, moved=None, number=0):
    unit = jnp.zeros((3, 1), jnp.float32) if unit is None else unit
    path = jnp.asarray(weights), jnp.asarray(weights if moved is None else moved)
    return write(jnp.asarray(average), jnp.zeros(SHAPE, dtype), unit, path, (stamp_of(1), jnp.int32(number)))


@every_code
def test_an_average_is_read_beside_any_weights_within_reach(dtype, bits):
    weights, average = normal(0), normal(0) + normal(1, 0.1)
    codes, unit = written(average, weights, dtype)
    # Units are powers of two, as fine as the distance allows.
    np.testing.assert_array_equal(np.log2(unit) % 1, 0)
    reach = np.abs(average - weights).max(1, keepdims=True) / np.asarray(unit)
    assert (reach < 2 ** (bits - 1)).all()
    assert (reach > 2 ** (bits - 1) / 2.6 / (1.26 if bits == 8 else 4.1)).all()
    # The codes are the numbers of units modulo 2^bits, one way or the other rounded.
    whole = np.floor(np.float64(average) / np.asarray(unit)).astype(np.int64)
    up = (np.asarray(codes).astype(np.int64) - whole) % 2**bits
    assert set(np.unique(up)) == {0, 1}
    expected = np.float32((whole + up) * np.float64(unit))
    for other in (weights, average, weights + normal(2, 0.02), 0.5 * (weights + average)):
        np.testing.assert_array_equal(read(codes, unit, jnp.asarray(other)), expected)
    # Beyond it the average is taken along by a multiple of the period.
    far = read(codes, unit, jnp.asarray(weights) + 2.0**bits * unit)
    np.testing.assert_array_equal(far, expected + 2.0**bits * np.asarray(unit))


@every_code
def test_what_was_read_is_written_again_without_change_and_finer_units_round_nothing(dtype, bits):
    weights, average = normal(0), normal(0) + normal(1, 0.1)
    codes, unit = written(average, weights, dtype)
    once = read(codes, unit, jnp.asarray(weights))
    near = np.asarray(once) + normal(3, 0.001)
    for number in range(1, 9):
        codes, unit = written(once, near, dtype, unit, number=number)
        np.testing.assert_array_equal(read(codes, unit, jnp.asarray(near)), once)
    # Once the weights are near it becomes finer by halves.
    assert float(unit.max()) < 0.1 * float(written(average, weights, dtype)[1].max())


@every_code
def test_rounding_has_no_bias_and_is_even_over_many_writes(dtype, bits):
    weights = np.ones(SHAPE, np.float32)
    average = np.full(SHAPE, 1.3, np.float32)
    unit = jnp.full((3, 1), 2.0**-2 if bits == 8 else 2.0**-10)
    # Far enough for these units to be needed.
    moved = weights + float(unit[0, 0]) * (2.0**6 if bits == 8 else 2.0**13)
    values = []
    for number in range(64):
        codes, kept = written(average, weights, dtype, unit, moved=moved, number=number)
        np.testing.assert_array_equal(kept, unit)
        values.append(read(codes, kept, jnp.asarray(weights)))
    # 1800 independent starts; over 64 writes an even sequence is off by about 1/64, independent noise by 1/16.
    assert abs(np.mean(values[0]) - 1.3) < 0.05 * float(unit[0, 0])
    assert np.abs(np.mean(values, 0) - 1.3).max() < 0.05 * float(unit[0, 0])


@every_code
def test_extremes_have_an_outcome(dtype, bits):
    weights = normal(0)
    weights[0, 0], weights[0, 1], weights[1] = np.nan, np.inf, 0
    average = np.array(weights)
    average[1, 0] = 1e-30
    average[2] *= 1e30
    weights[2] *= 1.1e30
    codes, unit = written(average, weights, dtype)
    back = np.asarray(read(codes, unit, jnp.asarray(weights)))
    assert np.isnan(back[0, 0])
    assert np.isinf(back[0, 1])
    # Elements beside them are exact to the finest unit.
    np.testing.assert_allclose(back[0, 2:], average[0, 2:], rtol=0, atol=2.0**-18)
    assert (back[1, 1:] == 0).all()
    assert 0 <= back[1, 0] < 3e-30
    np.testing.assert_allclose(back[2], average[2], rtol=0, atol=float(unit[2, 0]))
