"""Final losses with weights in bfloat16."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import bfloat16_weights


def trained(weights, steps=300):
    """A thousand weights of 1 after steps of 0.001 downhill, in one program."""
    optimizer = bfloat16_weights.Rounded(weights, 0.0, 1e-3)
    start = jnp.ones(1000)

    def step(carry, _):
        new, state, _ = optimizer.step(*carry, jnp.ones(1000))
        return (new, state), None

    return jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), None, steps)[0][0])()


def test_weights_stall_to_nearest_and_move_as_in_float32_when_rounded_stochastically():
    # 0.001 is below half a unit in the last place of 1 downwards, 2^-9: nothing moves. That the compiler keeps the
    # rounding between two steps of a compiled loop is what this shows.
    assert np.all(np.asarray(trained("nearest")) == 1)
    np.testing.assert_allclose(trained("float32"), 0.7, rtol=1e-4)
    moved = np.asarray(trained("stochastic"))
    # Steps of 2^-8 with a chance of a quarter: a standard deviation of .03 over 300 of them, of .001 for the mean.
    assert abs(moved.mean() - 0.7) < 0.004
    assert np.array_equal(moved, moved.astype(jnp.bfloat16).astype(np.float32))


def test_the_committed_rows_are_complete(committed):
    rows = committed("bfloat16_weights")
    found = [(row["task"], row["decay"], row["weights"]) for row in rows]
    assert found == list(itertools.product(bfloat16_weights.CHOSEN, bfloat16_weights.DECAYS, bfloat16_weights.WEIGHTS))
    for row in rows:
        assert len(row["losses"]) == 5
        mean, error = bfloat16_weights.against_float32(rows, row)
        assert (mean, error) == (0, 0) or row["weights"] != "float32"


@pytest.mark.slow
def test_every_row_trains(run_quick, numbers):
    result, _ = run_quick("bfloat16_weights")
    assert [(row["task"], row["weights"]) for row in result["rows"]] == list(
        itertools.product(bfloat16_weights.CHOSEN, bfloat16_weights.WEIGHTS)
    )
    for row in result["rows"]:
        assert numbers(row["losses"]).shape == (2,)
