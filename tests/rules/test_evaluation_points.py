"""The evaluation point of every rule, against the papers' evaluated sequence."""

import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax import rules
from tests.rules.oracles import BY_RULE, START, TABLE, gradient
from tests.rules.oracles.look_ahead import nesterov
from tests.rules.trajectories import CASES, STEPS, closed_loop, hyperparameters


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    ("row", "scheduled"),
    [(row, scheduled) for row, scheduled in CASES if row.evaluates],
    ids=[f"{row}-{'scheduled' if scheduled else 'constant'}" for row, scheduled in CASES if row.evaluates],
)
def test_eval_params_is_the_papers_evaluated_sequence(row, scheduled, x64):
    schedules, h = hyperparameters(row, scheduled)
    stored, expected = row.run(gradient, START, STEPS, h)
    _, got = closed_loop(row.make(**schedules), row.learning_rate, STEPS, evaluate=True)
    assert np.all(abs(got - expected) <= 1e-12 * np.maximum(1, abs(expected)))
    assert abs(stored - expected).max() > 1e-3, "the two sequences do not differ enough to tell"


def test_eval_params_of_torch_nesterov_is_nesterovs_x_at_a_constant_decay(x64):
    row = BY_RULE["torch_nesterov"]
    _, x = zip(*nesterov(gradient, START, STEPS, row.learning_rate, lambda t: row.constants), strict=True)
    _, got = closed_loop(row.make(), row.learning_rate, STEPS, evaluate=True)
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
@pytest.mark.parametrize("rate", [0.25, np.float64(0.25), jnp.float32(0.25)], ids=lambda rate: type(rate).__name__)
def test_eval_params_keeps_the_dtype_of_the_parameters(rate, dtype):
    rule, params = rules.nesterov(0.5), {"x": jnp.ones(3, dtype)}
    tx = mo.scale_by_momentum(rule)
    _, state = tx.update({"x": jnp.full(3, 4.0, dtype)}, tx.init(params))
    point = mo.eval_params(state, params, rate)["x"]
    assert point.dtype == dtype
    np.testing.assert_array_equal(point, jnp.full(3, 1.5, dtype))  # 1 + 0.25 * 0.5 * 4


@pytest.mark.parametrize("row", [row for row in TABLE if not row.evaluates and row.rule != "torch_nesterov"], ids=str)
def test_every_other_rule_has_no_look_ahead(row):
    state = mo.scale_by_momentum(row.make()).init(START)
    assert state.lookahead is None
    with pytest.raises(ValueError, match="the parameters themselves are the point to evaluate"):
        mo.eval_params(state, START, 1.0)
