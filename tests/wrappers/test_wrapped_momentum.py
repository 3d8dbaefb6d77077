"""Guards, restarts, cautious masks and directions, each against the published form in NumPy float64, or a fresh run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals, every_storage, gradients, runner, slot

import momentum_optax as mo

LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
SIGNAL = [gradients(LIKE, seed) for seed in range(8)]


def steps(tx, signal, params=None, **extra):
    """The updates of a step compiled once, and the last state."""
    params = LIKE if params is None else params
    state, step, out = tx.init(params), jax.jit(tx.update), []
    begin = avals(state)
    for g in signal:
        u, state = step(g, state, params, **extra)
        assert avals(state) == begin
        out.append(u)
    return out, state


def spoiled(gradient, name, value=jnp.nan):
    """`gradient` with one bad element in one leaf."""
    return {**gradient, name: gradient[name].at[(0,) * gradient[name].ndim].set(value)}


# Read in one compiled piece: operation by operation, compressed velocities take seconds.
velocity = jax.jit(mo.velocity)


# Guarded steps.


# Schedules of the step and of ages, several velocities, a window; then the other storages.
ROWS = [(rule, "float32") for rule in ("adan_mix", "chebyshev")] + [
    ("aggregated", "bfloat16"),
    ("nesterov", "int8"),
]


@pytest.mark.rare_storages
@pytest.mark.parametrize(("rule", "storage"), ROWS)
def test_a_guarded_run_is_the_run_without_the_bad_steps(rule, storage):
    tx = mo.guarded(runner(rule, storage))
    step = jax.jit(tx.update)
    bad = {1: spoiled(SIGNAL[1], "b"), 4: spoiled(SIGNAL[4], "a", -jnp.inf)}
    state = clean = tx.init(LIKE)
    for i in range(6):
        u, state = step(bad.get(i, SIGNAL[i]), state)
        if i in bad:
            assert_bit_equal(u, LIKE)
            assert not state.finite
        else:
            expected, clean = step(SIGNAL[i], clean)
            assert_bit_equal(u, expected)
        assert_bit_equal(state.inner, clean.inner)
    assert (state.skipped, clean.skipped) == (2, 0)
    assert avals(state) == avals(tx.init(LIKE))


def test_guarded_by_leaf_is_a_gradient_of_none_for_the_bad_leaves():
    tx = runner("ema", debias=True)
    bad = {1: jnp.inf, 3: jnp.nan}
    signal = [spoiled(SIGNAL[i], "b", bad[i]) if i in bad else SIGNAL[i] for i in range(4)]
    out, state = steps(mo.guarded(tx, "leaf"), signal)
    step, plain = jax.jit(tx.update), tx.init(LIKE)
    for i, u in enumerate(out):
        expected, plain = step({**SIGNAL[i], "b": None} if i in bad else SIGNAL[i], plain)
        expected["b"] = np.zeros(4) if i in bad else expected["b"]
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), u, expected)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7), state.inner, plain)
    assert_bit_equal(state.skipped, {"a": jnp.array([[0]]), "b": jnp.array([2])})
    assert_bit_equal(state.finite, {"a": jnp.array([[True]]), "b": jnp.array([False])})


def test_guarded_by_leaf_holds_every_part_of_a_compressed_leaf_and_of_that_leaf_only():
    tx = mo.guarded(runner("nadam_mix", "int8"), "leaf")
    step = jax.jit(tx.update)
    _, state = step(SIGNAL[0], tx.init(LIKE))
    _, after = step(spoiled(SIGNAL[1], "b"), state)
    assert_bit_equal(slot(after.inner, "b"), slot(state.inner, "b"))
    assert len(slot(state.inner, "b")) > 5
    _, clean = step(SIGNAL[1], state)
    assert_bit_equal(slot(after.inner, "a"), slot(clean.inner, "a"))
    assert after.inner.step == 2


@pytest.mark.parametrize("lone", [lambda g: g, lambda g: {"a": g}], ids=["array", "tree"])
def test_where_there_is_one_leaf_its_bad_gradient_holds_the_counters_too(lone):
    tx = optax.chain(
        mo.scale_by_momentum(mo.nesterov(mo.schedules.fista())), optax.scale_by_schedule(lambda t: 1.0 + t)
    )
    signal = [lone(jnp.full(3, x)) for x in (1.0, jnp.nan, 2.0, -1.0)]
    (first, _, *others), state = steps(mo.guarded(tx, "leaf"), signal, lone(jnp.zeros(3)))
    expected, clean = steps(tx, [g for i, g in enumerate(signal) if i != 1], lone(jnp.zeros(3)))
    assert_bit_equal([first, *others], expected)
    assert_bit_equal(state.inner, clean)


def test_a_guarded_optimizer_leaves_parameters_and_schedules_alone():
    params = jax.tree.map(lambda x: x + 1.0, LIKE)
    rate = optax.linear_schedule(1.0, 0.0, 4)
    tx = mo.guarded(mo.sgd(rate, 0.9, weight_decay=0.1))
    out, state = steps(tx, [SIGNAL[0], spoiled(SIGNAL[1], "a"), SIGNAL[2]], params)
    assert_bit_equal(out[1], LIKE)
    v = np.float64(SIGNAL[0]["b"]) + 0.1
    np.testing.assert_allclose(out[0]["b"], -1.0 * v, rtol=1e-6)
    np.testing.assert_allclose(out[2]["b"], -0.75 * (0.9 * v + np.float64(SIGNAL[2]["b"]) + 0.1), rtol=1e-5)
    assert state.skipped == 1


def test_float16_gradients_that_overflowed_are_skipped_and_reported():
    tx = mo.guarded(mo.scale_by_momentum(mo.heavy_ball(0.5)))
    state = tx.init(jnp.ones(3, jnp.float16))
    scale, scales = 2.0**15, []
    for _ in range(4):
        scaled = jnp.full(3, 8, jnp.float16) * jnp.float16(scale)
        u, state = tx.update(scaled.astype(jnp.float32) / scale, state)
        scale = scale if state.finite else scale / 2
        scales.append(scale)
    # 8 * 2^15, 2^14 and 2^13 overflow float16, whose largest is 65504; 8 * 2^12 does not.
    assert scales == [2.0**14, 2.0**13, 2.0**12, 2.0**12]
    np.testing.assert_array_equal(u, [8, 8, 8])
    np.testing.assert_array_equal(velocity(state)[0], [8, 8, 8])
    assert state.skipped == 3


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_guards_see_through_masks_partitions_and_missing_gradients(scope):
    inner = optax.chain(
        optax.masked(mo.scale_by_momentum(mo.heavy_ball(0.5)), {"a": True, "b": False}),
        optax.partition(
            {"x": mo.scale_by_momentum(mo.ema(0.5), storage="bfloat16"), "y": optax.identity()},
            {"a": "y", "b": "x"},
        ),
    )
    tx = mo.guarded(inner, scope)
    out, state = steps(tx, [SIGNAL[0], spoiled(SIGNAL[1], "b"), SIGNAL[2]])
    assert np.all(np.isfinite(out[2]["b"]))
    good = [0, 2] if scope == "tree" else [0, 1, 2]
    expected, _ = steps(mo.scale_by_momentum(mo.heavy_ball(0.5)), [SIGNAL[i] for i in good])
    np.testing.assert_array_equal(out[2]["a"], expected[-1]["a"])
    before = velocity(state)
    none, after = jax.jit(tx.update)({"a": None, "b": SIGNAL[3]["b"] * jnp.nan}, state)
    assert none["a"] is None
    assert_bit_equal(velocity(after), before)
    masked, _ = steps(optax.masked(tx, {"a": True, "b": True}), SIGNAL[:1])
    assert_bit_equal(masked[0], out[0])


@pytest.mark.parametrize("wrap", [mo.guarded, lambda tx, scope: mo.adaptive_restart(mo.nesterov(0.9), scope=scope)])
@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_leaves_that_are_none_or_masked_from_the_start_stay_so(wrap, scope):
    tx = wrap(mo.scale_by_momentum(mo.nesterov(0.9)), scope)
    params = {"a": jnp.ones(2), "b": None, "c": jnp.ones(3)}
    gradient = {"a": jnp.full(2, 2.0), "b": None, "c": jnp.full(3, 2.0)}
    (u, *_), state = steps(optax.masked(tx, {"a": True, "b": True, "c": False}), [gradient] * 2, params)
    np.testing.assert_allclose(u["a"], [3.8, 3.8], rtol=1e-6)
    assert u["b"] is None
    np.testing.assert_array_equal(u["c"], gradient["c"])
    assert len(jax.tree.leaves(velocity(state))) == 1


@pytest.mark.parametrize("scope", ["tree", "leaf"])
def test_guards_vmap_and_scan(scope):
    tx = mo.guarded(mo.scale_by_momentum(mo.nesterov(0.9)), scope)
    batch = jnp.stack([SIGNAL[0]["b"], SIGNAL[1]["b"].at[2].set(jnp.nan)])
    state = jax.vmap(tx.init)(batch)

    def step(state, g):
        u, state = jax.vmap(tx.update)(g, state)
        return state, u

    state, out = jax.lax.scan(step, state, jnp.stack([batch, batch]))
    np.testing.assert_array_equal(jnp.ravel(state.skipped), [0, 2])
    np.testing.assert_array_equal(out[:, 1], np.zeros((2, 4)))
    np.testing.assert_allclose(out[0, 0], 1.9 * batch[0], rtol=1e-6)


def test_what_cannot_be_guarded_is_refused():
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got 'row'"):
        mo.guarded(optax.identity(), "row")
    with pytest.raises(TypeError, match=r"tx must be a transformation with init and update, got 0\.9"):
        mo.guarded(0.9)
    flat = mo.guarded(optax.flatten(mo.scale_by_momentum(mo.ema(0.9))), "leaf")
    with pytest.raises(ValueError, match=r"scope must be 'tree' .* got 'leaf' and state.* of shape \(10,\)"):
        flat.update(SIGNAL[0], flat.init(LIKE))


# Restarts.

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
        value = f(mo.eval_params(rule, state, y, 1.0))
        u, state = tx.update(curvature * y, state, value=value) if with_value else tx.update(curvature * y, state)
        return (y - u, state), f(mo.eval_params(rule, state, y - u, 1.0))

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


# Gradients that turn round, in the two leaves at different steps.
TURNING = [
    {"a": SIGNAL[i]["a"] * 0.3 + 2 * a, "b": SIGNAL[i]["b"] * 0.3 + b}
    for i, (a, b) in enumerate([(1, 1), (1, 1), (-0.6, 1), (-1, -1.5), (-1, -1), (0.6, -1), (1, -1), (1, 1)])
]


def heavy_ball_restart(mu, signal):
    """Gradient restart of the heavy ball: x' = x - v', and v' = 0 where g points along the move."""
    v, moves, restarts = 0.0, [], 0
    for g in signal:
        v = mu * v + g
        moves.append(v)
        uphill = np.sum(g * -v) > 0
        v, restarts = v * (not uphill), restarts + uphill
    return moves, restarts


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


# Cautious updates. The formulas are those of the projects' code, in NumPy.


def c_optim_lion(u, g):
    mask = (u * g > 0).astype(np.float64)
    return u * mask * (mask.size / (mask.sum() + 1))


def timm(u, g):
    mask = (u * g > 0).astype(np.float64)
    return u * (mask / np.maximum(mask.mean(), 1e-3))


def heavyball(u, g):
    masked = np.signbit(u) ^ np.signbit(g)
    scale = masked.size / max(masked.size - masked.sum(), 1)
    return np.where(masked, 0, u) * scale


CAUTIOUS = {"count": c_optim_lion, "mean": timm, "sign_bit": heavyball}


@pytest.mark.parametrize("scaling", CAUTIOUS)
def test_cautious_updates_are_those_of_the_published_code(scaling):
    rule = mo.heavy_ball(0.9)
    # Leaves of their own scale; zeros of either sign; one leaf with little or no agreement.
    turned = [
        {**g, "none": jnp.full(2000, float(s))} for g, s in zip(TURNING, (1, -0.1, 0.1, 1, -0.1, 1, 1, -1), strict=True)
    ]
    turned[1]["b"] = turned[1]["b"].at[:2].set(jnp.array([0.0, -0.0]))
    # Shares below and above the least of one in a thousand.
    turned[1]["none"] = turned[1]["none"].at[0].set(0.1)
    turned[4]["none"] = turned[4]["none"].at[:5].set(0.1)
    like = {**LIKE, "none": jnp.zeros(2000)}
    out, state = steps(mo.cautious(mo.scale_by_momentum(rule), scaling), turned, like)
    buffer, dropped = jax.tree.map(lambda x: np.zeros(x.shape), like), 0
    for u, g in zip(out, turned, strict=True):
        for name in like:
            buffer[name] = 0.9 * buffer[name] + np.float64(g[name])
            expected = CAUTIOUS[scaling](buffer[name], np.float64(g[name]))
            np.testing.assert_allclose(u[name], expected, rtol=1e-5, atol=1e-6)
            dropped += np.sum(expected == 0)
    assert dropped > 2000
    assert_bit_equal(state, steps(mo.scale_by_momentum(rule), turned, like)[1])


def test_cautious_lion_is_the_authors():
    lion = optax.chain(mo.scale_by_momentum(mo.lion_mix(0.9, 0.99)), optax.scale_by_sign())
    out, _ = steps(optax.chain(mo.cautious(lion, "count"), optax.scale_by_learning_rate(0.1)), TURNING)
    average = jax.tree.map(lambda x: np.zeros(x.shape), LIKE)
    for u, g in zip(out, TURNING, strict=True):
        for name in LIKE:
            grad = np.float64(g[name])
            expected = -0.1 * c_optim_lion(np.sign(0.9 * average[name] + 0.1 * grad), grad)
            average[name] = 0.99 * average[name] + 0.01 * grad
            np.testing.assert_allclose(u[name], expected, rtol=1e-5)


def fixed(u):
    """A transformation whose update is `u`."""
    return optax.stateless(lambda g, p: u)


@pytest.mark.parametrize("scaling", CAUTIOUS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_cautious_masks_hold_for_tiny_numbers_zeros_and_every_dtype(scaling, dtype):
    tiny = 1e-4 if dtype == jnp.float16 else 1e-30
    u = jnp.array([1, -1, 0.0, -0.0, 2, tiny, tiny, -0.0], dtype)
    g = jnp.array([1, 1, 1.0, 1.0, 0, tiny, -tiny, -1], dtype)
    got, _ = mo.cautious(fixed(u), scaling).update(g, optax.EmptyState())
    expected = CAUTIOUS[scaling](np.float64(u), np.float64(g))
    assert got.dtype == dtype
    np.testing.assert_allclose(np.float64(got), expected, rtol=2 * float(jnp.finfo(dtype).eps))
    empty, _ = mo.cautious(optax.identity(), scaling).update(jnp.zeros((0, 3), dtype), optax.EmptyState())
    assert empty.shape == (0, 3)
    none, _ = mo.cautious(optax.identity(), scaling).update({"a": g, "b": None}, optax.EmptyState())
    assert none["b"] is None
    rows, _ = jax.vmap(lambda u, g: mo.cautious(fixed(u), scaling).update(g, optax.EmptyState()))(
        jnp.stack([u, g]), jnp.stack([g, g])
    )
    np.testing.assert_array_equal(rows[0], got)


@pytest.mark.parametrize("agreement", ["product", "sign_bit"])
def test_cautious_weight_decay_is_that_of_the_published_code(agreement):
    u = np.array([1.0, 1, -1, -1, 0, 0, -0.0, -0.0, 2])
    p = np.array([3.0, -3, 3, -3, 3, -3, 3, -3, 0])
    mask = u * p >= 0 if agreement == "product" else ~(np.signbit(u) ^ np.signbit(p))
    tx = mo.add_cautious_weight_decay(optax.linear_schedule(0.1, 0.3, 2), agreement)
    signal = {"a": jnp.asarray(u, jnp.float32), "b": jnp.asarray(u, jnp.bfloat16)}
    out, state = steps(tx, [signal] * 3, {"a": jnp.asarray(p, jnp.float32), "b": jnp.asarray(p, jnp.float32)})
    for got, rate in zip(out, (0.1, 0.2, 0.3), strict=True):
        np.testing.assert_allclose(got["a"], u + rate * mask * p, rtol=1e-6)
        np.testing.assert_allclose(np.float64(got["b"]), u + rate * mask * p, rtol=2**-8)
        assert got["b"].dtype == jnp.bfloat16
    assert state.step == 3
    constant = mo.add_cautious_weight_decay(0.1, agreement)
    assert jax.tree.leaves(constant.init(signal)) == []
    none, _ = constant.update({"a": None, "b": optax.MaskedNode()}, constant.init(signal), signal)
    assert none == {"a": None, "b": optax.MaskedNode()}


@pytest.mark.parametrize("scaling", CAUTIOUS)
def test_nothing_is_divided_by_zero_where_no_element_agrees(scaling):
    tx = mo.cautious(optax.scale(-1.0), scaling)
    # What a selection would hide is seen here: every operation is looked at by itself.
    with jax.debug_nans(True), jax.debug_infs(True), jax.disable_jit():
        u, _ = tx.update({"a": jnp.ones(3)}, tx.init({"a": jnp.ones(3)}))
    np.testing.assert_array_equal(u["a"], 0)


def test_what_cannot_be_cautious_is_refused():
    with pytest.raises(ValueError, match="scaling must be one of 'count', 'mean', 'sign_bit', got 'sum'"):
        mo.cautious(optax.identity(), "sum")
    with pytest.raises(TypeError, match="tx must be a transformation"):
        mo.cautious(mo.heavy_ball(0.9), "count")
    with pytest.raises(TypeError, match=r"params\['z'\] must be real, got complex64"):
        mo.cautious(optax.identity(), "count").update({"z": jnp.ones(2, jnp.complex64)}, optax.EmptyState())
    with pytest.raises(ValueError, match="agreement must be one of 'product', 'sign_bit', got 'mean'"):
        mo.add_cautious_weight_decay(0.1, "mean")
    with pytest.raises(ValueError, match="weight_decay must be in"):
        mo.add_cautious_weight_decay(-0.1, "product")
    tx = mo.add_cautious_weight_decay(0.1, "product")
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(LIKE, tx.init(LIKE))
    with pytest.raises(TypeError, match=r"params\['z'\] must be real"):
        tx.update({"z": jnp.ones(2, jnp.complex64)}, tx.init(LIKE), {"z": jnp.ones(2, jnp.complex64)})


# Directions and the optimizers made of them.


@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize(
    ("tx", "form"),
    [
        (mo.scale_to_unit_norm, lambda u, n: u / n),
        (lambda scope: mo.contrib.saturate(0.3, scope), lambda u, n: u / np.sqrt(1 + 0.3 * n * n)),
    ],
    ids=["unit", "saturated"],
)
def test_directions_by_norm_are_their_formulas_at_any_scale(tx, form, scope):
    update = jax.jit(tx(scope).update)
    for size in (1.0, 1e-30, 1e30):
        u = {"a": SIGNAL[0]["a"] * size, "b": SIGNAL[0]["b"] * size, "c": None, "d": jnp.zeros((0, 2))}
        got, _ = update(u, optax.EmptyState())
        exact = {name: np.float64(u[name]) for name in ("a", "b")}
        norms = {name: np.sqrt(np.sum(x * x)) for name, x in exact.items()}
        for name, x in exact.items():
            norm = norms[name] if scope == "leaf" else np.hypot(*norms.values())
            np.testing.assert_allclose(np.float64(got[name]), form(x, norm), rtol=1e-6, atol=0)
        assert got["c"] is None
    zero, _ = tx(scope).update({"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.complex64)}, optax.EmptyState())
    assert_bit_equal(zero, {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.complex64)})
    mixed, _ = tx(scope).update({"a": jnp.ones(1), "b": jnp.array([2j], jnp.complex64)}, optax.EmptyState())
    np.testing.assert_allclose(mixed["b"], [1j * form(2.0, 2.0 if scope == "leaf" else 5**0.5)], rtol=1e-6)
    half = jnp.array([3e4, 4e4], jnp.float16)
    got, _ = tx(scope).update(half, optax.EmptyState())
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(np.float64(got), form(np.array([3e4, 4e4]), 5e4), rtol=2e-3)


MATRICES = {"tall": jnp.zeros((16, 5)), "wide": jnp.zeros((6, 12))}
HUNDRED = [gradients(MATRICES, seed) for seed in range(100)]


def final(tx, params=None):
    """The parameters after a hundred steps, from ones."""
    params = jax.tree.map(jnp.ones_like, MATRICES) if params is None else params

    def step(carry, g):
        params, state = carry
        u, state = tx.update(g, state, params)
        return (optax.apply_updates(params, u), state), None

    stacked = jax.tree.map(lambda p, *x: jnp.stack(x).astype(p.dtype), params, *HUNDRED)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), stacked)[0][0])()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (mo.lion(0.01, 0.8, 0.95, weight_decay=0.1), optax.lion(0.01, 0.8, 0.95, weight_decay=0.1)),
        (mo.lion(0.01), optax.lion(0.01)),
        (mo.signum(0.01, 0.8), optax.signum(0.01, 0.8)),
        (mo.signum(optax.linear_schedule(0.1, 0.0, 50)), optax.signum(optax.linear_schedule(0.1, 0.0, 50))),
    ],
    ids=["lion", "lion's defaults", "signum", "signum's defaults"],
)
def test_sign_methods_are_optax_s_over_a_hundred_steps(ours, theirs):
    # Signs are the same or not: a single one that differed would be 0.02 here. Then at most 4 ulps of the sums.
    got, expected = final(ours), final(theirs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=4 * 2**-23), got, expected)


def newton_schulz_rounding(rows, columns):
    """The largest error in Frobenius norm, in units of the rounding u, of five computed steps a X + (b A + c A A) X.

    Here A = X X^T, and X has no more rows than columns. A product of inner dimension k is off by at most
    k u |X| |Y|, so that one step adds what `added` holds; before that, the steps multiply errors by the largest slope
    of their polynomial, the Lipschitz constant of the step in this norm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    s = np.linspace(0, 1.21, 1001)  # singular values: at most 1 at first, then at most the polynomial's maximum
    assert abs(a * s + b * s**3 + c * s**5).max() < s[-1]
    slope = abs(a + 3 * b * s**2 + 5 * c * s**4).max()
    size = np.sqrt(rows) * s[-1]
    added = 3 * a * size + abs(b) * (columns + rows + 3) * size**3 + c * (2 * columns + 2 * rows + 4) * size**5
    error = 2.0 * rows * columns  # the gradients' average and its division by its norm, a sum of as many squares
    for _ in range(5):
        error = slope * error + added
    return error


def test_muon_with_optax_s_debiasing_is_optax_s_over_a_hundred_steps(x64):
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), MATRICES)
    ours = final(mo.muon(0.02, mo.nadam_mix(0.9, psi=1e6), weight_decay=0.1), params)
    theirs = final(optax.contrib.muon(0.02, beta=0.9, weight_decay=0.1), params)
    for name, (inputs, outputs) in (("tall", (16, 5)), ("wide", (6, 12))):
        # Directions do not depend on the parameters, so that the errors of a hundred steps of both add up, beside the
        # roundings of parameters below 2.
        direction = max(1, outputs / inputs) ** 0.5 * newton_schulz_rounding(*sorted((inputs, outputs)))
        atol = 2 * 100 * (0.02 * direction + 2 * 2) * 2.0**-53
        assert ours[name].dtype == jnp.float64
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol)


def newton_schulz(G):
    """The reference code's iteration, for (outputs, inputs), in float64."""
    X = G / (np.linalg.norm(G) + 1e-7)
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def test_muon_is_the_reference_code_s_on_transposed_weights():
    params = final(mo.muon(0.02))
    for name in MATRICES:
        weight, buffer = np.ones(MATRICES[name].shape[::-1]), 0.0
        for g in HUNDRED:
            G = np.float64(g[name]).T
            buffer = 0.95 * buffer + 0.05 * G
            update = newton_schulz(0.05 * G + 0.95 * buffer)
            weight -= 0.02 * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update
        np.testing.assert_allclose(params[name], weight.T, rtol=0, atol=5e-6)


def test_normalised_scheduled_restart_and_relativistic_runs_follow_their_papers():
    start = {name: np.ones(x.shape) for name, x in MATRICES.items()}
    normalised, saturated = (jax.tree.map(np.copy, start) for _ in range(2))
    ahead = x = jax.tree.map(np.copy, start)
    m = w = jax.tree.map(np.zeros_like, start)
    k = 1
    for g in [jax.tree.map(np.float64, gradient) for gradient in HUNDRED]:
        m = {n: 0.9 * m[n] + 0.1 * g[n] for n in m}
        length = np.sqrt(sum(np.sum(a * a) for a in m.values()))
        normalised = {n: p - 0.1 * m[n] / length for n, p in normalised.items()}
        # The momentum (k - 1) / (k + 2), k from 1, and 1 again after R = 7 steps.
        new = {n: ahead[n] - 0.1 * g[n] for n in x}
        ahead = {n: new[n] + (k - 1) / (k + 2) * (new[n] - x[n]) for n in x}
        x, k = new, 1 if k >= 7 else k + 1
        w = {n: 0.8 * w[n] - 0.05 * g[n] for n in w}
        speed = np.sqrt(1 + 2.0 * sum(np.sum(a * a) for a in w.values()))
        saturated = {n: p + w[n] / speed for n, p in saturated.items()}
    for tx, expected in (
        (mo.normalized_sgd(0.1), normalised),
        (mo.srsgd(0.1, 7), ahead),
        (mo.contrib.relativistic(0.05, 0.8, 2.0), saturated),
    ):
        got = final(tx)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


OPTIMIZERS = {
    "lion": mo.lion,
    "muon": mo.muon,
    "normalized_sgd": mo.normalized_sgd,
    "relativistic": mo.contrib.relativistic,
    "signum": mo.signum,
    "srsgd": lambda rate, **options: mo.srsgd(rate, 5, **options),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finished_optimizers_keep_types_and_take_a_storage_and_a_missing_gradient(name):
    params = {"x": jnp.ones((4, 8), jnp.bfloat16), "y": jnp.ones((3, 2))}
    tx = OPTIMIZERS[name](optax.constant_schedule(0.1), storage=STORAGES["bfloat16"]())
    state, step = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        u, after = step(gradients(params), state, params)
        assert avals(after) == avals(state)
        state = after
    assert step._cache_size() == 1
    assert (u["x"].dtype, u["y"].dtype) == (jnp.bfloat16, jnp.float32)
    assert len(velocity(state)) == 1
    none, after = tx.update({**gradients(params), "x": None}, state, {**params, "x": None})
    assert none["x"] is None
    assert_bit_equal(velocity(after)[0]["x"], velocity(state)[0]["x"])
    with pytest.raises(ValueError, match="learning_rate must be in"):
        OPTIMIZERS[name](-1.0)


def test_what_is_no_direction_is_refused():
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got 'row'"):
        mo.scale_to_unit_norm("row")
    with pytest.raises(ValueError, match=r"delta must be in \[0, inf\), got -1"):
        mo.contrib.saturate(-1)
    with pytest.raises(TypeError, match="delta must be a number or a scalar array, got the schedule"):
        mo.contrib.saturate(optax.constant_schedule(1.0))
    with pytest.raises(TypeError, match=r"steps must be a whole number, got 2\.5"):
        mo.orthogonalize(2.5)
    with pytest.raises(ValueError, match=r"params\['b'\] must be a matrix, got shape \(4,\)"):
        mo.orthogonalize().update(SIGNAL[0], optax.EmptyState())
    with pytest.raises(ValueError, match="weight_decay must be in"):
        mo.lion(0.1, weight_decay=-1.0)
    with pytest.raises(ValueError, match="at must be at least 1, got 0"):
        mo.srsgd(0.1, 0)
