"""The figures of `monitor`, each against NumPy in float64; what it leaves alone; and where `telemetry` finds it."""

import functools
import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import RULES, assert_bit_equal, gradients, own_jit

import momentum_optax as mo
from momentum_optax.wrappers.compress import flattened, is_kept, unpacked

LIKE = {"a": jnp.zeros((3, 40)), "b": jnp.zeros((4,), jnp.bfloat16)}
SIGNAL = [gradients(LIKE, seed) for seed in range(6)]
# Elements that no gradient ever reaches, which do not stall.
SIGNAL = [{**g, "a": g["a"].at[0, :9].set(0)} for g in SIGNAL]
BALL = mo.heavy_ball(0.9)
PLAIN = mo.monitor(mo.scale_by_momentum(BALL), BALL)
# Bytes for one leaf of the two, which is enough to compile.
STORAGES = {
    "float32": mo.storage.float32(),
    "bfloat16": mo.storage.bfloat16(),
    "int8": mo.storage.int8(min_size=8),
    "int4": mo.storage.int4(min_size=8),
}

# What int4 adds to int8 takes seconds to compile.
every_storage = pytest.mark.parametrize("storage", [*list(STORAGES)[:3], pytest.param("int4", marks=pytest.mark.slow)])

# Read in one compiled piece: operation by operation, compressed velocities take seconds.
velocity = jax.jit(mo.velocity)


def flat(tree):
    """All elements in float64 (complex128)."""
    return np.concatenate([np.ravel(np.asarray(x).astype(np.complex128)) for x in jax.tree.leaves(tree)])


def norm(x):
    return math.sqrt(np.sum(abs(x) ** 2))


def run(tx, signal=None, params=None):
    """For each step the state before, the gradients, the updates and the state after; compiled once."""
    state, step, out = tx.init(LIKE if params is None else params), own_jit(tx.update), []
    for g in SIGNAL if signal is None else signal:
        u, after = step(g, state, params)
        out.append((state, g, u, after))
        state = after
    assert step._cache_size() == 1
    return out


@functools.cache
def compiled(storage):
    """A monitored heavy ball: `init` and the compiled step."""
    tx = mo.monitor(mo.scale_by_momentum(BALL, storage=STORAGES[storage]), BALL)
    return tx.init, jax.jit(tx.update)


def check_figures(row, exact, k=0, suffix=""):
    """The measured figures of velocity `k`, where `exact(v, g)` is what the rule makes of it in float64."""
    before, g, u, after = row
    old, new = (velocity(state)[k] for state in (before, after))
    codes = [jax.tree.leaves(state.inner.velocity[0][k]) for state in (before, after)]
    v, d, g, u = flat(old), flat(new), flat(g), flat(u)
    x = exact(v, g)
    same = np.concatenate([np.ravel(np.asarray(a == b)) for a, b in zip(*codes, strict=True)])
    expected = {
        "gradient_norm": norm(g),
        "effective_learning_rate": norm(u) / norm(g),
        "velocity_norm": norm(d),
        "cosine": np.real(np.vdot(g, v)) / (norm(g) * norm(v)) if norm(v) else 0.0,
        "quantization_error": norm(d - x) / norm(x),
        "stalled": np.mean(same & (x != v)),
    }
    got = mo.telemetry(after)
    for figure, value in expected.items():
        key = figure if figure in ("gradient_norm", "effective_learning_rate") else figure + suffix
        # Sums of float32 products; a cosine near 0 is a small difference of large sums.
        np.testing.assert_allclose(got[key], value, rtol=2e-5, atol=1e-6, err_msg=figure)
    return got


@every_storage
def test_figures_are_their_formulas_for_every_storage(storage):
    init, step = compiled(storage)
    state, seen = init(LIKE), []
    for g in SIGNAL:
        u, after = step(g, state)
        seen.append(check_figures((state, g, u, after), lambda v, g: 0.9 * v + g))
        state = after
    assert step._cache_size() == 1
    errors, stalled = ([row[name] for row in seen[2:]] for name in ("quantization_error", "stalled"))
    if storage == "float32":
        assert errors == [0.0] * 4
        assert stalled == [0.0] * 4
    else:
        # From the storages' own bounds for one rounding; int4's error is 0.4 on white noise.
        low, high = {"bfloat16": (1e-3, 2**-7), "int8": (1e-3, 0.1), "int4": (0.05, 1.0)}[storage]
        assert all(low < x < high for x in errors)
        assert any(x > 0 for x in stalled)


@every_storage
def test_updates_and_velocities_are_those_without_a_monitor_to_the_bit(storage):
    tx = mo.scale_by_momentum(BALL, storage=STORAGES[storage])
    seldom = mo.monitor(tx, every=2)
    runs = [(tx.init(LIKE), jax.jit(tx.update)), (seldom.init(LIKE), jax.jit(seldom.update))]
    # Bytes take long to compile.
    runs = [*runs[: 1 if storage in ("int8", "int4") else 2], (compiled(storage)[0](LIKE), compiled(storage)[1])]
    for g in SIGNAL:
        out, states = zip(*(step(g, state) for state, step in runs), strict=True)
        for u, state in zip(out[1:], states[1:], strict=True):
            assert_bit_equal(u, out[0])
            assert_bit_equal(state.inner, states[0])
        runs = [(state, step) for state, (_, step) in zip(states, runs, strict=True)]


@pytest.mark.parametrize("every", [1, 2])
def test_no_way_from_the_gradients_to_the_updates_leads_around_the_barrier(every):
    # XLA shares and fuses what is computed twice: measuring would change how the step is rounded, on one backend or
    # another. The updates and velocities come of what has passed a barrier together with the figures.
    tx = mo.monitor(mo.scale_by_momentum(BALL), every=every)

    def step(g, state):
        u, after = tx.update(g, state)
        return u, after.inner

    jaxpr = jax.make_jaxpr(step)(SIGNAL[0], tx.init(LIKE)).jaxpr
    needed = set(jaxpr.outvars)
    for equation in reversed(jaxpr.eqns):
        if needed & set(equation.outvars):
            needed -= set(equation.outvars)
            if equation.primitive.name != "optimization_barrier":
                needed |= {x for x in equation.invars if not hasattr(x, "val")}
    assert not needed & set(jaxpr.invars)


def test_a_slow_average_rounded_to_nearest_is_seen_to_stall():
    rule = mo.ema(0.999)
    tx = mo.monitor(mo.scale_by_momentum(rule, storage=mo.storage.bfloat16("nearest")))
    signal = [jax.tree.map(jnp.ones_like, LIKE)] * 80
    rows = run(tx, signal)
    got = [check_figures(row, lambda v, g: 0.999 * v + 0.001 * g)["stalled"] for row in rows[::8]]
    assert got[0] == 0
    # From about 1/16 on a step of 0.001 is below half a unit in the last place, which is 2^-13 per 1/32.
    stalled = [mo.telemetry(after)["stalled"] for *_, after in run(tx, signal * 10)]
    assert stalled[-1] == 1.0


def test_each_of_several_velocities_has_its_own_figures():
    decays = (0.0, 0.9, 0.99)
    rule = mo.aggregated(decays)
    rows = run(mo.monitor(mo.scale_by_momentum(rule, storage="bfloat16"), rule))
    for t, row in enumerate(rows):
        for k, decay in enumerate(decays[1:]):
            got = check_figures(row, lambda v, g, b=decay: b * v + g, k, f"/{k}")
            weights = decay ** np.arange(t + 1.0)
            np.testing.assert_allclose(got[f"age/{k}"], weights @ np.arange(t + 1.0) / weights.sum(), rtol=1e-5)


def test_gain_mean_lag_and_age_of_the_heavy_ball_and_of_fista():
    ball, fista = [], []
    schedule = mo.nesterov(mo.schedules.fista())
    for _, _, _, after in run(PLAIN):
        ball.append(mo.telemetry(after))
    for _, _, _, after in run(mo.monitor(mo.scale_by_momentum(schedule), schedule)):
        fista.append(mo.telemetry(after))
    # Beck and Teboulle's two sequences for a unit gradient at each step s; the move of y at step t is a weight.
    n, t_k = len(SIGNAL), 1.0
    x = y = np.zeros(n)
    for t in range(n):
        weights = 0.9 ** np.arange(t + 1.0)
        lag = weights @ np.arange(t + 1.0) / weights.sum()
        for name, value in (("gain", weights.sum()), ("mean_lag", lag), ("age", lag)):
            np.testing.assert_allclose(ball[t][name], value, rtol=1e-6)
        t_next = (1 + math.sqrt(1 + 4 * t_k**2)) / 2
        new = y - np.eye(n)[t]
        ahead = new + (t_k - 1) / t_next * (new - x)
        h, x, y, t_k = y - ahead, new, ahead, t_next
        np.testing.assert_allclose(fista[t]["gain"], h.sum(), rtol=1e-5)
        np.testing.assert_allclose(fista[t]["mean_lag"], h @ (t - np.arange(n)) / h.sum(), rtol=1e-5, atol=1e-6)


# Two velocities, coefficients of ages, and of the step.
SOME = ("adan_mix", "heavy_ball", "nadam_mix")


@pytest.mark.parametrize("names", [SOME, pytest.param(RULES, marks=pytest.mark.slow)], ids=["some rules", "every rule"])
def test_gain_and_mean_lag_are_sums_over_impulse_responses(names):
    rules = {name: RULES[name]() for name in names}
    txs = {name: mo.monitor(mo.scale_by_momentum(rule), rule, every=4) for name, rule in rules.items()}

    def step(states, g):
        states = {name: tx.update(g, states[name])[1] for name, tx in txs.items()}
        return states, {name: mo.telemetry(state) for name, state in states.items()}

    n = 9
    states = {name: tx.init(jnp.zeros(())) for name, tx in txs.items()}
    _, got = jax.jit(lambda s: jax.lax.scan(step, s, jnp.ones(n)))(states)
    ages = np.subtract.outer(np.arange(n), np.arange(n))
    for name, rule in rules.items():
        h = rule.response(np.eye(n))  # of step t to a gradient at step s
        scale = abs(h).sum(axis=1)
        gain, moment = h.sum(axis=1), (h * np.maximum(ages, 0)).sum(axis=1)
        np.testing.assert_allclose(got[name]["gain"], gain, rtol=0, atol=2e-6 * scale.max(), err_msg=name)
        lag = got[name]["mean_lag"] * gain
        np.testing.assert_allclose(lag, moment, rtol=0, atol=2e-5 * n * scale.max(), err_msg=name)


def test_in_the_long_run_they_are_those_of_the_analysis():
    rule = mo.nesterov(0.8)
    tx = mo.monitor(mo.sgd(0.05, rule), rule, every=199)
    step, start = (lambda state, g: (tx.update(g, state)[1], None)), tx.init(0.0)
    got = mo.telemetry(jax.jit(lambda: jax.lax.scan(step, start, jnp.ones(200))[0])())
    assert got["gain"] == pytest.approx(mo.analysis.dc_gain(rule), rel=1e-5)
    assert got["mean_lag"] == pytest.approx(mo.analysis.mean_lag(rule), rel=1e-5)
    assert got["effective_learning_rate"] == pytest.approx(mo.analysis.effective_learning_rate(rule, 0.05), rel=1e-5)
    assert got["cosine"] == pytest.approx(1.0)


def test_debiased_updates_have_unit_gain_and_the_same_lag():
    rule = mo.ema(0.9)
    (*_, first), *_, (*_, last) = run(mo.monitor(mo.scale_by_momentum(rule, debias=True), rule))
    assert mo.telemetry(first)["gain"] == mo.telemetry(last)["gain"] == 1
    assert mo.telemetry(last)["mean_lag"] == pytest.approx(np.average(np.arange(6), weights=0.9 ** np.arange(6)))


def test_the_memory_begins_anew_after_a_restart():
    tx = mo.monitor(mo.adaptive_restart(BALL), BALL)
    turned = [jax.tree.map(jnp.negative, g) for g in SIGNAL[:1]]
    rows = run(tx, [SIGNAL[0], SIGNAL[0], *(3 * turned), SIGNAL[1]])
    ages = [mo.telemetry(after)["age"] for *_, after in rows]
    restarts = [int(after.inner.restarts) for *_, after in rows]
    # v = 1, 1.9, 0.71, -0.36: the third gradient meets a velocity along it, and the velocity is dropped.
    assert restarts == [0, 0, 1, 1, 1, 1]
    for age, since in zip(ages, (1, 2, 3, 1, 2, 3), strict=True):
        assert age == pytest.approx(np.average(np.arange(since), weights=0.9 ** np.arange(since)), abs=1e-6)


def test_after_a_restart_a_schedule_begins_anew_as_that_of_the_rule_does():
    rule = mo.nesterov(mo.schedules.fista())
    g = SIGNAL[0]
    rows = run(mo.monitor(mo.adaptive_restart(rule), rule), [g, g, jax.tree.map(lambda x: -3 * x, g), g, g, g, g])
    restarts = [int(after.inner.restarts) for *_, after in rows]
    begin = restarts.index(1) + 1
    assert restarts[begin:] == [1] * 3, "the steps up to here, and no other, belong to the first run"
    gains = [mo.telemetry(after)["gain"] for *_, after in rows]
    np.testing.assert_allclose(gains[:begin], rule.response(np.ones(begin)), rtol=1e-6)
    np.testing.assert_allclose(gains[begin:], rule.response(np.ones(3)), rtol=1e-6)


def test_only_each_nth_step_is_measured_and_the_figures_are_kept_between():
    every = [after.figures for *_, after in run(PLAIN)]
    rows = run(mo.monitor(mo.scale_by_momentum(BALL), BALL, every=3))
    for t, (*_, after) in enumerate(rows):
        pairs = zip(jax.tree.leaves(after.figures), jax.tree.leaves(every[t - t % 3]), strict=True)
        assert all(np.allclose(a, b, rtol=1e-6, atol=0) for a, b in pairs)
        assert_bit_equal(after.figures, rows[t - t % 3][-1].figures)
        assert after.step == t + 1
    memories = [row[-1].memory for row in rows]
    assert len({float(memory.gain) for memory in memories}) == len(SIGNAL)


def test_figures_are_of_the_leaves_that_have_a_gradient():
    (*_, state), *_ = run(PLAIN, SIGNAL[:1])
    step, g = jax.jit(PLAIN.update), {**SIGNAL[1], "a": None}
    u, after = step(g, state)
    assert u["a"] is None
    got, v = mo.telemetry(after), flat(SIGNAL[0]["b"])
    new = 0.9 * v + flat(g["b"])
    assert got["gradient_norm"] == pytest.approx(norm(flat(g["b"])))
    assert got["velocity_norm"] == pytest.approx(norm(new), rel=1e-6)
    assert got["cosine"] == pytest.approx(np.vdot(v, flat(g["b"])).real / norm(v) / norm(flat(g["b"])), rel=1e-5)
    nothing = dict.fromkeys(LIKE)
    assert_bit_equal(step(nothing, after)[1], after._replace(step=after.step + 1))


def test_masked_leaves_count_for_the_gradient_and_not_for_the_velocity():
    tx = mo.monitor(optax.masked(mo.scale_by_momentum(BALL), {"a": True, "b": False}), BALL)
    (_, _, _, state), (_, g, u, after), *_ = run(tx)
    got, v = mo.telemetry(after), flat(velocity(state)[0])
    assert got["gradient_norm"] == pytest.approx(norm(flat(g)), rel=1e-5)
    assert got["effective_learning_rate"] == pytest.approx(norm(flat(u)) / norm(flat(g)), rel=1e-5)
    assert got["cosine"] == pytest.approx(np.vdot(v, flat(g["a"])).real / norm(v) / norm(flat(g["a"])), abs=1e-6)
    assert got["bytes"] == 4 * LIKE["a"].size
    assert got["bytes_per_parameter"] == 4


def test_rules_for_different_leaves_have_figures_of_their_own():
    of = {"x": mo.scale_by_momentum(BALL), "y": mo.scale_by_momentum(mo.ema(0.5))}
    (_, _, _, state), (_, g, _, after), *_ = run(mo.monitor(optax.partition(of, {"a": "y", "b": "x"})))
    got, trees = mo.telemetry(after), velocity(state)
    for k, tree in enumerate(trees):
        (leaf,) = ("a", "b")[1 - k]
        v, own = flat(tree), flat(g[leaf])
        new = 0.9 * v + own if leaf == "b" else 0.5 * v + 0.5 * own
        assert got[f"velocity_norm/{k}"] == pytest.approx(norm(new), rel=1e-5)
        assert got[f"cosine/{k}"] == pytest.approx(np.vdot(v, own).real / norm(v) / norm(own), rel=1e-5)
    assert got["bytes_per_parameter"] == 4


def test_a_bad_gradient_spoils_the_figures_of_its_step_alone():
    bad = {**SIGNAL[1], "b": SIGNAL[1]["b"].at[0].set(jnp.nan)}
    guarded = run(mo.guarded(PLAIN), [SIGNAL[0], bad])
    assert_bit_equal(guarded[1][0].inner, guarded[1][-1].inner)
    init, step = compiled("int8")
    state, seen = init(LIKE), []
    for g in (SIGNAL[0], bad, SIGNAL[2], SIGNAL[3]):
        _, state = step(g, state)
        seen.append(mo.telemetry(state))
    assert math.isnan(seen[1]["gradient_norm"])
    # "b" is too small for bytes, so that its velocity stays bad; the gradients are not, and nor is the memory.
    assert seen[3]["gradient_norm"] == pytest.approx(norm(flat(SIGNAL[3])), rel=1e-5)
    assert seen[3]["gain"] == pytest.approx(3.439)


def test_the_fields_of_compress_have_figures_by_name():
    keep = {"mu": "bfloat16", "nu": mo.storage.uint8(min_size=8)}
    tx = mo.monitor(mo.compress(optax.adam(1e-3, b1=0.9, b2=0.99), keep))
    read = jax.jit(lambda state: [unpacked(x) for _, x in flattened(state, is_kept)[0] if is_kept(x)])
    # Of float32 alone: for half-precision parameters Adam's own arithmetic rounds besides.
    for before, gradient, update, after in run(tx, [{"a": g["a"]} for g in SIGNAL[:4]], {"a": LIKE["a"]}):
        got, g = mo.telemetry(after), flat(gradient)
        np.testing.assert_allclose(got["effective_learning_rate"], norm(flat(update)) / norm(g), rtol=1e-5)
        for name, old, new in zip(keep, read(before), read(after), strict=True):
            v, d = flat(old), flat(new)
            x = 0.9 * v + 0.1 * g if name == "mu" else 0.99 * v + 0.01 * g**2
            np.testing.assert_allclose(got[f"velocity_norm/{name}"], norm(d), rtol=1e-5)
            np.testing.assert_allclose(got[f"quantization_error/{name}"], norm(d - x) / norm(x), rtol=1e-3)
            assert got[f"quantization_error/{name}"] > 1e-3
    assert {name for name in got if "/" in name} == {
        f"{figure}/{field}" for figure in ("velocity_norm", "cosine", "quantization_error", "stalled") for field in keep
    }


def test_complex_velocities_are_measured_by_their_modulus():
    like = jnp.zeros((5,), jnp.complex64)
    rows = run(mo.monitor(mo.scale_by_momentum(BALL), BALL), [gradients(like, i) for i in range(3)], like)
    for row in rows:
        assert check_figures(row, lambda v, g: 0.9 * v + g)["velocity_norm"] > 0


def test_sums_of_many_equal_terms_do_not_stop_short():
    like = jnp.zeros(2**24 + 2**20 + 3)  # a float32 that counts by ones stops at 2^24
    _, state = jax.jit(PLAIN.update)(jnp.ones_like(like), PLAIN.init(like))
    assert mo.telemetry(state)["gradient_norm"] == pytest.approx(math.sqrt(like.size), rel=1e-6)


def test_telemetry_is_found_in_any_state_and_under_a_transformation():
    def optimizer(rate):
        tx = mo.monitor(mo.scale_by_momentum(BALL, storage="bfloat16"))
        return optax.chain(optax.clip_by_global_norm(1.0), tx, optax.scale_by_learning_rate(rate))

    tx = optax.inject_hyperparams(optimizer)(rate=0.1)
    (*_, after), *_ = run(tx, SIGNAL[:1])
    got = mo.telemetry(after)
    assert got["gradient_norm"] == pytest.approx(1.0, rel=1e-2)
    assert all(type(x) is float for x in got.values())
    assert set(got) == {
        *("gradient_norm", "effective_learning_rate", "velocity_norm", "cosine", "quantization_error", "stalled"),
        *("bytes", "bytes_per_parameter"),
    }
    traced = jax.jit(mo.telemetry)(after)
    assert {name: float(x) for name, x in traced.items()} == pytest.approx(got)
    both = mo.telemetry((after, after))
    assert both["1/cosine"] == got["cosine"]
    assert len(both) == 2 * len(got)
    with pytest.raises(ValueError, match="opt_state must hold a state of monitor"):
        mo.telemetry(optax.adam(0.1).init(LIKE))


def test_batched_runs_have_batched_figures():
    batch = jnp.stack([g["a"] for g in SIGNAL[:3]])
    tx = mo.monitor(mo.scale_by_momentum(BALL), BALL, every=2)
    state = jax.vmap(tx.init)(batch)
    for _ in range(3):
        _, state = jax.jit(jax.vmap(tx.update))(batch, state)
    got = mo.telemetry(state)
    np.testing.assert_allclose(got["velocity_norm"], [2.71 * norm(flat(g["a"])) for g in SIGNAL[:3]], rtol=1e-5)
    np.testing.assert_allclose(got["cosine"], np.ones(3), rtol=1e-6)
    np.testing.assert_allclose(got["mean_lag"], [(0.9 + 1.62) / 2.71] * 3, rtol=1e-6)


def test_bytes_are_counted():
    like = {"a": jnp.zeros((8, 512)), "b": jnp.zeros(4)}
    tx = mo.monitor(mo.scale_by_momentum(BALL, storage=mo.storage.int8(min_size=8)))
    # Codes; scale and reach by row; gain, first, margin and stamp; the values of "b", and its parts; a step.
    expected = 8 * 512 + 8 * 8 + 4 * 4 + 4 * 4 + 6 * 4 + 4
    got = mo.telemetry(tx.init(like))
    assert got["bytes"] == expected
    assert got["bytes_per_parameter"] == expected / (8 * 512 + 4)
    nibbles = mo.monitor(mo.scale_by_momentum(BALL, storage=mo.storage.int4(min_size=8)))
    assert mo.telemetry(nibbles.init({"a": like["a"]}))["bytes"] == 8 * 512 / 2 + 8 * 8 + 3 * 4 + 4


def test_a_loss_is_differentiated_through_a_monitored_step():
    def loss(rate, tx):
        u, state = tx.update(jnp.arange(3.0) * rate, tx.init(jnp.zeros(3)))
        u, _ = tx.update(jnp.arange(3.0), state)
        return jnp.sum(u * u)

    slopes = [jax.jit(jax.grad(lambda rate, tx=tx: loss(rate, tx)))(2.0) for tx in (mo.scale_by_momentum(BALL), PLAIN)]
    # The derivative of 5 (0.9 rate + 1)^2.
    np.testing.assert_allclose(slopes, 25.2, rtol=1e-6)


def test_what_cannot_be_monitored_is_refused():
    with pytest.raises(TypeError, match=r"tx must be a transformation with init and update, got 0\.9"):
        mo.monitor(0.9)
    with pytest.raises(TypeError, match=r"rule must be a Filter .* or None, got 'ema'"):
        mo.monitor(mo.scale_by_momentum(BALL), "ema")
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        mo.monitor(mo.scale_by_momentum(BALL), every=0)
    with pytest.raises(ValueError, match="tx must hold a state of scale_by_momentum or compress"):
        mo.monitor(optax.adam(0.1)).init(LIKE)
    with pytest.raises(ValueError, match=r"rule must be that of .* got order 2 for states with \[1\] velocities"):
        mo.monitor(mo.scale_by_momentum(BALL), mo.aggregated()).init(LIKE)
    twice = optax.chain(mo.scale_by_momentum(BALL), mo.scale_by_momentum(BALL))
    with pytest.raises(ValueError, match=r"the only scale_by_momentum in tx, got order 1 for states with \[1, 1\]"):
        mo.monitor(twice, BALL).init(LIKE)
    with pytest.raises(ValueError, match="velocities in trees like the parameters"):
        mo.monitor(optax.flatten(mo.scale_by_momentum(BALL))).init(LIKE)
    tx = mo.monitor(mo.scale_by_momentum(BALL, storage=AlwaysBytes(min_size=1)))
    with pytest.raises(ValueError, match="the storage must keep velocities in full"):
        jax.eval_shape(tx.update, LIKE, jax.eval_shape(tx.init, LIKE))


class AlwaysBytes(type(mo.storage.int8())):
    """A storage of one's own that breaks law 7."""

    def encode(self, velocities, previous, write):
        return super().encode(velocities, self.init(velocities[0], len(velocities)), write)


# Counts of the compiled step: alone, measured at every tenth step, and at every step.
COUNTS = """
import json, math
from benchmarks import _moved_bytes
import momentum_optax as mo
rule, found, device = mo.nesterov(0.9), {}, _moved_bytes.target("tpu")
for storage in ("float32", "int8"):
    alone = mo.sgd(0.1, rule, storage=storage)
    for every, tx in ((0, alone), (10, mo.monitor(alone, rule, every=10)), (1, mo.monitor(alone, rule))):
        program = _moved_bytes.compiled(tx, _moved_bytes.LARGE, device)
        found[f"{storage} {every}"] = _moved_bytes.count(program, math.prod(_moved_bytes.LARGE))._asdict()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not made for this platform")
def test_on_tpu_a_step_that_is_not_measured_moves_no_more_and_a_measured_one_eight_bytes():
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", COUNTS], cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for storage, floor in (("float32", 20), ("int8", 14)):
        alone, tenth, each = (found[f"{storage} {every}"] for every in (0, 10, 1))
        assert alone["bytes"] == pytest.approx(floor, abs=0.01)
        assert tenth["bytes"] == pytest.approx(floor, abs=0.01)
        assert each["bytes"] == pytest.approx(floor + 8, abs=0.02)
        # Scales, and rows of partial sums.
        assert max(tenth["temporaries"], each["temporaries"]) < 0.03
