"""Every rule against its oracle: whole trajectories, numbers and schedules, float64 and float32."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import rule_functions

import momentum_optax as mo
from tests.rules.oracles import BY_RULE, DIMENSION, START, TABLE, gradient
from tests.rules.trajectories import CASES, STEPS, closed_loop, every_case, every_row, hyperparameters, points

PUBLIC = list(rule_functions())


ROWS = {str(row): row for row in TABLE}


def test_every_public_rule_has_a_row():
    assert set(PUBLIC) == set(BY_RULE)
    assert len(ROWS) == len(TABLE), "two rows have the same name"


def test_the_rows_of_a_rule_give_every_argument_of_it():
    for name in set(PUBLIC) - {"aggregated"}:  # its one argument is a tuple, given entry by entry
        given = set().union(*(row.constants for row in TABLE if row.rule == name))
        assert given == set(inspect.signature(rule_functions()[name]).parameters), name


def test_two_references_of_one_rule_agree_on_numbers():
    pairs = [row for row in TABLE if row.scheduled_reference is not None]
    assert len(pairs) >= 3
    for row in pairs:
        first, _ = row.run(gradient, START, STEPS)
        second, _ = row.run(gradient, START, STEPS, lambda t, row=row: row.constants)
        np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)


@pytest.mark.one_in(8)
@every_case
def test_the_closed_loop_is_the_papers_over_200_steps(row, scheduled, x64):
    # The same gradient function on both sides; ours sees it at the points of its own jitted updates.
    schedules, h = hyperparameters(row, scheduled)
    expected, _ = row.run(gradient, START, STEPS, h)
    got, _ = closed_loop(row.make(**schedules), row.learning_rate, STEPS)
    # An objective that contracts does not amplify rounding; 1e-12 is some thousand roundings.
    assert np.all(abs(got - expected) <= 1e-12 * np.maximum(1, abs(expected)))
    assert abs(expected[-1] - expected[-2]).max() > 1e-5, "converged too early to tell anything"


@pytest.mark.one_in(16)
@every_case
def test_float32_updates_keep_within_the_rounding_of_their_arithmetic(row, scheduled):
    # Open loop: both sides get the gradients of one run, rounded to float32, and the same float32 hyperparameters.
    schedules, h = hyperparameters(row, scheduled, float32=True)
    gradients = []

    def record(x):
        gradients.append(np.float64(np.float32(gradient(x))))
        return gradients[-1]

    row.run(record, START, STEPS, h)
    replayed = iter(gradients)
    # From zero and at rate 1 the differences of the points are the negative updates, to float64's rounding.
    points, _ = row.run(lambda _: next(replayed), np.zeros(DIMENSION), STEPS, h, learning_rate=1.0)
    expected = -np.diff(points, axis=0, prepend=0.0)

    rule = row.make(**schedules)
    tx = mo.scale_by_momentum(rule)
    run = jax.jit(lambda g: jax.lax.scan(lambda state, g: tx.update(g, state)[::-1], tx.init(g[0]), g)[1])
    got = run(np.float32(gradients))
    assert got.dtype == np.float32
    assert np.all(abs(np.float64(got) - expected) <= float32_bound(rule, gradients))


def float32_bound(rule, gradients):
    """The most that float32 can do to the updates: every rounding error followed through the filter.

    A sum of K + 1 products costs K + 2 roundings of 2^-24 times the sum of the absolute values: one of each
    coefficient, one of each product, K of the additions. An error made in a velocity at step s meets the update at
    step t through C A ... A, as a gradient would. A coefficient that the program itself computes from float32 costs
    some roundings more, enlarged where terms cancel: two dozen are granted, and no rule needs more than half of its
    bound. In ulps of the largest update so far the bounds are between 2 and 60 for numbers, the errors up to 5.3.
    """
    computed = 0 if rule.is_constant else 24
    rule = rule.pruned()
    K = rule.order
    unit = (K + 2 + computed) * 2.0**-24
    v = np.zeros((K, DIMENSION))
    paths, made = np.zeros((0, K, K)), np.zeros((0, K, DIMENSION))
    bounds = []
    for t, g in enumerate(gradients):
        A, B, C, D = rule.at(t).matrices()
        here = unit * (abs(C) @ abs(v) + abs(D * g))
        bounds.append(np.einsum("si,sin->n", abs(C @ paths), made) + here)
        made = np.concatenate([made, [unit * (abs(A) @ abs(v) + np.multiply.outer(abs(B), abs(g)))]])
        paths = np.concatenate([A @ paths, [np.eye(K)]])
        v = A @ v + np.multiply.outer(B, g)
    return np.array(bounds)


# These are defined by the global step, whatever a leaf has received.
BY_STEP = {
    "chebyshev",
    "schedule_free",
    "optimized_gradient",
    "optimized_gradient_norm",
    "implicit_transport",
    "outer_nesterov",
    "lookahead",
}
LATE = [(row, scheduled) for row, scheduled in CASES if row.rule not in BY_STEP]


@pytest.mark.one_in(24)
@pytest.mark.parametrize(
    ("row", "scheduled"), LATE, ids=[f"{row}-{'scheduled' if scheduled else 'constant'}" for row, scheduled in LATE]
)
def test_a_leaf_without_gradients_for_three_steps_begins_at_the_fourth(row, scheduled, x64):
    # Its own first step is then the special one; schedules go on by the global step.
    late, steps = 3, 12
    schedules, h = hyperparameters(row, scheduled)
    hyper = h or (lambda t: row.constants)
    tx = mo.scale_by_momentum(row.make(**schedules))

    @jax.jit
    def step(x, state, g):
        u, state = tx.update(g, state)
        return mo.apply_updates(x, jax.tree.map(lambda u: -row.learning_rate * u, u)), state

    x = {"early": jnp.asarray(START), "late": jnp.asarray(START)}
    state = tx.init(x)
    got = []
    for t in range(steps):
        g = {name: gradient(np.asarray(leaf)) for name, leaf in x.items()}
        x, state = step(x, state, g | ({"late": None} if t < late else {}))
        got.append({name: np.asarray(leaf) for name, leaf in x.items()})

    early, _ = row.run(gradient, START, steps, h)
    shifted, _ = row.run(gradient, START, steps - late, (lambda t: hyper(t + late)) if scheduled else None)
    np.testing.assert_allclose([points["early"] for points in got], early, rtol=0, atol=1e-12)
    np.testing.assert_array_equal([points["late"] for points in got[:late]], [START] * late)
    np.testing.assert_allclose([points["late"] for points in got[late:]], shifted, rtol=0, atol=1e-12)


@pytest.mark.one_in(2)
@every_row
def test_every_hyperparameter_changes_the_trajectory(row):
    before = points(row.make(), row.learning_rate, STEPS, gradient, START)
    for name, value in row.constants.items():
        after = points(row.make(**{name: _perturbed(value)}), row.learning_rate, STEPS, gradient, START)
        assert abs(after - before).max() > 1e-6, name


def _perturbed(value):
    if value is None:
        return 0.9
    if isinstance(value, str):
        return {"zero": "gradient", "gradient": "zero"}[value]
    if isinstance(value, int):
        return value + 1
    return 1.01 * value if value else 0.01
