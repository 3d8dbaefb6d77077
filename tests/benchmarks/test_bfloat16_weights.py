"""Final losses with weights in bfloat16."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks import bfloat16_weights

# The quantile of Student's t with 4 degrees of freedom: five pairs, two sides, 5 %.
SIGNIFICANT = 2.776
ROOT = pathlib.Path(__file__).parents[2]


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


def test_the_table_of_the_documentation_is_that_of_the_committed_results(committed):
    text = (ROOT / "docs" / "storage.md").read_text()
    lines = bfloat16_weights.markdown(committed("bfloat16_weights"))
    assert len(lines) == 4
    assert [line for line in lines if f"{line}\n" not in text] == []


def test_stochastic_rounding_wins_back_most_of_what_rounding_to_nearest_costs(committed):
    rows = committed("bfloat16_weights")
    added = {(row["task"], row["decay"], row["weights"]): bfloat16_weights.against_float32(rows, row) for row in rows}
    for case in itertools.product(bfloat16_weights.CHOSEN, bfloat16_weights.DECAYS):
        (nearest, error), (stochastic, _) = (added[*case, weights] for weights in ("nearest", "stochastic"))
        assert (nearest > SIGNIFICANT * error) == (case != ("cnn", 0.99))
        assert stochastic < nearest / 2
    assert all(len(row["losses"]) == 5 for row in rows)


def test_what_bfloat16_adds_is_a_mean_of_pairs_with_its_standard_error():
    losses = {"float32": [1.0, 2.0, 3.0, 4.0], "nearest": [1.5, 2.5, 4.0, 5.0], "stochastic": [1.0, 2.0, 3.0, 4.0]}
    rows = [{"task": "gru", "decay": 0.9, "weights": name, "losses": x} for name, x in losses.items()]
    # Differences .5, .5, 1, 1: mean .75, variance 1/12, of the mean 1/48.
    assert bfloat16_weights.against_float32(rows, rows[1]) == pytest.approx((0.75, 48**-0.5))
    assert bfloat16_weights.markdown(rows) == ["| character GRU | 0.9 | 2.5000 | +0.7500 ± 0.1443 | +0.0000 ± 0.0000 |"]


@pytest.mark.slow
def test_every_row_trains(run_quick, numbers):
    result, _ = run_quick("bfloat16_weights")
    assert [(row["task"], row["weights"]) for row in result["rows"]] == list(
        itertools.product(bfloat16_weights.CHOSEN, bfloat16_weights.WEIGHTS)
    )
    for row in result["rows"]:
        assert numbers(row["losses"]).shape == (2,)
