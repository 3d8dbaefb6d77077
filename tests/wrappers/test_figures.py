"""The figures of `monitor` against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, gradients
from monitored import BALL, LIKE, PLAIN, SIGNAL, check_figures, compiled, every_storage, flat, norm, run, velocity

import momentum_optax as mo
from momentum_optax._tree import flatten_with_path
from momentum_optax.wrappers.fields import decompress_field, is_compressed


@pytest.mark.one_in(2)
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
    read = jax.jit(
        lambda state: [decompress_field(x) for _, x in flatten_with_path(state, is_compressed)[0] if is_compressed(x)]
    )
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
