"""STORM and exact MARS against loops written from their papers; the variance that theory gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals, gradients

import momentum_optax as mo

LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
SIGNAL = [gradients(LIKE, seed) for seed in range(8)]
BEFORE = [gradients(LIKE, 100 + seed) for seed in range(8)]


def flat(tree):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


def run(tx, signal=SIGNAL, before=BEFORE, params=LIKE):
    """The updates of a step compiled once, as vectors, and the last state."""
    state, out = tx.init(params), []
    step = jax.jit(lambda g, p, state: tx.update(g, state, params, previous_gradient=p))
    for g, p in zip(signal, before, strict=True):
        u, state = step(g, p, state)
        out.append(flat(u))
    assert step._cache_size() == 1
    return np.array(out), state


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


# STORM.


def storm(a, signal, before):
    """d_t of the paper: d = g(x_t) + (1 - a_t) (d - g(x_{t-1}))."""
    d, out = None, []
    for t, (g, p) in enumerate(zip(signal, before, strict=True)):
        d = g if d is None else g + (1 - a(t)) * (d - p)
        out.append(d)
    return out


@pytest.mark.parametrize(
    "a", [0.1, lambda step: 0.5 / (1.0 + step), jnp.float32(1.0)], ids=["number", "schedule", "one"]
)
def test_storm_is_the_paper_s_recursion(a):
    expected = storm(a if callable(a) else lambda _: float(a), list(map(flat, SIGNAL)), list(map(flat, BEFORE)))
    out, state = run(mo.contrib.scale_by_storm(a))
    assert_close(out, expected)
    assert_close(flat(mo.velocity(state)[0]), expected[-1])


def test_the_first_gradient_of_a_leaf_is_its_d_whenever_it_comes():
    tx = mo.contrib.scale_by_storm(0.1)
    state = tx.init(LIKE)
    for g, p in zip(SIGNAL[:3], BEFORE[:3], strict=True):
        none, state = tx.update({**g, "b": None}, state, previous_gradient={**p, "b": None})
    assert none["b"] is None
    np.testing.assert_array_equal(mo.velocity(state)[0]["b"], 0)
    late, state = tx.update(SIGNAL[3], state, previous_gradient=BEFORE[3])
    np.testing.assert_array_equal(late["b"], SIGNAL[3]["b"])
    a = storm(lambda _: 0.1, [np.float64(g["a"]) for g in SIGNAL[:4]], [np.float64(p["a"]) for p in BEFORE[:4]])
    assert_close(late["a"], a[-1])
    before = mo.velocity(state)[0]["b"]
    _, state = tx.update({**SIGNAL[4], "b": None}, state, previous_gradient={**BEFORE[4], "b": None})
    np.testing.assert_array_equal(mo.velocity(state)[0]["b"], before)


def regression(seed, steps):
    """Rows of a noisy least-squares problem, one per step, and the gradient for a row."""
    rng = np.random.default_rng(seed)
    rows, noise = rng.normal(size=(steps, 5)), rng.normal(size=steps)
    return list(zip(rows, rows @ np.arange(5.0) + noise, strict=True)), lambda x, row: row[0] * (row[0] @ x - row[1])


def test_adaptive_storm_is_algorithm_1(x64):
    c, k, w = 1000.0, 0.2, 0.5
    rows, gradient = regression(0, 60)
    # The paper's order: move, then take the next row at both points.
    x, total = np.zeros(5), 0.0
    d = gradient(x, rows[0])
    total += d @ d
    points, weights = [], []
    for row in rows[1:]:
        eta = k / (w + total) ** (1 / 3)
        x, last = x - eta * d, x
        points.append(x)
        g = gradient(x, row)
        total += g @ g
        weights.append(min(1, c * eta**2))
        d = g + (1 - weights[-1]) * (d - gradient(last, row))
    assert 0.1 < weights[-1] < 0.5
    assert weights[0] == 1

    def train(tx, x):
        def step(carry, row):
            x, last, state = carry
            u, state = tx.update(gradient(x, row), state, previous_gradient=gradient(last, row))
            return (x + u, x, state), x + u

        stacked = tuple(map(np.stack, zip(*rows, strict=True)))
        return jax.lax.scan(step, (x, x, tx.init(x)), stacked)[1]

    ours = jax.jit(lambda c, k, w: train(mo.contrib.storm(c, k, w), jnp.zeros(5)))
    np.testing.assert_allclose(ours(c, k, w)[:-1], points, rtol=1e-9, atol=1e-12)
    for other in ((900.0, k, w), (c, 0.3, w), (c, k, 2.0)):
        assert not np.allclose(ours(*other)[:-1], points, rtol=1e-3)


def test_the_error_of_storm_has_the_variance_of_theory_and_that_of_an_average_is_larger():
    # f(x; xi) = x^2/2 - xi x, so that the gradients of a batch at two points differ by x - x_before without noise:
    # e = d - x follows e' = (1 - a) e - a xi, of variance a/(2 - a) whatever the rate. The average m of the gradients
    # lags behind x; with x it is a linear system, whose covariance P solves P = M P M' + N N'.
    a, rate, copies = 0.1, 0.5, 2**16
    averaged = mo.scale_by_momentum(mo.ema(1 - a))
    reduced = mo.contrib.scale_by_storm(a)

    def step(carry, key):
        (x, last, state), (y, other) = carry
        xi = jax.random.normal(key, (copies,))
        d, state = reduced.update(x - xi, state, previous_gradient=last - xi)
        m, other = averaged.update(y - xi, other)
        return ((x - rate * d, x, state), (y - rate * m, other)), (jnp.var(d - x), jnp.var(m - y))

    start = jnp.zeros(copies)
    begin = ((start, start, reduced.init(start)), (start, averaged.init(start)))
    keys = jax.random.split(jax.random.key(0), 150)
    storm_s, average_s = (np.asarray(v)[-1] for v in jax.jit(lambda: jax.lax.scan(step, begin, keys)[1])())
    M = np.array([[1 - rate * a, -rate * (1 - a)], [a, 1 - a]])  # of (y, m)
    N = np.array([-rate * a, a])
    P = np.linalg.solve(np.eye(4) - np.kron(M, M), np.kron(N, N)).reshape(2, 2)
    # m - y at a step is (1 - a) (m_before - y) - a xi.
    lagging = (1 - a) ** 2 * (P[0, 0] + P[1, 1] - 2 * P[0, 1]) + a**2
    # Four standard errors of the variance of so many independent normal copies.
    margin = 4 * np.sqrt(2 / copies)
    assert storm_s == pytest.approx(a / (2 - a), rel=margin)
    assert average_s == pytest.approx(lagging, rel=margin)
    assert lagging > 2 * a / (2 - a)


# MARS.


def mars(signal, before, beta, gamma, parts):
    """The corrected gradients c_t of the paper, clipped to norm 1 part by part."""
    out = []
    for g, p in zip(signal, before, strict=True):
        c = g + gamma * beta / (1 - beta) * (g - p)
        out.append(np.concatenate([c[part] / max(1, np.linalg.norm(c[part])) for part in parts]))
    return out


PARTS = {"tree": [slice(0, 10)], "leaf": [slice(0, 6), slice(6, 10)]}
# Norms from a third of the clip's to three times it.
SIZES = np.geomspace(0.03, 0.3, 8)
SIZED = [[jax.tree.map(lambda g, s=s: s * g, g) for g, s in zip(x, SIZES, strict=True)] for x in (SIGNAL, BEFORE)]


@pytest.mark.parametrize("scope", PARTS)
def test_mars_chains_are_the_paper_s_algorithms(scope):
    beta, b2, gamma, eps, decay, rate = 0.9, 0.8, 0.3, 1e-3, 0.1, 0.01
    params = jax.tree.map(lambda x: x + 2.0, LIKE)
    corrected = mars(*(list(map(flat, x)) for x in SIZED), beta, gamma, PARTS[scope])
    assert 2 <= sum(np.linalg.norm(c) > 1 - 1e-9 for c in corrected) <= 7
    m = v = 0.0
    adamw, lion = [], []
    for t, c in enumerate(corrected, 1):
        m, v = beta * m + (1 - beta) * c, b2 * v + (1 - b2) * c * c
        adamw.append(-rate * (m / (1 - beta**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * 2.0))
        lion.append(-rate * (np.sign(m) + decay * 2.0))
    tx = mo.contrib.mars_adamw(rate, beta, b2, gamma=gamma, eps=eps, weight_decay=decay, scope=scope)
    np.testing.assert_allclose(run(tx, *SIZED, params)[0], adamw, rtol=2e-5, atol=1e-8)
    tx = mo.contrib.mars_lion(rate, beta, gamma=gamma, weight_decay=decay, scope=scope)
    np.testing.assert_allclose(run(tx, *SIZED, params)[0], lion, rtol=1e-6)
    if scope == "tree":
        in_bytes = mo.compress(
            mo.contrib.mars_adamw(rate, beta, b2, gamma=gamma, eps=eps), {"mu": "int8", "nu": "uint8"}
        )
        assert {x.dtype for x in jax.tree.leaves(in_bytes.init({"a": jnp.zeros((64, 64))}))} >= {jnp.dtype("int8")}


def test_scheduled_arguments_of_mars_follow_the_step():
    tx = mo.contrib.mars_correction(lambda t: 0.5 + 0.05 * t, lambda t: 0.1 * t, "leaf")
    out, state = run(tx, *SIZED)
    for t, (u, g, p) in enumerate(zip(out, *SIZED, strict=True)):
        (expected,) = mars([flat(g)], [flat(p)], 0.5 + 0.05 * t, 0.1 * t, PARTS["leaf"])
        assert_close(u, expected)
    assert state.step == len(SIGNAL)


def test_with_gamma_1_and_no_clip_the_average_is_storm_but_for_its_start():
    beta = 0.9
    small = [[jax.tree.map(lambda g: 0.01 * g, g) for g in x] for x in (SIGNAL, [SIGNAL[0], *BEFORE[1:]])]
    averaged, _ = run(optax.chain(mo.contrib.mars_correction(beta, 1.0), mo.scale_by_momentum(mo.ema(beta))), *small)
    d, _ = run(mo.contrib.scale_by_storm(1 - beta), *small)
    # The average starts from zero: the first time it lacks beta g, and of that a share of beta remains in each step.
    lack = np.array([beta ** (t + 1) * flat(small[0][0]) for t in range(len(d))])
    np.testing.assert_allclose(d - averaged, lack, rtol=1e-4, atol=1e-8)


# Both.


MAKERS = {
    "storm": lambda storage: mo.contrib.scale_by_storm(0.1, storage=storage),
    "adaptive storm": lambda storage: mo.contrib.storm(10.0, storage=storage),
    "mars": lambda storage: mo.contrib.mars_lion(0.1, storage=storage),
}


@functools.cache
def like():
    return {"x": jnp.zeros((4, 8), jnp.bfloat16), "y": jnp.zeros((3, 2)), "z": jnp.zeros((2,))}


# A rule's velocity meets its storage in one place, so that one row of each is enough for every day.
FAST = {("storm", "float32"), ("storm", "bfloat16"), ("adaptive storm", "float32"), ("mars", "float32")}
ROWS = [
    pytest.param(maker, storage, marks=() if (maker, storage) in FAST else pytest.mark.slow)
    for maker in MAKERS
    for storage in STORAGES
]


@pytest.mark.parametrize(("maker", "storage"), ROWS)
def test_a_compiled_step_keeps_types_donates_and_resumes(maker, storage):
    tx = MAKERS[maker](STORAGES[storage]())
    step = jax.jit(lambda g, p, state: tx.update(g, state, previous_gradient=p), donate_argnums=2)
    pairs = [(gradients(like(), i), gradients(like(), 50 + i)) for i in range(5)]
    state = tx.init(like())
    begin = avals(state)
    for i, (g, p) in enumerate(pairs):
        u, state = step(g, p, state)
        assert avals(state) == begin
        assert avals(u) == avals(g)
        if i == 2:
            saved = jax.device_get(state)
    state_again = jax.tree.map(jnp.asarray, saved)
    for g, p in pairs[3:]:
        again, state_again = step(g, p, state_again)
    assert_bit_equal((again, state_again), (u, state))
    assert step._cache_size() == 1


def test_a_batch_of_runs_is_each_run_alone():
    tx = optax.chain(mo.contrib.scale_by_adaptive_storm(10.0), mo.contrib.mars_correction(0.9, 0.3))

    def last(signal, before):
        def step(state, pair):
            u, state = tx.update(pair[0], state, previous_gradient=pair[1])
            return state, u

        return jax.lax.scan(step, tx.init(signal[0]), (signal, before))[1][-1]

    signal, before = (jnp.stack([g["b"] for g in x]).reshape(2, 4, 4) for x in (SIGNAL, BEFORE))
    both = jax.jit(jax.vmap(last))(signal, before)
    for i in range(2):
        np.testing.assert_allclose(both[i], last(signal[i], before[i]), rtol=1e-5)


def test_a_storage_changes_storm_by_its_rounding_only():
    exact, _ = run(mo.contrib.scale_by_storm(0.1))
    out, _ = run(mo.contrib.scale_by_storm(0.1, storage="bfloat16"))
    # Each step rounds by at most a step of the largest velocity, and 1 - a of it remains in each later one.
    error = np.abs(out - exact).max()
    assert 0 < error < mo.storage.bfloat16().step_size * np.abs(exact).max() / 0.1


def test_the_second_gradient_goes_through_chains_and_masks():
    tx = optax.chain(mo.contrib.scale_by_storm(0.1), optax.scale(-2.0))
    assert_close(run(tx)[0], -2 * run(mo.contrib.scale_by_storm(0.1))[0])
    mask = {"a": True, "b": False}
    masked = optax.masked(mo.contrib.scale_by_storm(0.1), mask, mask_compatible_extra_args=True)
    out, _ = run(masked)
    a = storm(lambda _: 0.1, [np.float64(g["a"]) for g in SIGNAL], [np.float64(p["a"]) for p in BEFORE])
    assert_close(out[:, :6], np.reshape(a, (-1, 6)))
    assert_close(out[:, 6:], [flat(g["b"]) for g in SIGNAL])


@pytest.mark.parametrize(
    "tx",
    [mo.contrib.scale_by_storm(0.1), mo.contrib.storm(1.0), mo.contrib.mars_adamw(0.1)],
    ids=["storm", "adaptive", "mars"],
)
def test_a_second_gradient_that_does_not_fit_is_refused(tx):
    state, g = tx.init(LIKE), SIGNAL[0]
    with pytest.raises(TypeError, match="previous_gradient must be given to update"):
        tx.update(g, state)
    with pytest.raises(ValueError, match=r"previous_gradient must have one tree, got a difference in params\['b'\]"):
        tx.update(g, state, previous_gradient={"a": g["a"]})
    with pytest.raises(ValueError, match=r"the gradient's shape \(4,\) at params\['b'\], got \(3,\)"):
        tx.update(g, state, previous_gradient={**g, "b": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"the gradient's shape \(4,\) at params\['b'\], got None"):
        tx.update(g, state, previous_gradient={**g, "b": None})


def test_what_is_no_argument_is_refused():
    with pytest.raises(ValueError, match=r"a must be in \[0, 1\], got 2"):
        mo.contrib.scale_by_storm(2)
    with pytest.raises(ValueError, match=r"c must be in \[0, inf\), got -1"):
        mo.contrib.storm(-1)
    with pytest.raises(ValueError, match=r"w must be in \(0, inf\), got 0"):
        mo.contrib.storm(1, w=0)
    with pytest.raises(TypeError, match="k must be a number or a scalar array, got the schedule"):
        mo.contrib.storm(1, k=optax.constant_schedule(0.1))
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got 'row'"):
        mo.contrib.mars_lion(0.1, scope="row")
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        mo.contrib.mars_correction(1.0)
    with pytest.raises(TypeError, match="decay must be a number or a scalar array"):
        mo.contrib.mars_adamw(0.1, optax.constant_schedule(0.9))
    tx, g = mo.contrib.scale_by_storm(0.1), {"a": SIGNAL[0]["a"]}
    with pytest.raises(ValueError, match=r"the parameters of init must have one tree, got .* in params\['b'\]"):
        tx.update(g, tx.init(LIKE), previous_gradient=g)
