"""One byte per velocity: without bias, without a stall, and with a stated outcome for every hard case."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compressed import opened

import momentum_optax as mo
from momentum_optax.storage.noise import mix

SHAPE = (8, 512)  # eight rows, each with its own scale
EIGHT = mo.storage.int8(min_size=1)
TEXT = " ".join(mo.storage.int8.__doc__.split())


# Levels in scales: squares of 5 to 97, the root; below it 27 that lie half an octave apart, in the bits of a float;
# above it 16 times as much for each code.
ROOT, JOIN = 97, (5 / 97) ** 2
BELOW = np.float32(5**2).view(np.int32) - 2**22 * np.arange(27, -1, -1, dtype=np.int32)
FOOT = np.array([0.0, *(np.float64(BELOW.view(np.float32)) / 97**2)])
TAIL = np.array([1.0, *(2 * 16.0 ** np.arange(7))])


def write(velocity, stamp, scale=None):
    """The parts of a velocity, written as the first one or at a given scale, a number or one for each row."""
    before = EIGHT.init(velocity, 1)
    shape = before.noise[0].shape
    before = before._replace(noise=(mix(jnp.arange(shape[0], dtype=jnp.uint32).reshape(shape) ^ mix(stamp)) | 1,))
    if scale is None:
        return EIGHT.encode((velocity,), before, mo.storage.EncodeContext(None, (1.0,)))
    before = before._replace(reach=(jnp.broadcast_to(jnp.asarray(scale, jnp.float32), shape),))
    nothing = (jnp.zeros_like(velocity), 0.0, True)
    return EIGHT.encode((velocity,), before, mo.storage.EncodeContext(None, (1.0,), nothing))


def over_stamps(velocity, count, scale=None):
    """The decoded velocity under each of `count` stamps, shape (count, ...)."""
    once = jax.jit(jax.vmap(lambda stamp: EIGHT.state_type.decode(write(velocity, stamp, scale))[0]))
    return np.asarray(once(np.arange(count, dtype=np.uint32)), np.float64)


def deviation_of(shares):
    """Of the rounding of values in scales: the root's by its steps, elsewhere between neighbours."""
    root = np.sqrt(shares * ROOT**2 / 3 + 0.03) / ROOT**2
    return np.where(shares < JOIN, between(FOOT, shares), np.where(shares <= 1, root, between(TAIL, shares)))


def between(levels, x):
    """The deviation of rounding `x` at random between the levels around it."""
    above = np.searchsorted(levels, x, side="right")
    low, high = levels[np.maximum(above, 1) - 1], levels[np.minimum(above, len(levels) - 1)]
    return np.sqrt(np.maximum((high - x) * (x - low), 0))


def decoded(parts):
    return np.asarray(EIGHT.state_type.decode(parts)[0], np.float64)


def run(rule, signal, storage=EIGHT):
    """The velocities after each gradient of `signal`, decoded."""
    tx = mo.scale_by_momentum(rule, storage=storage)

    def step(state, g):
        _, state = tx.update(g, state)
        return state, mo.velocity(state)[0]

    return jax.jit(lambda s: jax.lax.scan(step, s, signal))(tx.init(signal[0]))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("decade", range(-24, 31, 6))
def test_the_mean_over_the_noise_is_the_value(decade):
    # From 10^-7.5 of the scale up to it, and up to 100,000 times it.
    shares = np.concatenate([10.0 ** np.linspace(-7.5, 0, 400), 10.0 ** np.linspace(0.01, 5, 112)])
    exact = np.where(np.arange(512) % 2, -1, 1) * shares
    kept = over_stamps(jnp.asarray(exact[None] * 10.0**decade, jnp.float32), 10_000, 10.0**decade)[:, 0] / 10.0**decade
    deviation = deviation_of(shares)
    assert np.all(abs(kept.mean(0) - exact) <= 4 * deviation / 100 + 1e-6 * shares)
    # At the join the level is read with the root's noise.
    fine = (shares <= 1) & ((shares < FOOT[-2]) | (shares > JOIN))
    # Next to a level of the foot hardly any of the writes go to the other one.
    few = np.where(shares < JOIN, 0.02, 1e-6) * shares
    assert np.all(kept.std(0)[fine] <= 1.06 * deviation[fine] + few[fine])
    assert np.median(kept.std(0)[fine] / deviation[fine]) > 0.9, "the deviations above are tight"


@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.01, 0.1, 1.0])
def test_small_and_large_values_have_the_relative_errors_that_are_stated(share):
    # Absolute accuracy that a sum needs, and relative accuracy that a division by an element's own size needs.
    kept = over_stamps(jnp.full((1, 512), share), 200, 1.0)[:, 0] / np.float32(share)
    bound = {1e-5: 0.2, 1e-3: 0.2, 0.01: 0.06, 0.1: 0.02, 1.0: 0.006}[share]
    assert 0.15 * bound < np.sqrt(((kept - 1) ** 2).mean()) < bound


def test_values_a_little_above_the_smallest_float_are_kept_without_bias():
    # 40 to 400 times 1.2e-38; the row's scale does not fall with them, since its inverse must be a float.
    values = 10.0 ** np.linspace(-36.3, -35.3, 512)
    kept = over_stamps(jnp.asarray(values[None], jnp.float32), 4000, 5e-36)[:, 0] / values
    # And a few of the 4000 where a value is next to a level.
    assert np.all(abs(kept.mean(0) - 1) < 4.5 * kept.std(0) / np.sqrt(4000) + 4 * 0.5 / 4000)
    assert np.sqrt((kept**2).mean()) < 1.2


def test_the_largest_floats_are_finite_when_they_are_read():
    largest = np.finfo(np.float32).max
    values = jnp.asarray(np.where(np.arange(512) % 2, -1, 1) * np.linspace(0.1, 1, 512) * largest, jnp.float32)[None]
    kept = over_stamps(values, 100, 1e38)[:, 0]
    assert np.all(np.isfinite(kept))
    # The levels out there are 16 times apart.
    assert np.all(kept * np.sign(values[0]) >= np.abs(values[0]) / 16)


def test_the_noise_is_symmetric_in_the_sign():
    values = jnp.abs(normal(1, 512)) * 0.2
    plus, minus = over_stamps(values, 4000, 1.0), -over_stamps(-values, 4000, 1.0)
    spread = np.sqrt((plus.var(0) + minus.var(0)) / 4000)
    assert np.all(abs(plus.mean(0) - minus.mean(0)) < 4.5 * spread)
    np.testing.assert_allclose(plus.std(0), minus.std(0), rtol=0.1)


def test_zeros_stay_zeros_and_signs_stay_signs():
    values = normal(*SHAPE).at[:, ::3].set(0.0).at[2].set(0.0)
    for scale in (None, 4.0):
        kept = decoded(write(values, jnp.uint32(1), scale))
        assert not kept[np.asarray(values) == 0].any()
        assert np.all(kept * np.asarray(values) >= 0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("decay", "bound"), [(0.9, 0.03), (0.99, 0.08)])
def test_the_error_on_white_noise_is_within_the_stated_one(decay, bound):
    signal = normal(600, *SHAPE, seed=1)
    exact, kept = (np.asarray(run(mo.heavy_ball(decay), signal, s)[1])[300:] for s in ("float32", EIGHT))
    error = np.sqrt(((kept - exact) ** 2).mean() / (exact**2).mean())
    assert 0.2 * bound < error < bound


@pytest.mark.parametrize("decay", [0.999, 0.9999])
def test_a_slow_average_reaches_its_limit_with_the_noise_of_its_roundings(decay):
    tx = mo.scale_by_momentum(mo.ema(decay), storage=EIGHT)
    ones = jnp.ones((8, 512))
    state = jax.lax.fori_loop(0, round(6 / (1 - decay)), lambda _, s: tx.update(ones, s)[1], tx.init(ones))
    kept = np.asarray(mo.velocity(state)[0], np.float64)
    scale = np.asarray(state.velocity.scale[0], np.float64) * 97**2
    # 1.35 times the largest before, which two codes, that one and today's, tell to half a step each.
    np.testing.assert_allclose(scale[:, 0] / kept.max(1), 1.35, rtol=2 / 97 * np.sqrt(1.35))
    # A root rounded with a variance of 1/12 gives v one of v scale / (3 97^2), and a memory of 1 / (1 - decay^2) such
    # steps adds up. Over 4096 elements a variance of these is known to 1.414 / 64 and their tails, and the scale moves.
    variance = (scale * kept).mean() / (3 * 97**2) / (1 - decay**2)
    assert abs(kept.var() / variance - 1) < 0.2
    assert abs(kept.mean() - 1) < 4 * np.sqrt(variance) / 64


def relative_errors(signal, rule=None):
    """Of the velocity after each step, in norm, and the exact ones and those that were kept."""
    rule = mo.heavy_ball(0.9) if rule is None else rule
    exact, kept = (np.asarray(run(rule, signal, s)[1], np.float64) for s in ("float32", EIGHT))
    return np.linalg.norm(kept - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2)), exact, kept


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
def test_the_first_step_and_those_after_it_are_as_exact_as_stated_at_any_size(size):
    error, _, _ = relative_errors(normal(22, *SHAPE, seed=8) * size, mo.heavy_ball(0.5))
    assert "within 0.05" in TEXT
    assert error[0] < 0.05
    assert error[5:].mean() < 0.04


def test_a_converted_float32_velocity_needs_no_coarse_first_step():
    signal = normal(4, *SHAPE, seed=8)
    plain, eight = (mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s) for s in ("float32", EIGHT))
    _, state = plain.update(signal[0], plain.init(signal[0]))
    exact = mo.velocity(state)[0]
    state = mo.convert(state, EIGHT)
    assert np.linalg.norm(mo.velocity(state)[0] - exact) < 0.02 * np.linalg.norm(exact)
    _, state = eight.update(signal[1], state)
    exact = 0.9 * exact + signal[1]
    assert np.linalg.norm(mo.velocity(state)[0] - exact) < 0.04 * np.linalg.norm(exact)


def test_a_spike_a_million_times_larger_is_kept_and_forgotten_at_the_rules_own_pace():
    error, _, _ = relative_errors(normal(260, *SHAPE).at[40].multiply(1e6))
    assert error[40] < 0.08
    assert np.all(error[41:100] < 0.1)
    assert np.all(error[250:] < 0.05)


def test_one_huge_element_is_kept_and_costs_its_row_alone():
    signal = normal(100, *SHAPE, seed=5).at[:, 3, 100].set(1e6)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.9), signal, s)[1], np.float64)[60:] for s in ("float32", EIGHT))
    assert np.all(abs(kept[:, 3, 100] / exact[:, 3, 100] - 1) < 0.05)
    others = np.arange(8) != 3
    assert np.linalg.norm((kept - exact)[:, others]) < 0.03 * np.linalg.norm(exact[:, others])


def test_a_row_that_was_silent_for_a_thousand_steps_wakes_up():
    _, exact, kept = relative_errors(normal(1040, 4, 512, seed=2).at[1:1000, 1].set(0.0), mo.heavy_ball(0.5))
    error = np.linalg.norm((kept - exact)[1000:, 1], axis=1) / np.linalg.norm(exact[1000:, 1], axis=1)
    assert error[0] < 0.08
    assert np.all(error[12:] < 0.03)
    others = [0, 2, 3]
    assert np.linalg.norm((kept - exact)[900:, others]) < 0.03 * np.linalg.norm(exact[900:, others])


def test_what_the_window_does_not_see_is_rounded_coarsely_and_never_lost():
    # Nothing but the last element of each piece that the window has the first one of.
    value = jnp.zeros((64, 512)).at[:, 31::32].set(0.7)
    kept = decoded(write(value, jnp.uint32(3)))
    assert not kept[np.asarray(value) == 0].any()
    assert abs(kept[:, 31::32].mean() / 0.7 - 1) < 4 * 2 / np.sqrt(64 * 16)
    # Three writes later the scale is known.
    again = write(value, jnp.uint32(3))
    for _ in range(3):
        again = EIGHT.encode((value,), again, mo.storage.EncodeContext(None, (1.0,)))
    assert np.linalg.norm(decoded(again) - np.asarray(value)) < 0.1 * np.linalg.norm(value)


def test_a_first_step_of_which_nothing_is_seen_keeps_what_the_docstring_says():
    # One element in each row, beside the window.
    sizes = 10.0 ** jnp.array([-20.0, -10, -8, -6, 0, 6, 10, 30])
    value = jnp.zeros(SHAPE).at[:, 31].set(sizes)
    kept = over_stamps(value, 2000)[:, :, 31]
    least, largest = map(float, re.search(r"rounded as coarsely, between (\S+) and (\S+);", TEXT).groups())
    assert f"stored as zero or {least:.0e}".replace("e-0", "e-") in TEXT
    assert kept[kept > 0].min() == pytest.approx(least, rel=0.1)
    assert kept.max() == pytest.approx(largest, rel=0.1)


# The window of a row of 4096 is the first eight of each 256.
SEEN = np.arange(4096) % 256 < 8


def test_the_write_after_one_that_saw_nothing_knows_the_scale():
    value = jnp.where(SEEN, 0.0, normal(1, 4, 4096, seed=21)[0] * 1e-6)
    for entering in (value, 1.0, True), (value, 0.1, False):
        parts, context = EIGHT.init(value, 1), mo.storage.EncodeContext(None, (1.0,), entering)
        parts = EIGHT.numbered(parts, value)
        errors = []
        for _ in range(2):
            parts = EIGHT.encode((value,), parts, context)
            errors.append(float(np.linalg.norm(decoded(parts) - value) / np.linalg.norm(value)))
        assert errors[0] > 0.1
        assert errors[1] < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_leaf_whose_first_gradient_is_not_seen_is_exact_once_that_is_forgotten(name):
    signal = normal(12, 4, 4096, seed=22) * 1e-6
    signal = signal.at[0].set(jnp.where(SEEN, 0.0, signal[0]))
    adamw = mo.compress(optax.adamw(1.0), {"mu": EIGHT})
    tx, share = (mo.sgd(1.0, 0.9, storage=EIGHT), 1.0) if name == "sgd" else (adamw, 0.1)
    state, exact, step = tx.init(signal[0]), 0.0, jax.jit(tx.update)
    for g in signal:
        _, state = step(g, state, g)
        exact = 0.9 * exact + share * np.float64(g)
    (kept,) = mo.velocity(state) if name == "sgd" else (optax.tree.get(opened(state), "mu"),)
    assert np.linalg.norm(kept - exact) < 0.05 * np.linalg.norm(exact)


def test_rows_of_very_different_sizes_are_equally_exact():
    sizes = 10.0 ** (-1.5 * np.arange(8.0)[:, None])
    signal = normal(400, *SHAPE, seed=9) * jnp.asarray(sizes, jnp.float32)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.9), signal, s)[1], np.float64)[200:] for s in ("float32", EIGHT))
    error = np.linalg.norm(kept - exact, axis=(0, 2)) / np.linalg.norm(exact, axis=(0, 2))
    assert np.all(error < 0.03)


def test_bursts_that_return_find_their_scale_again():
    bursts = jnp.where(jnp.arange(400) % 4 == 0, 30.0, 1.0)[:, None, None]
    signal = normal(400, *SHAPE, seed=11) * bursts
    exact, kept = (np.asarray(run(mo.heavy_ball(0.1), signal, s)[1], np.float64) for s in ("float32", EIGHT))
    error = np.linalg.norm(kept - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert error[200::4].mean() < 0.03


def test_velocities_of_different_sizes_share_a_scale_times_their_gains():
    tx, exact = (mo.scale_by_momentum(mo.aggregated((0.5, 0.999)), storage=s) for s in (EIGHT, "float32"))
    signal = normal(400, *SHAPE, seed=12)

    def step(states, g):
        states = tuple(t.update(g, s)[1] for t, s in zip((tx, exact), states, strict=True))
        return states, [
            jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(*map(mo.velocity, states), strict=True)
        ]

    _, (fast, slow) = jax.jit(lambda s: jax.lax.scan(step, (tx.init(s[0]), exact.init(s[0])), s))(signal)
    # Without gains the scale would be that of the slow one, some twenty times the fast one's.
    assert fast[200:].mean() < 0.025
    assert slow[200:].mean() < 0.6


def test_the_sizes_that_are_assumed_lie_half_way_between_those_of_noise_and_of_a_constant():
    from momentum_optax.filters.step import relative_scales

    rng = np.random.default_rng(0)
    for slow in (0.9, 0.99, 0.999):
        decays, v = np.array([0.5, slow]), np.zeros(2)
        squares, steps = np.zeros(2), int(40 / (1 - slow))
        for g in rng.normal(size=steps):
            v = decays * v + g
            squares += v * v
        noise = np.sqrt(squares[1] / squares[0])
        constant = (1 - 0.5) / (1 - slow)
        assumed = np.divide(*relative_scales(mo.aggregated((0.5, slow)))[::-1])
        # Wherever between the two a signal is, no velocity's scale is off by more than about the root of their ratio.
        assert noise < assumed < constant
        assert max(assumed / noise, constant / assumed) < 1.3 * np.sqrt(constant / noise)


@pytest.mark.parametrize("decay", [0.5, 0.99995, 1.0, 1.2])
def test_a_velocity_that_alternates_is_as_large_as_one_that_does_not(decay):
    from momentum_optax.filters.step import relative_scales

    # Coupled velocities may have entries beyond 1 on the diagonal and forget all the same.
    plus, minus = (
        relative_scales(mo.Filter(((a, 1.0), (-1.19, -a)), (1.0, 1.0), (1.0, 1.0), 0.0)) for a in (decay, -decay)
    )
    np.testing.assert_array_equal(plus, minus)
    assert np.all(np.isfinite(plus))
    assert np.min(plus) > 0


def test_the_tail_ends_where_its_text_says():
    kept = decoded(write(jnp.full((1, 512), -1e12), jnp.uint32(1), 1.0))
    np.testing.assert_allclose(kept, -TAIL[-1], rtol=1e-6)
    assert f"{TAIL[-1]:.1e}" == "3.4e+07"
    assert "3.4e7 times its row's scale" in TEXT


def adam_directions(share):
    """Cosine to float32's direction in columns of that share of their row's gradients, and the longest steps."""
    rows = jnp.where(jnp.arange(512) % 2 == 0, 1.0, share)
    signal = (normal(60, *SHAPE, seed=3) + 0.1 * normal(*SHAPE, seed=4)) * rows

    def run(storage):
        tx = optax.adam(1.0) if storage is None else mo.compress(optax.adam(1.0), {"mu"}, storage)
        return np.asarray(jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(signal[0]), signal)[1])

    exact, kept = (run(storage)[20:, :, 1::2] for storage in (None, EIGHT))
    cosine = (exact * kept).sum() / np.sqrt((exact**2).sum() * (kept**2).sum())
    return cosine, abs(kept).max() / abs(exact).max()


@pytest.mark.parametrize("share", [1e-2, pytest.param(1e-4, marks=pytest.mark.slow), 1e-5])
def test_under_adam_columns_of_unlike_scale_keep_their_direction(share):
    cosine, longest = adam_directions(share)
    assert cosine > 0.85
    assert longest < 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_non_finite_gradient_restarts_its_element_and_touches_no_other(bad):
    signal = normal(30, *SHAPE, seed=4)
    clean, dirty = (np.asarray(run(mo.heavy_ball(0.9), s)[1]) for s in (signal, signal.at[5, 3, 100].set(bad)))
    assert dirty[5, 3, 100] == 0
    others = np.ones(SHAPE, bool)
    others[3] = False
    np.testing.assert_array_equal(dirty[:, others], clean[:, others])
    assert np.isfinite(dirty[5:]).all()
    assert np.linalg.norm(dirty[29, 3] - clean[29, 3]) < 0.2 * np.linalg.norm(clean[29, 3])


def test_a_row_that_went_to_zero_at_a_huge_scale_finds_its_own_again():
    # Finite to 1e30, then all of it infinite, so that nothing tells how large what enters next is beside the scale.
    factors = jnp.asarray([1, 1e10, 1e20, 1e30, jnp.inf, *[1.0] * 295], jnp.float32)
    signal = normal(*SHAPE, seed=6) * factors[:, None, None]
    velocity = np.asarray(run(mo.heavy_ball(0.9), signal)[1])
    assert not velocity[4:20].any()
    assert np.linalg.norm(velocity[-1] - 10 * signal[0]) < 0.05 * np.linalg.norm(10 * signal[0])


def test_small_complex_and_scalar_leaves_are_kept_in_full_and_the_rest_takes_a_byte():
    params = {
        "w": jnp.zeros((768, 2304)),
        "b": jnp.zeros(4095),
        "c": jnp.zeros((96, 64), jnp.complex64),
        "s": jnp.ones(()),
    }
    state = mo.scale_by_momentum(mo.heavy_ball(0.9), storage="int8").init(params)
    codes = state.velocity.codes[0]
    assert {k: str(x.dtype) for k, x in codes.items()} == {
        "w": "int8",
        "b": "float32",
        "c": "complex64",
        "s": "float32",
    }
    held = sum(part[0]["w"].nbytes for part in state.velocity)
    assert held / params["w"].size <= 1.03
    assert not np.any(mo.velocity(state)[0]["w"])
