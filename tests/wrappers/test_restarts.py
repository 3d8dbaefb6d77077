"""Restarts against the published two-sequence methods in NumPy float64, and against fresh runs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals, every_storage
from stepping import LIKE, SIGNAL, TURNING, steps, velocity

import momentum_optax as mo

KAPPA, SIZE = 1e4, 200
BEST = (np.sqrt(KAPPA) - 1) / (np.sqrt(KAPPA) + 1)


def iterations(tx, rule, with_value=False):
    """Steps at rate 1/L until f(x) <= 1e-10 f(x_0), x the evaluation point, on a quadratic; and the last state."""
    curvature = jnp.geomspace(1 / KAPPA, 1.0, SIZE)
    start = jnp.asarray(np.random.default_rng(0).normal(size=SIZE))

    def f(x):
        return 0.5 * jnp.sum(curvature * x * x)

    def step(carry, _):
        y, state = carry
        value = f(mo.eval_params(state, y, 1.0))
        u, state = tx.update(curvature * y, state, value=value) if with_value else tx.update(curvature * y, state)
        return (y - u, state), f(mo.eval_params(state, y - u, 1.0))

    (_, state), losses = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=7000))()
    return int(np.argmax(np.asarray(losses) <= 1e-10 * f(start))) + 1, state


def test_restarts_take_the_iterations_of_the_two_sequence_method(x64):
    # The counts of O'Donoghue and Candes' algorithm 1 as two sequences x, y in a NumPy loop, on the same instance.
    fista, constant = mo.nesterov(mo.schedules.fista()), mo.nesterov(BEST)
    assert iterations(mo.scale_by_momentum(constant), constant)[0] == 799
    assert iterations(mo.scale_by_momentum(fista), fista)[0] == 6414
    count, state = iterations(mo.adaptive_restart(fista), fista)
    assert count == 1347
    assert state.restarts >= 2
    # The paper's loop, which restarts from x before it takes the next gradient, needs 1351.
    count, state = iterations(mo.adaptive_restart(fista, "function"), fista, with_value=True)
    assert count == function_restart()
    assert abs(count - 1351) < 0.05 * 1351
    assert state.restarts >= 2


def function_restart():
    """The iterations of FISTA that begins anew from y where the last step of x went uphill, in two sequences."""
    curvature = np.geomspace(1 / KAPPA, 1.0, SIZE)
    x = y = np.random.default_rng(0).normal(size=SIZE)
    t, last, first = 1.0, np.inf, 0.5 * np.sum(curvature * x * x)
    for count in range(7000):
        loss = 0.5 * np.sum(curvature * x * x)
        if loss <= 1e-10 * first:
            return count
        if loss > last:
            x, t = y, 1.0
        new, t_new = y - curvature * y, (1 + np.sqrt(1 + 4 * t * t)) / 2
        x, y, t, last = new, new + (t - 1) / t_new * (new - x), t_new, loss
    return None


def two_sequences(mu, signal):
    """Gradient restart of x' = y - g, y' = x' + mu (x' - x) for given gradients: the moves of y, and the restarts."""
    y = x = np.zeros_like(signal[0])
    moves, restarts = [], 0
    for g in signal:
        ahead = y - g
        uphill = np.sum(g * (ahead - x)) > 0
        new = ahead if uphill else ahead + mu * (ahead - x)
        moves.append(y - new)
        y, x, restarts = new, ahead, restarts + uphill
    return moves, restarts


def heavy_ball_restart(mu, signal):
    """Gradient restart of the heavy ball: x' = x - v', and v' = 0 where g points along the move."""
    v, moves, restarts = 0.0, [], 0
    for g in signal:
        v = mu * v + g
        moves.append(v)
        uphill = np.sum(g * -v) > 0
        v, restarts = v * (not uphill), restarts + uphill
    return moves, restarts


@pytest.mark.one_in(3)
@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize(
    ("rule", "loop"),
    [
        (mo.nesterov(0.9), two_sequences),
        (mo.torch_nesterov(0.9), two_sequences),
        (mo.heavy_ball(0.9), heavy_ball_restart),
    ],
    ids=["nesterov", "torch", "heavy ball"],
)
def test_gradient_restart_follows_the_published_form(rule, loop, scope):
    out, state = steps(mo.adaptive_restart(rule, scope=scope), TURNING)
    flat = [np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(g)]) for g in TURNING]
    parts = [slice(0, 10)] if scope == "tree" else [slice(0, 6), slice(6, 10)]
    for part, restarts in zip(parts, jax.tree.leaves(state.restarts), strict=True):
        moves, expected = loop(0.9, [g[part] for g in flat])
        got = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(u)])[part] for u in out]
        np.testing.assert_allclose(got, moves, rtol=1e-5, atol=1e-5)
        assert restarts.item() == expected
        assert 1 <= expected <= 4


@pytest.mark.one_in(2)
@every_storage
def test_every_storage_restarts_to_its_state_at_init(storage):
    plain = mo.scale_by_momentum(mo.nesterov(0.9), storage=STORAGES[storage]())
    tx = mo.adaptive_restart(mo.nesterov(0.9), storage=STORAGES[storage]())

    @jax.jit
    def both(g, state):
        return mo.velocity(state)[0], plain.update(g, state.inner), tx.update(g, state)

    state = begin = tx.init(LIKE)
    restarts = 0
    for g in TURNING[:6]:
        v, (u, ordinary), (got, state) = both(g, state)
        (ahead,) = velocity(ordinary)
        slope = sum(np.sum(np.float64(g[k]) * (np.float64(g[k]) + v[k])) for k in LIKE)
        restarts += slope < 0
        assert state.restarts == restarts
        if slope < 0:
            assert_bit_equal(state.inner, begin.inner)
            u = jax.tree.map(jnp.subtract, u, ahead)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), got, u)
    assert restarts >= 1
    assert avals(state) == avals(begin)


def test_a_scheduled_restart_goes_on_as_a_fresh_run():
    # Everything that counts: a schedule of the momentum, ages, the learning rate's schedule.
    inner = optax.chain(
        mo.scale_by_momentum(mo.nesterov(mo.schedules.fista()), debias=True),
        mo.scale_by_momentum(mo.nadam_mix(0.9)),
        optax.scale_by_learning_rate(optax.linear_schedule(1.0, 0.1, 5)),
    )
    for at, begins in ((3, [0, 3, 6]), ([2, 7], [0, 2, 7])):
        out, state = steps(mo.scheduled_restart(inner, at), SIGNAL)
        parts = [SIGNAL[i:j] for i, j in zip(begins, [*begins[1:], None], strict=True)]
        fresh = [steps(inner, part) for part in parts]
        expected = [u for updates, _ in fresh for u in updates]
        for u, e in zip(out, expected, strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), u, e)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7), state.inner, fresh[-1][1])
        assert (state.restarts, state.last) == (2, 8)


def test_a_leaf_without_a_gradient_keeps_its_velocity_through_a_restart():
    tests = [
        (mo.adaptive_restart(mo.heavy_ball(0.9)), {}),
        (mo.adaptive_restart(mo.heavy_ball(0.9), "function"), {"value": jnp.float32(2.0)}),
        (mo.scheduled_restart(mo.scale_by_momentum(mo.heavy_ball(0.9)), 1), {}),
    ]
    for tx, extra in tests:
        _, state = tx.update(SIGNAL[0], tx.init(LIKE), **jax.tree.map(lambda x: x / 2, extra))
        u, after = tx.update({"a": -0.1 * SIGNAL[0]["a"], "b": None}, state, **extra)
        assert u["b"] is None
        assert after.restarts == 1
        assert_bit_equal(velocity(after)[0]["b"], SIGNAL[0]["b"])
        assert not np.allclose(velocity(after)[0]["a"], 0.8 * SIGNAL[0]["a"], rtol=0.2)


@pytest.mark.parametrize("test", ["gradient", "function"])
def test_a_leaf_without_a_gradient_keeps_its_storage_through_a_restart(test):
    # Of the only matrix no shape is seen in that step.
    tx = mo.adaptive_restart(mo.heavy_ball(0.9), test, storage=lambda _, x: "bfloat16" if x.ndim == 2 else "float32")
    like = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    _, state = tx.update(like, tx.init(like), value=jnp.float32(1.0))
    u, after = tx.update({"a": None, "b": -0.1 * like["b"]}, state, value=jnp.float32(2.0))
    assert (u["a"], after.restarts) == (None, 1)
    assert_bit_equal(velocity(after)[0]["a"], np.ones((2, 3), np.float32))
    assert avals(after) == avals(state)


def test_the_point_before_a_step_has_the_look_ahead_of_the_step_before():
    # x_{t+1} - x_t = -(g + mu_{t-1} v) for PyTorch's form: uphill for 0.9, the decay of step 0, not for 0.1.
    rule = mo.torch_nesterov(lambda step: jnp.where(step < 1, 0.9, 0.1))
    (_, u), state = steps(mo.adaptive_restart(rule), [jnp.ones(2), jnp.full(2, -0.5)], jnp.zeros(2))
    assert state.restarts == 1
    np.testing.assert_allclose(u, [-0.5, -0.5], rtol=1e-6)


def test_complex_leaves_restart_by_the_real_inner_product_and_restarts_vmap():
    tx = mo.adaptive_restart(mo.heavy_ball(0.5))
    g = jnp.array([[1 + 1j, 2.0], [1j, 2j]], jnp.complex64)
    state = jax.vmap(tx.init)(g)
    _, state = jax.vmap(tx.update)(g, state)
    # Against the first row's velocity, along the second's: without the conjugate it would be the other way.
    second = jnp.stack([-0.25 * g[0], 0.25 * g[1]])
    _, state = jax.vmap(tx.update)(second, state)
    np.testing.assert_array_equal(state.restarts, [1, 0])
    np.testing.assert_allclose(velocity(state)[0], [[0, 0], 0.75 * g[1]], rtol=1e-6)


def test_a_loss_that_stays_where_it_is_restarts_nothing():
    tx = mo.adaptive_restart(mo.heavy_ball(0.9), "function")
    state, step = tx.init(jnp.zeros(3)), jax.jit(tx.update)
    for value, restarts in ((2.0, 0), (2.0, 0), (1.0, 0), (1.0, 0), (1.5, 1), (1.5, 1)):
        _, state = step(jnp.ones(3), state, value=jnp.float32(value))
        assert state.restarts == restarts


def test_a_gradient_of_zero_restarts_nothing():
    tx = mo.adaptive_restart(mo.heavy_ball(0.5))
    state, step = tx.init(jnp.zeros(3)), jax.jit(tx.update)
    for size in (0.0, 1.0, 0.0):
        _, state = step(jnp.full(3, size), state)
    assert state.restarts == 0
    np.testing.assert_array_equal(velocity(state)[0], 0.5)


def test_of_one_leaf_everything_restarts_in_either_scope():
    # The schedule's step too: it is shared with no other leaf.
    txs = [mo.adaptive_restart(mo.nesterov(mo.schedules.fista()), scope=scope) for scope in ("tree", "leaf")]
    states, compiled = [tx.init({"a": jnp.zeros(3)}) for tx in txs], [jax.jit(tx.update) for tx in txs]
    for size in (1.0, 1.0, -3.0, 1.0, 1.0, 1.0):
        out, states = zip(
            *[step({"a": jnp.full(3, size)}, state) for step, state in zip(compiled, states, strict=True)], strict=True
        )
        assert_bit_equal(*out)
        assert_bit_equal(*(state.inner for state in states))
    assert states[0].restarts == 1


def test_what_cannot_restart_is_refused():
    with pytest.raises(ValueError, match="test must be one of 'gradient', 'function', got 'speed'"):
        mo.adaptive_restart(mo.heavy_ball(0.9), "speed")
    with pytest.raises(ValueError, match="scope must be one of 'tree', got 'leaf'"):
        mo.adaptive_restart(mo.heavy_ball(0.9), "function", "leaf")
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got None"):
        mo.adaptive_restart(mo.heavy_ball(0.9), scope=None)
    with pytest.raises(TypeError, match="rule must be a Filter"):
        mo.adaptive_restart(mo.scale_by_momentum(mo.heavy_ball(0.9)))
    with pytest.raises(ValueError, match="at must be at least 1, got 0"):
        mo.scheduled_restart(optax.identity(), 0)
    with pytest.raises(TypeError, match="tx must be a transformation"):
        mo.scheduled_restart(mo.heavy_ball(0.9), 3)
    tx = mo.adaptive_restart(mo.heavy_ball(0.9), "function")
    with pytest.raises(TypeError, match=r"value must be the loss, .* got None"):
        tx.update(LIKE, tx.init(LIKE))
    with pytest.raises(ValueError, match=r"value must be a scalar, got shape \(2,\)"):
        tx.update(LIKE, tx.init(LIKE), value=jnp.ones(2))
