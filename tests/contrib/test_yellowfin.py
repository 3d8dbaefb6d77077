"""YellowFin against its paper: a NumPy loop in float64, the problem that its cubic solves, and its robust region."""

import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals, gradients

import momentum_optax as mo
from momentum_optax.contrib._single_step import single_step

LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
SIGNAL = [jax.tree.map(lambda g, i=i: 0.3 * (1 + i % 7) * g + 0.5, gradients(LIKE, i)) for i in range(200)]
STACKED = jax.tree.map(lambda *g: jnp.stack(g), *SIGNAL)


TX = mo.contrib.scale_by_yellowfin(0.9)
STEP = jax.jit(TX.update)


def flat(tree):
    return np.concatenate([np.ravel(np.float64(x)) for x in jax.tree.leaves(tree)])


class Paper:
    """The paper's algorithms 1 to 4 with its appendix's debiasing, logarithms and slow start; one vector."""

    def __init__(self, beta=0.999, window=20, smooth=True):
        self.beta, self.width, self.smooth = beta, window, smooth
        self.norms, self.sums = [], {}

    def average(self, name, value):
        """The zero-debiased average of all values so far, and the plain one."""
        self.sums[name] = plain = self.beta * self.sums.get(name, 0.0) + (1 - self.beta) * value
        return plain / (1 - self.beta ** len(self.norms)), plain

    def rate_and_momentum(self, g):
        self.norms.append(np.sum(g * g))
        recent = self.norms[-self.width :]
        low = np.exp(self.average("low", np.log(min(recent)))[0])
        high = np.exp(self.average("high", np.log(max(recent)))[0])
        square, plain_square = self.average("square", self.norms[-1])
        C = square - np.sum(self.average("g", g)[0] ** 2)
        plain_norm = self.average("norm", np.sqrt(self.norms[-1]))[1]
        D = self.average("D", plain_norm / plain_square)[0]
        # One minus the root of mu, to keep its digits where mu is about 1.
        gap = min(self.cubic(max(C, 1e-300), D, low), 2 / (np.sqrt(high / low) + 1))
        rate, mu = gap**2 / low, (1 - gap) ** 2
        rate = min(rate, rate * len(self.norms) / (10 * self.width))
        smooth = self.average("rate", rate)[0], self.average("mu", mu)[0]
        return smooth if self.smooth else (rate, mu)

    @staticmethod
    def cubic(C, D, low):
        """1 - x for the x in [0, 1] with (1 - x)^3 = x D^2 h^2 / (2 C), by Newton's method from the convex side."""
        p, s = D * D * low * low / (2 * C), 1.0
        for _ in range(300):
            s, last = s - (s**3 + p * s - p) / (3 * s**2 + p), s
            if abs(s - last) < 1e-15 * s:
                break
        return s


def descent(gradient, x, steps, **options):
    """Polyak's iteration with the paper's rate and momentum; the points after each step."""
    tuner, before, points = Paper(**options), x, []
    for _ in range(steps):
        g = gradient(x)
        rate, mu = tuner.rate_and_momentum(g)
        x, before = x - rate * g + mu * (x - before), x
        points.append(x)
    return np.array(points)


def cases(n=300):
    """Random problems: variance, distance, least and largest curvature, over many orders of magnitude."""
    rng = np.random.default_rng(0)
    low = 10 ** rng.uniform(-6, 6, n)
    high = low * 10 ** rng.uniform(0, 4, n) ** rng.integers(0, 2, n)
    p = 10 ** rng.uniform(-9, 9, n)
    D = 10 ** rng.uniform(-3, 3, n)
    return D**2 * low**2 / (2 * p), D, low, high


def test_the_cubic_solves_single_step(x64):
    C, D, low, high = cases()
    rate, mu = map(np.asarray, jax.jit(single_step)(np.log(low), np.log(high), C, D))
    least = (np.sqrt(high / low) - 1) / (np.sqrt(high / low) + 1)
    assert np.all(np.sqrt(mu) >= least * (1 - 1e-12))
    np.testing.assert_allclose(rate, (1 - np.sqrt(mu)) ** 2 / low, rtol=1e-8)
    # Everywhere that may be tried, by distance from either end.
    fine = np.geomspace(1e-10, 1, 20001)
    x = np.concatenate([fine, 1 - fine])

    def objective(x, i):
        return x**2 * D[i] ** 2 + (1 - x) ** 4 * C[i] / low[i] ** 2

    for i in range(len(C)):
        allowed = x[(x >= least[i]) & (x < 1)]
        assert objective(np.sqrt(mu[i]), i) <= objective(allowed, i).min() * (1 + 1e-12)
    assert 50 < np.sum(np.sqrt(mu) > least * (1 + 1e-9)) < 250, "both constraints should bind somewhere"


def test_single_step_keeps_its_digits_in_float32_and_has_an_outcome_without_variance():
    C, D, low, high = cases()
    args = [np.float32(x) for x in (np.log(low), np.log(high), C, D)]
    rate, mu = (np.float64(x) for x in jax.jit(single_step)(*args))
    low, high, C, D = (np.float64(x) for x in (np.exp(np.float64(args[0])), np.exp(np.float64(args[1])), *args[2:]))
    gap = np.array([Paper.cubic(*problem) for problem in zip(C, D, low, strict=True)])
    gap = np.minimum(gap, 2 / (np.sqrt(high / low) + 1))
    np.testing.assert_allclose(mu, (1 - gap) ** 2, rtol=0, atol=1e-6)
    # An ulp of the logarithm of 10^6 is 1e-6 of the number.
    np.testing.assert_allclose(rate, gap**2 / low, rtol=1e-5)
    rate, mu = single_step(np.float32(0), np.float32(np.log(9.0)), np.float32(0), np.float32(1))
    np.testing.assert_allclose([rate, mu], [0.25, 0.25], rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("variance", [0.0, 3.0], ids=["range binds", "variance binds"])
def test_the_rate_of_convergence_is_the_root_of_the_momentum_in_the_whole_range(x64, variance):
    # For x'' = s x' - mu x, the form x'^2 - s x x' + mu x^2 is multiplied by mu in each step: complex roots of modulus
    # sqrt(mu), whatever the curvature. At the ends of the range, where the roots meet, it vanishes with its growth.
    low, high = 0.5, 8.0
    rate, mu = single_step(jnp.log(low), jnp.log(high), jnp.float64(variance), jnp.float64(1.0))
    bound = ((np.sqrt(16.0) - 1) / (np.sqrt(16.0) + 1)) ** 2
    assert mu == pytest.approx(bound, rel=1e-12) if variance == 0 else mu > 1.2 * bound
    curvature = np.linspace(low, high, 7)
    tx = optax.chain(mo.scale_by_momentum(mo.heavy_ball(mu)), optax.scale_by_learning_rate(rate))

    def step(carry, _):
        x, state = carry
        u, state = tx.update(curvature * x, state)
        return (x + u, state), x + u

    points = np.asarray(jax.lax.scan(step, (jnp.ones(7), tx.init(jnp.ones(7))), length=40)[1])
    s = 1 + float(mu) - float(rate) * curvature
    form = points[1:] ** 2 - s * points[1:] * points[:-1] + float(mu) * points[:-1] ** 2
    np.testing.assert_allclose(
        form[1:] / form[0, 3], float(mu) ** np.arange(1, 39)[:, None] * form[0] / form[0, 3], rtol=1e-9, atol=1e-12
    )
    assert np.all(np.abs(s) <= 2 * np.sqrt(float(mu)) * (1 + 1e-12))


def test_two_hundred_steps_are_the_paper_s():
    updates, rates, momenta = two_hundred()
    tuner, v = Paper(0.99, 5), 0.0
    for i, g in enumerate(SIGNAL):
        rate, mu = tuner.rate_and_momentum(flat(g))
        v = mu * v + rate * flat(g)
        np.testing.assert_allclose([rates[i], momenta[i]], [rate, mu], rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(flat(jax.tree.map(lambda u, i=i: u[i], updates)), v, rtol=2e-4, atol=1e-6)
    assert 0.05 < mu < 0.95


def scanned(tx, signal):
    """The last state; updates, rates and momenta of each step."""

    def step(state, g):
        u, state = tx.update(g, state)
        return state, (u, state.learning_rate, state.momentum)

    return jax.lax.scan(step, tx.init(jax.tree.map(lambda g: g[0], signal)), signal)


@functools.cache
def two_hundred():
    return jax.device_get(jax.jit(lambda: scanned(mo.contrib.scale_by_yellowfin(0.99, 5), STACKED)[1])())


def test_closed_loops_on_quadratics_are_the_paper_s_and_converge_untuned(x64):
    steps = 1000
    flat_start = np.array([1e-4, 0, 0, 0, 0, 0])
    curvatures = np.array([*(np.geomspace(1 / kappa, 1, 6) for kappa in (1.0, 10.0, 100.0)), flat_start])
    tx = mo.contrib.yellowfin()

    def run(curvature):
        def step(carry, _):
            x, state = carry
            u, state = tx.update(curvature * x, state)
            return (x + u, state), x + u

        return jax.lax.scan(step, (jnp.ones(6), tx.init(jnp.ones(6))), length=steps)[1]

    points = np.asarray(jax.jit(jax.vmap(run))(curvatures))
    for curvature, ours in zip(curvatures, points, strict=True):
        theirs = descent(lambda x, c=curvature: c * x, np.ones(6), steps)
        np.testing.assert_allclose(ours[:200], theirs[:200], rtol=1e-8, atol=1e-12)
        sizes, expected = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
        np.testing.assert_allclose(sizes[[500, 999]], expected[[500, 999]], rtol=1e-4)
        if curvature[1] == 0:
            continue
        assert sizes[-1] < 1e-3 * sizes[0]
        # What the smoothing is for: with the last rate and momentum, as in the authors' PyTorch code, it hovers.
        hovering = np.linalg.norm(descent(lambda x, c=curvature: c * x, np.ones(6), steps, smooth=False), axis=1)
        assert hovering[-200:].max() > 100 * sizes[-200:].max()
    # Where it does not help: the smaller the first gradient, the longer the first steps.
    assert 1e10 < np.abs(points[-1]).max() < 1e11
    assert np.abs(points[-1, -1]).max() < 1e3


def test_the_first_step_is_a_slow_start_along_the_gradient():
    u, state = STEP(SIGNAL[0], TX.init(LIKE))
    g = flat(SIGNAL[0])
    np.testing.assert_allclose(flat(u), g / np.sum(g * g) / 200, rtol=1e-5)
    assert state.momentum == pytest.approx(0, abs=1e-5)


def test_gradients_of_zero_leave_the_statistics_alone():
    begin = TX.init(LIKE)
    u, state = STEP(LIKE, begin)
    assert_bit_equal(u, LIKE)
    assert_bit_equal(state, begin)
    fresh = begin
    for g in SIGNAL[:3]:
        u, state = STEP(g, state)
        v, fresh = STEP(g, fresh)
        assert_bit_equal(u, v)
    coasting, after = STEP(LIKE, state)
    assert_bit_equal(after._replace(inner=None), state._replace(inner=None))
    np.testing.assert_allclose(flat(coasting), state.momentum * flat(u), rtol=1e-6)
    assert np.all(np.isfinite(flat(STEP(SIGNAL[3], after)[0])))


@pytest.mark.slow
def test_a_leaf_without_a_gradient_keeps_what_is_its_own_and_counts_nowhere():
    begin = TX.init(LIKE)
    masked = optax.masked(TX, {"a": True, "b": False})
    alone, alone_state = jax.jit(masked.update)(SIGNAL[0], masked.init(LIKE))
    np.testing.assert_array_equal(alone["b"], SIGNAL[0]["b"])
    u, after = STEP({"a": SIGNAL[0]["a"], "b": None}, begin)
    assert u["b"] is None
    np.testing.assert_array_equal(u["a"], alone["a"])
    assert_bit_equal(*(x._replace(inner=None, mean=None) for x in (after, alone_state.inner_state)))
    assert after.mean_square == pytest.approx(np.sum(np.float64(SIGNAL[0]["a"]) ** 2), rel=1e-6)
    _, state = STEP(SIGNAL[1], after)
    _, after = STEP({"a": SIGNAL[2]["a"], "b": None}, state)
    np.testing.assert_array_equal(after.mean["b"], state.mean["b"])
    np.testing.assert_array_equal(mo.velocity(after)[0]["b"], mo.velocity(state)[0]["b"])
    assert after.count == 3
    variance = after.mean_square - np.sum(np.square(after.mean["a"]))
    assert variance > 0
    _, momentum = single_step(after.log_h_min, after.log_h_max, variance, after.distance)
    share = 0.1 / after.weight
    expected = state.momentum + share * (momentum - state.momentum)
    np.testing.assert_allclose(after.momentum, expected, rtol=1e-5)
    none, state = TX.update({"a": None, "b": None}, begin)
    assert none == {"a": None, "b": None}
    assert_bit_equal(state, begin)


def test_a_leaf_that_was_large_when_it_was_last_seen_leaves_no_negative_variance():
    # The squares of the leaves that are there are compared with their mean gradients, which may be older than the mean
    # of the squares; without a variance the range of curvatures alone decides.
    g = {"a": SIGNAL[0]["a"], "b": None}
    _, state = STEP(g, TX.init(LIKE))
    # As after many steps of b alone, a's gradients before having been ten times as large.
    state = state._replace(mean={**state.mean, "a": 10 * state.mean["a"]})
    u, state = STEP({"a": 3 * g["a"], "b": None}, state)
    assert state.mean_square < np.sum(np.square(state.mean["a"])), "the case that is meant"
    low, high = state.log_h_min, state.log_h_max
    momentum = (1 - 2 / (1 + np.exp((high - low) / 2))) ** 2
    _, expected = single_step(low, high, 0.0, state.distance)
    assert expected == pytest.approx(momentum, rel=1e-5)
    assert 0 < state.momentum < 1
    assert 0 < state.learning_rate < np.inf
    assert np.all(np.isfinite(flat(u["a"])))


MIXED = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": jnp.zeros((8,)), "c": jnp.zeros((2,), jnp.complex64)}


@functools.cache
def exact():
    """The last of six updates with an exact velocity, and the state after it."""
    state, step = TX.init(MIXED), jax.jit(TX.update)
    for i in range(6):
        u, state = step(gradients(MIXED, i), state)
    return u, state


@pytest.mark.parametrize(
    "storage", ["float32", "int8", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bfloat16", "int4"))]
)
def test_a_compiled_step_keeps_types_compiles_once_resumes_and_donates(storage):
    tx = mo.contrib.scale_by_yellowfin(optax.constant_schedule(0.9), storage=STORAGES[storage]())
    step = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(MIXED)
    begin = avals(state)
    assert avals(tx.init(jax.eval_shape(lambda: MIXED))) == begin
    for i in range(6):
        g = gradients(MIXED, i)
        u, state = step(g, state)
        assert avals(state) == begin
        assert avals(u) == avals(g)
        if i == 2:
            saved = jax.device_get(state)
    # The storage keeps the velocity and nothing else.
    v, plain = exact()
    pairs = [[x for x in s._replace(inner=None)] for s in (state, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *pairs)
    error = np.linalg.norm(np.float64(u["b"]) - np.float64(v["b"])) / np.linalg.norm(np.float64(v["b"]))
    assert error < {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.05, "int4": 0.5}[storage]
    resumed = jax.tree.map(jnp.asarray, saved)
    for i in range(3, 6):
        again, resumed = step(gradients(MIXED, i), resumed)
    assert_bit_equal(again, u)
    assert_bit_equal(resumed, state)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_every_argument_acts_and_may_be_traced_where_it_is_a_number():
    signal = jax.tree.map(lambda g: g[:12], STACKED)
    run = jax.jit(jax.vmap(lambda decay: scanned(mo.contrib.scale_by_yellowfin(decay, 5), signal)[1][0]["b"][-1]))
    plain, shorter = np.asarray(run(jnp.array([0.99, 0.9])))
    np.testing.assert_allclose(plain, two_hundred()[0]["b"][11], rtol=1e-4)
    assert not np.allclose(plain, shorter, rtol=1e-3)
    wider = jax.jit(lambda: scanned(mo.contrib.scale_by_yellowfin(0.99, 12), signal)[1][0]["b"][-1])()
    assert not np.allclose(plain, wider, rtol=1e-3)
    half, whole = (
        mo.contrib.yellowfin(optax.constant_schedule(0.5), decay=0.9, window=2),
        mo.contrib.scale_by_yellowfin(0.9, 2),
    )
    steps, states = [jax.jit(tx.update) for tx in (half, whole)], [tx.init(LIKE) for tx in (half, whole)]
    for g in SIGNAL[:4]:
        (u, states[0]), (v, states[1]) = (step(g, state) for step, state in zip(steps, states, strict=True))
        np.testing.assert_allclose(flat(u), -0.5 * flat(v), rtol=1e-6)


def test_a_parameter_takes_eight_bytes_and_five_with_a_velocity_of_one():
    leaf = jax.ShapeDtypeStruct((4096, 1024), jnp.float32)
    for storage, expected in (("float32", 8), ("int8", 5)):
        state = jax.eval_shape(mo.contrib.scale_by_yellowfin(storage=storage).init, leaf)
        held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / (4096 * 1024)
        assert expected <= held < expected + 0.1


def test_what_cannot_be_tuned_is_refused():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        mo.contrib.scale_by_yellowfin(1.0)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        mo.contrib.scale_by_yellowfin(window=0)
    with pytest.raises(ValueError, match="learning_rate must be in"):
        mo.contrib.yellowfin(-1.0)
    tx = mo.contrib.scale_by_yellowfin()
    with pytest.raises(TypeError, match=r"params\['n'\] must have a dtype of"):
        tx.init({"n": jnp.zeros(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"must have one tree, got a difference in params\['b'\]"):
        tx.update({"a": SIGNAL[0]["a"]}, tx.init(LIKE))
    with pytest.raises(ValueError, match=r"must have the gradient's shape \(3,\) at params\['b'\], got \(4,\)"):
        tx.update({"a": SIGNAL[0]["a"], "b": jnp.zeros(3)}, tx.init(LIKE))


def test_the_page_tells_what_the_benchmark_found():
    root = pathlib.Path(__file__).parents[2]
    text = " ".join((root / "docs" / "yellowfin.md").read_text().split())
    rows = json.loads((root / "benchmarks" / "yellowfin.json").read_text())["rows"]
    found = {}
    for row in rows:
        losses = row.get("losses")
        cell = f"{np.median(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})" if losses else row["steps"] or "no"
        found.setdefault(row["task"], {})[row["way"]] = str(cell)
    assert len(found) == 11
    for task, cells in found.items():
        assert f"| {task} | {' | '.join(cells.values())} |" in text
    assert f"| task | {' | '.join(cells)} |" in text
    quadratics = [cells for task, cells in found.items() if task.startswith("quadratic")]
    ratios = [int(cells["YellowFin, untuned"]) / int(cells["heavy ball, tuned"]) for cells in quadratics]
    assert f"{min(ratios):.1f} to {max(ratios):.0f} times the steps" in text
    arrived = sum(cells["heavy ball, 0.1 and 0.9"] != "no" for cells in quadratics)
    assert f"the pair of 0.1 and 0.9 does on {arrived} of {len(quadratics)}" in text
    medians = {way: float(re.match(r"\S+", cell)[0]) for way, cell in found["autoencoder"].items()}
    assert medians["YellowFin, untuned"] / medians["heavy ball, tuned"] == pytest.approx(2, abs=0.2)
    assert medians["YellowFin, untuned"] > max(medians["heavy ball, 0.1 and 0.9"], medians["Adam, 1e-3"])
