"""The window in which a write looks at what enters: how much of a row it is, and where."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from momentum_optax.storage import guard

# Axes of a row, and the share that whole elements of sixteen pieces, or a vector of eight lanes, must stay below.
SHAPES = [
    ((4096,), (0,), 1 / 32),
    ((300_000,), (0,), 1 / 29),
    ((50_304,), (0,), 1 / 30),
    ((99_991,), (0,), 1 / 31),
    ((2, 512), (1,), 1 / 32),
    ((2, 768), (1,), 1 / 24),
    ((2, 128), (1,), 1 / 8),
    ((2, 3, 16, 64), (2, 3), 1 / 4),
    ((2, 80, 3), (1, 2), 1 / 5),
    ((2, 16, 16), (1, 2), 1),
]


@pytest.mark.parametrize(("shape", "axes", "share"), SHAPES, ids=[str(shape) for shape, *_ in SHAPES])
@pytest.mark.parametrize("most", [1, 16])
def test_a_window_is_a_32nd_of_a_row_to_whole_elements_and_the_same_for_symbolic_sizes(shape, axes, share, most):
    array = jnp.arange(1, math.prod(shape) + 1, dtype=jnp.float32).reshape(shape)
    window = guard._pieces(array, len(shape) - len(axes), most)
    assert 1 / 32 <= window.size / array.size <= share
    is_in = np.broadcast_to(guard._is_in_pieces(shape, axes, most), shape)
    np.testing.assert_array_equal(np.sort(np.ravel(window)), np.asarray(array)[is_in])


def test_a_long_row_is_reduced_in_parts_without_changing_its_scale():
    row = jnp.full((1 << 16,), 2.0**-20).at[1000].set(7.0).at[40_001].set(3.0)
    found = guard.inverse_scales(row, 1.0, True, jnp.zeros(()))
    # The window has the first 128 elements of each sixteenth: neither of the two.
    alone = guard.inverse_scales(row.at[40_961].set(5.0), 1.0, True, jnp.zeros(()))
    assert found.shape == ()
    assert float(found / alone) == pytest.approx(5.0 * 2**20, rel=1e-5)
