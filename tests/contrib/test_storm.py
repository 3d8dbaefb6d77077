"""STORM against loops written from the paper; the variance that theory gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from two_gradients import BEFORE, LIKE, SIGNAL, assert_close, flat, run

import momentum_optax as mo


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
    # Four standard errors of the variance of that number of independent normal copies.
    margin = 4 * np.sqrt(2 / copies)
    assert storm_s == pytest.approx(a / (2 - a), rel=margin)
    assert average_s == pytest.approx(lagging, rel=margin)
    assert lagging > 2 * a / (2 - a)


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


def test_what_is_no_argument_is_refused():
    with pytest.raises(ValueError, match=r"a must be in \[0, 1\], got 2"):
        mo.contrib.scale_by_storm(2)
    with pytest.raises(ValueError, match=r"c must be in \[0, inf\), got -1"):
        mo.contrib.storm(-1)
    with pytest.raises(ValueError, match=r"w must be in \(0, inf\), got 0"):
        mo.contrib.storm(1, w=0)
    with pytest.raises(TypeError, match="k must be a number or a scalar array, got <function"):
        mo.contrib.storm(1, k=optax.constant_schedule(0.1))
    tx, g = mo.contrib.scale_by_storm(0.1), {"a": SIGNAL[0]["a"]}
    with pytest.raises(ValueError, match=r"the parameters of init must have one tree, got .* in params\['b'\]"):
        tx.update(g, tx.init(LIKE), previous_gradient=g)
