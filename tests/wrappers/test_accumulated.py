"""`accumulated` against the mean of k gradients and then the paper's own loop, in float64, and against MultiSteps."""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import RULES, STORAGES, assert_bit_equal, assert_same_run, avals, gradients, pointers

import momentum_optax as mo
from momentum_optax.filters import velocity_only_readout
from tests.rules.oracles import DIMENSION, START, TABLE

K = 5
CYCLES = 12
# The rules whose update is a function of their new velocities.
ACCEPTED = {"heavy_ball", "ema", "chebyshev", "complex_heavy_ball"}
# With numbers, not with schedules.
CONSTANT = {"positive_negative"}
ROWS = [row for row in TABLE if row.rule in ACCEPTED and row.variant != "negative"]
THREE = next(row for row in TABLE if row.rule == "aggregated")
THREE = dataclasses.replace(THREE, constants={"b0": 0.5, "b1": 0.9, "b2": 0.97}, ranges={}, variant="no zero")
CASES = [(row, True) for row in ROWS] + [(row, False) for row in (THREE, *ROWS) if row.variant in ("torch", "no zero")]
CASES += [(row, False) for row in TABLE if row.rule in CONSTANT]
SIGNAL = np.random.default_rng(3).normal(size=(CYCLES * K, DIMENSION))

LIKE = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((4,))}
PARAMS = {"a": jnp.full((2, 3), 2.0, jnp.float32), "b": jnp.full((4,), -1.0, jnp.float32)}
RATE = optax.linear_schedule(0.5, 0.1, 6)
REST = optax.chain(optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(RATE))


def scheduled_row(row):
    """A random schedule for each hyperparameter, and the function of the step that the references read."""
    rng = np.random.default_rng(11)
    tables = {name: rng.uniform(*ends, CYCLES * K + 2) for name, ends in row.ranges.items()}

    def schedule(table):
        return lambda step: float(table[step]) if isinstance(step, int) else jnp.asarray(table)[step]

    return {n: schedule(t) for n, t in tables.items()}, lambda t: row.constants | {n: x[t] for n, x in tables.items()}


def reference(row, sizes, h):
    """The updates of the paper's loop, each for the mean of the next gradients of SIGNAL."""
    ends = np.cumsum(sizes)
    means = iter([SIGNAL[end - size : end].mean(0) for size, end in zip(sizes, ends, strict=True)])
    points, _ = row.run(lambda _: next(means), np.zeros_like(START), len(sizes), h, learning_rate=1.0)
    expected = np.zeros_like(SIGNAL[: ends[-1]])
    expected[ends - 1] = -np.diff(points, axis=0, prepend=0.0)
    return expected


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("row", "scheduled"), CASES, ids=str)
def test_an_accumulated_rule_is_the_papers_loop_on_mean_gradients(row, scheduled, x64):
    schedules, h = scheduled_row(row) if scheduled else ({}, None)
    rule = row.make(**schedules)

    @jax.jit
    def run(k, growing, signal):
        # One program for every k, a number known at run time or a schedule.
        tx = mo.accumulated(rule, lambda step: k + growing * (step % 3))

        def step(state, g):
            return tx.update(g, state)[::-1]

        return jax.lax.scan(step, tx.init(signal[0]), signal)[1]

    plans = [((k, 0), [k] * (len(SIGNAL) // k)) for k in (1, 2, 5)] + [((1, 1), [1, 2, 3] * 10)]
    for (k, growing), sizes in plans:
        expected = reference(row, sizes, h)
        got = run(k, growing, SIGNAL)[: len(expected)]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    assert run._cache_size() == 1


@pytest.mark.parametrize("rule", RULES)
def test_rules_whose_update_needs_the_mean_gradient_are_refused(rule):
    built = RULES[rule]()
    # A row of [A B] is a rule's new velocity; the update must be a combination of them at every step.
    now = built.pruned().at(30)
    A, B, C, D = now.matrices()
    possible = np.linalg.matrix_rank(np.block([[A, B[:, None]], [C, D]]), tol=1e-9) <= now.order
    assert possible == (rule in ACCEPTED | CONSTANT | {"ademamix_mix", "optimized_gradient_norm"})
    if rule in ACCEPTED | CONSTANT:
        assert mo.accumulated(built, 2).init(jnp.zeros(2)).mini_step == 0
    else:
        # The other two could do without the gradient at this step, but not with numbers that stay the same.
        with pytest.raises(ValueError, match=r"function of its new velocities.*use optax\.MultiSteps"):
            mo.accumulated(built, 2)


def test_numbers_decide_where_a_rule_is_sometimes_a_heavy_ball():
    for rule in (mo.quasi_hyperbolic(0.9, 1.0), mo.simplified_ademamix(0.9, 0.0), mo.lion_mix(0.9, 0.9)):
        assert velocity_only_readout(rule) == pytest.approx((1.0,), rel=1e-12)
    assert velocity_only_readout(mo.ema(0.9).scale(3.0)) == pytest.approx((3.0,), rel=1e-12)
    assert velocity_only_readout(mo.mars_mix(0.9, 0.0)) == pytest.approx((1 / 0.9,), rel=1e-12)
    assert velocity_only_readout(mo.aggregated((0.5, 0.9))) == pytest.approx((0.5, 0.5), rel=1e-12)
    for rule in (mo.aggregated((0.0, 0.9)), mo.heavy_ball(0.0), mo.quasi_hyperbolic(0.9, 0.999)):
        assert velocity_only_readout(rule.pruned()) is None
        with pytest.raises(ValueError, match="the mean gradient itself"):
            mo.accumulated(rule, 2)


def both(ours, theirs, signal, params=PARAMS, dtype=jnp.float32):
    """Largest difference of the parameters of two optimizers after each micro-step."""
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    out = []
    for tx in (ours, theirs):
        step = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p))
        p, state, seen = params, tx.init(params), []
        for g in signal:
            u, state = step(jax.tree.map(lambda x: x.astype(dtype), g), state, p)
            p = optax.apply_updates(p, u)
            seen.append(p)
        assert step._cache_size() == 1
        out.append(seen)
    return [max(float(abs(x[n] - y[n]).max()) for n in x) for x, y in zip(*out, strict=True)]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("rule", "debias", "k"),
    [
        (mo.heavy_ball(0.9), False, 3),
        (mo.heavy_ball(0.9), False, lambda step: 1 + step % 4),
        (mo.ema(optax.linear_schedule(0.5, 0.95, 9)), True, 3),
    ],
    ids=["heavy ball", "scheduled k", "scheduled average, debiased"],
)
def test_parameters_follow_multi_steps_around_the_whole_chain(rule, debias, k):
    # Coupled decay may stand before it; what stands behind moves once a cycle: a schedule, a sign, decoupled decay.
    signal = [gradients(LIKE, seed) for seed in range(24)]
    tail = optax.chain(optax.clip(1.5), REST)
    coupled = optax.add_decayed_weights(0.01)
    ours = optax.chain(coupled, mo.accumulated(rule, k, tail, debias=debias))
    theirs = optax.MultiSteps(optax.chain(coupled, mo.scale_by_momentum(rule, debias=debias), tail), k)
    differences = both(ours, theirs, signal)
    # 24 steps of at most 2 units of rounding at parameters up to 4: far below what one missed count would do.
    assert max(differences) < 24 * 2 * 4 * 2.0**-24
    assert len(differences) == 24


def test_counters_behind_stand_still_until_the_last_micro_batch():
    tx = mo.accumulated(mo.heavy_ball(0.9), 3, REST)
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for t in range(7):
        u, state = step(gradients(LIKE, t), state, PARAMS)
        assert (state.mini_step, state.gradient_step) == ((t + 1) % 3, (t + 1) // 3)
        assert optax.tree.get(state, "count") == (t + 1) // 3
        assert bool(jnp.any(u["a"] != 0)) == (t % 3 == 2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_micro_gradients_add_up_in_float32(dtype):
    # 1 + 63 micro-gradients of 1/512: each too small for the sum in eight bits of mantissa.
    tx = mo.accumulated(mo.heavy_ball(0.5), 64)
    state, step = tx.init(jnp.zeros(3, dtype)), jax.jit(tx.update)
    begin = avals(state)
    for t in range(64):
        u, state = step(jnp.full(3, 1.0 if t == 0 else 2.0**-9, dtype), state)
        assert avals(state) == begin
        assert u.dtype == dtype
    np.testing.assert_array_equal(mo.velocity(state)[0], np.full(3, (1 + 63 * 2.0**-9) / 64, np.float32))


@pytest.mark.parametrize(("storage", "debias"), [(name, name == "float32") for name in STORAGES])
def test_types_never_drift(storage, debias):
    # Parameters of one dtype, gradients of another; a scalar and an empty leaf.
    shapes = {"bfloat16": (2, 3), "float16": (3,), "float32": (), "complex64": (2,)}
    params = {name: jax.ShapeDtypeStruct(shape, name) for name, shape in shapes.items()}
    params["empty"] = jax.ShapeDtypeStruct((0, 3), "float32")
    wide = {n: jax.ShapeDtypeStruct(p.shape, jnp.promote_types(p.dtype, jnp.float32)) for n, p in params.items()}
    tx = mo.accumulated(mo.heavy_ball(0.9, dampening=0.1), 3, REST, storage=STORAGES[storage](), debias=debias)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, wide, state, wide)
    assert avals(after) == avals(state)
    assert avals(updates) == avals(wide)


class Told(NamedTuple):
    """Velocities without compression, and a record of the sizes that their storage was told to expect."""

    values: tuple[Any, ...]
    sizes: tuple[Any, ...]

    @staticmethod
    def decode(parts):
        return parts.values


class Listener:
    state_type, reads_step = Told, False

    def init(self, leaf, order):
        return self.encode((jnp.zeros(leaf.shape),) * order, None, mo.storage.EncodeContext(None, (0.0,) * order))

    def encode(self, velocities, previous, write):
        return Told(
            velocities, tuple(jnp.full((1,) * velocities[0].ndim, g, jnp.float32) for g in write.relative_scales)
        )


def test_a_storage_is_told_the_same_sizes_throughout_a_cycle_those_of_the_rule():
    # What goes into the first velocity depends on the age: on the cycle that a leaf is in, not on the micro-batch.
    intake = mo.filters.PerLeafSchedule(lambda step, age: 1.0 / (1 + age))
    rule = mo.Filter(((0.9, 0.5), (0.0, 0.4)), (intake, 1.0), (0.9, 0.5), intake)
    tx = mo.accumulated(rule, 3, storage=Listener())
    state, step = tx.init(jnp.zeros(2)), jax.jit(tx.update)
    for t in range(9):
        _, state = step(jnp.ones(2), state)
        sizes = np.array([1 / (1 + t // 3) + 0.5, 1.0]) * (1 - np.array([0.9, 0.4]) ** 2) ** -0.75
        np.testing.assert_allclose(np.ravel(state.momentum.velocity.sizes), sizes, rtol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_narrow_storage_rounds_each_micro_step_and_keeps_its_mean(storage):
    # The same constant gradient for many equal elements: their mean is the exact velocity, their noise averages out.
    n = 64 * 4096
    tx = mo.accumulated(mo.heavy_ball(0.5), 3, storage=STORAGES[storage]())
    g = jnp.concatenate([jnp.full(n, 1.0), jnp.array([2.0] * 64)]).reshape(-1, 64)

    @jax.jit
    def run(g):
        state, _ = jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), tx.init(g), length=12)
        return state, mo.velocity(state)[0]

    state, v = run(g)
    assert avals(state) == avals(tx.init(g))
    exact = 1 + 0.5 + 0.25 + 0.125
    x = np.asarray(v).ravel()[:n].astype(np.float64)
    assert abs(x.mean() - exact) < 6 * x.std() / np.sqrt(n) + 1e-6
    assert x.std() > 0


def test_a_missing_micro_gradient_counts_as_zero_and_a_leaf_left_out_keeps_its_state():
    tx = mo.accumulated(mo.heavy_ball(0.5, dampening=0.25, first_step="gradient"), 2)
    state = tx.init(jnp.zeros(1))

    def step(g, state):
        u, state = tx.update(None if g is None else jnp.array([g]), state)
        return None if u is None else float(u[0]), state

    out = []
    # Cycles: (1, 3), then (None, 2), (None, None), then (4, None), (None, 2): the leaf moves with the last of these.
    for g in (1.0, 3.0, None, 2.0, None, None, 4.0, None, None, 2.0, 6.0, 2.0):
        before = mo.velocity(state)[0]
        u, state = step(g, state)
        if g is None:
            np.testing.assert_array_equal(mo.velocity(state)[0], before)
        out.append(u)
    v1 = (1 + 3) / 2
    v2 = 0.5 * v1 + 0.75 * 2 / 2
    v3 = 0.5 * v2 + 0.75 * (4 + 2) / 2
    v4 = 0.5 * v3 + 0.75 * (6 + 2) / 2
    assert out == [0.0, v1, None, v2, None, None, 0.0, None, None, v3, 0.0, v4]
    assert state.gradient_step == 6

    # What follows may drop its state for such a leaf, as `optax.trace` does: it is kept.
    tx = mo.accumulated(mo.heavy_ball(0.5), 1, optax.trace(0.5))
    _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    _, state = tx.update(None, state)
    np.testing.assert_array_equal(state.rest.trace, np.ones(2))


def test_a_guard_leaves_micro_batches_out_and_the_cycle_waits():
    signal = [gradients(LIKE, seed) for seed in range(6)]
    spoilt = [signal[0], jax.tree.map(lambda x: x * jnp.nan, signal[1]), *signal[1:]]
    tx = mo.accumulated(mo.ema(0.9), 3, REST)
    guard = mo.guarded(tx)
    step, plain = jax.jit(guard.update), jax.jit(tx.update)
    state, expected = guard.init(PARAMS), tx.init(PARAMS)
    for g in spoilt:
        u, state = step(g, state, PARAMS)
        if np.isfinite(g["a"]).all():
            w, expected = plain(g, expected, PARAMS)
            assert_bit_equal(u, w)
    assert_bit_equal(state.inner, expected)
    assert state.skipped == 1


def test_masked_leaves_and_partitions_accumulate_apart():
    tx = optax.partition({"x": mo.accumulated(mo.heavy_ball(0.5), 2), "y": optax.identity()}, {"a": "x", "b": "y"})
    state = tx.init(LIKE)
    u0, state = tx.update(gradients(LIKE, 0), state, LIKE)
    u1, state = tx.update(gradients(LIKE, 1), state, LIKE)
    np.testing.assert_array_equal(u0["a"], jnp.zeros((2, 3)))
    mean = (np.float64(gradients(LIKE, 0)["a"]) + np.float64(gradients(LIKE, 1)["a"])) / 2
    np.testing.assert_allclose(u1["a"], mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(u1["b"], gradients(LIKE, 1)["b"])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("storage", ["float32", "bfloat16", pytest.param("int8", marks=pytest.mark.slow)])
def test_scan_resume_and_donation_give_the_same_codes_and_numbers(storage):
    tx = mo.accumulated(mo.heavy_ball(0.9), 3, REST, storage=STORAGES[storage]())
    signal = jax.tree.map(lambda *g: jnp.stack(g), *[gradients(LIKE, seed) for seed in range(8)])

    def step(carry, g):
        p, state = carry
        u, state = tx.update(g, state, p)
        return (optax.apply_updates(p, u), state), None

    def begin():
        return jax.tree.map(jnp.array, PARAMS), tx.init(PARAMS)

    whole = jax.jit(lambda c, s: jax.lax.scan(step, c, s)[0])(begin(), signal)
    compiled = jax.jit(lambda c, g: step(c, g)[0], donate_argnums=0)
    carry = begin()
    found = pointers(carry)
    assert len(set(found)) == len(found)
    for t in range(8):
        carry = compiled(carry, jax.tree.map(lambda x, t=t: x[t], signal))
        if t == 4:  # within a cycle: through NumPy and back
            carry = jax.tree.map(lambda x: jnp.array(np.asarray(x)), carry)
    assert compiled._cache_size() == 1
    # Of each program: 4 roundings in each of 8 micro-steps (decoding, decay, division by k, sum), and 4 in each of 2
    # updates (decay of weights, its sum, learning rate, step), none of numbers larger than their array's largest.
    assert_same_run(carry, whole, 2 * (8 * 4 + 2 * 4))


def test_decays_and_k_under_vmap_are_single_runs():
    decays, ks = jnp.array([0.5, 0.9, 0.5]), jnp.array([1, 2, 3])
    signal = jnp.asarray(SIGNAL[:12], jnp.float32)

    def run(decay, k):
        tx = mo.accumulated(mo.heavy_ball(decay), k, optax.scale(-1.0))
        return jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(signal[0]), signal)[1]

    together = jax.jit(jax.vmap(run))(decays, ks)
    for i in range(3):
        v, out = np.zeros(DIMENSION), np.zeros((12, DIMENSION))
        k = int(ks[i])
        for j in range(12 // k):
            v = float(decays[i]) * v + SIGNAL[j * k : j * k + k].mean(0)
            out[j * k + k - 1] = -v
        np.testing.assert_allclose(together[i], out, rtol=1e-5, atol=1e-6)


def sizes(tx, shape=(256, 256)):
    """Bytes per parameter of the state, and of what the compiled step holds at its peak beside the gradient."""

    def step(p, state, g):
        u, state = tx.update(g, state, p)
        return optax.apply_updates(p, u), state

    p = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(tx.init, p)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(p, state, p).compile().memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    n = shape[0] * shape[1]
    bytes_ = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return bytes_ / n, (held + memory.temp_size_in_bytes) / n - 4


@pytest.mark.parametrize("storage", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_state_is_smaller_by_four_bytes_per_parameter_and_the_peak_by_more(storage):
    rest = optax.scale_by_learning_rate(0.1)
    ours = sizes(mo.accumulated(mo.heavy_ball(0.9), 4, rest, storage=storage))
    momentum = mo.scale_by_momentum(mo.heavy_ball(0.9), storage=storage)
    theirs = sizes(optax.MultiSteps(optax.chain(momentum, rest), 4))
    assert theirs[0] - ours[0] == pytest.approx(4.0, abs=1e-3)
    assert theirs[1] - ours[1] > 7.9
    if storage == "float32":
        # Parameters and velocity, and nothing else.
        assert ours[1] == pytest.approx(8.0, abs=1e-2)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="every_k must be at least 1, got 0"):
        mo.accumulated(mo.ema(0.9), 0)
    with pytest.raises(TypeError, match=r"every_k must be a whole number, got 1\.5"):
        mo.accumulated(mo.ema(0.9), 1.5)
    with pytest.raises(TypeError, match="inner must be a transformation"):
        mo.accumulated(mo.ema(0.9), 2, 0.1)
    with pytest.raises(TypeError, match="rule must be a Filter"):
        mo.accumulated(0.9, 2)
    with pytest.raises(ValueError, match="storage must be one of"):
        mo.accumulated(mo.ema(0.9), 2, storage="int3")
    tx = mo.accumulated(mo.ema(0.9), 2)
    with pytest.raises(ValueError, match=r"the gradients lack params\['b'\]"):
        tx.update({"a": LIKE["a"]}, tx.init(LIKE))


def test_the_tables_of_the_documentation_are_those_of_the_committed_file():
    root = pathlib.Path(__file__).parents[2]
    page = (root / "docs" / "batches-and-rows.md").read_text()
    document = json.loads((root / "benchmarks" / "accumulation.json").read_text())
    rows = {(row["optimizer"], row["storage"]): row for row in document["rows"]}
    for storage in ("float32", "bfloat16", "int8"):
        ours, theirs = rows["accumulated", storage], rows["MultiSteps", storage]
        cells = [f"{ours[key]:.2f}, {theirs[key]:.2f}" for key in ("state", "peak", "moved_tpu")]
        assert f"| {storage} | {' | '.join(cells)} |" in page
        assert theirs["state"] - ours["state"] == pytest.approx(4, abs=1e-3)
    errors = {}
    for row in document["errors"]:
        errors.setdefault((row["storage"], row["decay"]), []).append(row["error"])
    for (storage, decay), found in errors.items():
        assert f"| {storage} | {decay} | {' | '.join(f'{x:.3f}' for x in found)} |" in page
        # About as the root of k: five roundings are no more than the root of five times one.
        assert 1.2 < found[2] / found[0] < 5**0.5 * 1.1
