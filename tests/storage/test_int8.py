"""One byte per velocity: without bias, without a stall, and with a stated outcome for every hard case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo

SHAPE = (8, 512)  # eight rows, each with its own scale
EIGHT = mo.storage.int8(min_size=1)
TEXT = " ".join(mo.storage.int8.__doc__.split())


# Of the tail in scales, and of a first step in numbers: written out in float64.
TAIL = (1 + (4.0 ** np.arange(10) - 1) / 64) ** 2
FIRST = 2.0**-126 * 4.0 ** np.arange(127)


def write(velocity, stamp, scale=None):
    """The parts of a velocity, written as the first one or at a given scale, a number or one for each row."""
    before = EIGHT.init(velocity, 1)
    if scale is not None:
        reach = jnp.broadcast_to(jnp.asarray(scale, jnp.float32), before.reach[0].shape)
        before = before._replace(reach=(reach,), margin=(jnp.ones((1,) * velocity.ndim),))
    return EIGHT.encode((velocity,), before, mo.storage.EncodeContext(stamp, (1.0,)))


def over_stamps(velocity, count, scale=None):
    """The decoded velocity under each of `count` stamps, shape (count, ...)."""
    once = jax.jit(jax.vmap(lambda stamp: EIGHT.state_type.decode(write(velocity, stamp, scale))[0]))
    return np.asarray(once(np.arange(count, dtype=np.uint32)), np.float64)


def between(levels, x):
    """The deviation of rounding `x` at random between the levels around it."""
    above = np.searchsorted(levels, x, side="right")
    low, high = levels[above - 1], levels[np.minimum(above, len(levels) - 1)]
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


@pytest.mark.one_in(4)
@pytest.mark.parametrize("decade", range(-24, 31, 6))
def test_the_mean_over_the_noise_is_the_value(decade):
    # From a millionth of the scale up to it, and up to 100,000 times it.
    shares = np.concatenate([10.0 ** np.linspace(-6, 0, 400), 10.0 ** np.linspace(0.01, 5, 112)])
    exact = np.where(np.arange(512) % 2, -1, 1) * shares
    kept = over_stamps(jnp.asarray(exact[None] * 10.0**decade, jnp.float32), 10_000, 10.0**decade)[:, 0] / 10.0**decade
    y = 118 * np.sqrt(shares)
    cell = np.sqrt(np.where(y < 1, 4 * y**3 / 3 - y**4, y**2 / 3 + 0.03)) / 118**2
    deviation = np.where(shares <= 1, cell, between(TAIL, shares))
    assert np.all(abs(kept.mean(0) - exact) <= 4 * deviation / 100 + 1e-6 * shares)
    body = shares <= 1
    assert np.all(kept.std(0)[body] <= 1.06 * deviation[body] + 1e-6)
    assert np.median(kept.std(0)[body] / deviation[body]) > 0.9, "the deviations above are tight"


def test_values_a_little_above_the_smallest_float_are_kept_without_bias():
    # 40 to 400 times 1.2e-38; the row's scale does not fall with them, since its inverse must be a float.
    values = 10.0 ** np.linspace(-36.3, -35.3, 512)
    kept = over_stamps(jnp.asarray(values[None], jnp.float32), 4000, 5e-36)[:, 0] / values
    assert np.all(abs(kept.mean(0) - 1) < 4.5 * kept.std(0) / np.sqrt(4000) + 1e-6)
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


@pytest.mark.parametrize(("decay", "bound"), [(0.9, 0.03), (0.99, 0.08)])
def test_the_error_on_white_noise_is_within_the_stated_one(decay, bound):
    signal = normal(600, *SHAPE, seed=1)
    exact, kept = (np.asarray(run(mo.heavy_ball(decay), signal, s)[1])[300:] for s in ("float32", EIGHT))
    error = np.sqrt(((kept - exact) ** 2).mean() / (exact**2).mean())
    assert 0.2 * bound < error < bound


def test_a_slow_average_reaches_its_limit():
    tx = mo.scale_by_momentum(mo.ema(0.9999), storage=EIGHT)
    ones = jnp.ones((8, 512))
    state = jax.lax.fori_loop(0, 60_000, lambda _, s: tx.update(ones, s)[1], tx.init(ones))
    # The noise of one element is about 0.3 here; that of the mean a 64th of it.
    assert float(mo.velocity(state)[0].mean()) == pytest.approx(1, abs=0.02)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-3, 1.0, 1e3, 1e12, 1e30])
def test_the_first_step_is_coarse_but_without_bias_at_any_size(size):
    values = normal(1, 512) * size
    assert "between half of it and all of it" in TEXT
    kept = over_stamps(values, 10_000)[:, 0] / size
    exact = np.asarray(values, np.float64)[0] / size
    deviation = between(FIRST / size, abs(exact))
    assert np.all(abs(kept.mean(0) - exact) <= 4.5 * deviation / 100 + 1e-5 * abs(exact))
    assert np.sqrt(((kept - exact) ** 2).mean() / (exact**2).mean()) < 1.1


def test_after_its_coarse_first_step_a_leaf_is_as_exact_as_any():
    signal = normal(60, *SHAPE, seed=8)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.5), signal, s)[1], np.float64) for s in ("float32", EIGHT))
    error = np.linalg.norm(kept - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    # The first error halves at every step, as the first gradient does.
    assert 0.2 < error[0] < 1
    assert np.all(error[1:12] < error[0] * 0.5 ** np.arange(1, 12) + 0.03)
    assert np.all(error[12:] < 0.03)


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


def test_a_spike_a_million_times_larger_is_rounded_coarsely_once_and_forgotten_at_the_rules_own_pace():
    signal = normal(260, *SHAPE).at[40].multiply(1e6)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.9), signal, s)[1], np.float64) for s in ("float32", EIGHT))
    size, error = (np.linalg.norm(x, axis=(1, 2)) for x in (exact, kept - exact))
    assert "about its own size for that step, in norm" in TEXT
    assert error[40] < 2 * size[40]
    assert abs((kept[40] * exact[40]).sum() / size[40] ** 2 - 1) < 0.2, "on average it is the spike"
    # Like every error it goes as its own velocity goes.
    assert np.all(error[41:140] < 1.1 * error[40] * 0.9 ** np.arange(1, 100) + 0.1 * size[41:140])
    assert np.all(error[250:] < 0.05 * size[250:])


def test_one_huge_element_is_kept_and_costs_its_row_alone():
    signal = normal(100, *SHAPE, seed=5).at[:, 3, 100].set(1e6)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.9), signal, s)[1], np.float64)[60:] for s in ("float32", EIGHT))
    assert np.all(abs(kept[:, 3, 100] / exact[:, 3, 100] - 1) < 0.05)
    others = np.arange(8) != 3
    assert np.linalg.norm((kept - exact)[:, others]) < 0.03 * np.linalg.norm(exact[:, others])


def test_a_row_that_was_silent_for_a_thousand_steps_wakes_up():
    signal = normal(1040, 4, 512, seed=2).at[1:1000, 1].set(0.0)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.5), signal, s)[1], np.float64) for s in ("float32", EIGHT))
    # What is left is the finest noise of a scale that never falls below 2^-24 of the leaf's largest.
    assert abs(kept[999, 1]).max() < 1e-6
    wake = (kept[1000, 1] * exact[1000, 1]).sum() / (exact[1000, 1] ** 2).sum()
    assert abs(wake - 1) < 0.25, "coarse, but on average the gradient"
    error = np.linalg.norm((kept - exact)[1000:, 1], axis=1) / np.linalg.norm(exact[1000:, 1], axis=1)
    assert error[0] < 2
    assert np.all(error[12:] < 0.03)
    others = [0, 2, 3]
    assert np.linalg.norm((kept - exact)[900:, others]) < 0.03 * np.linalg.norm(exact[900:, others])


def test_rows_of_very_different_sizes_are_equally_exact():
    sizes = 10.0 ** (-1.5 * np.arange(8.0)[:, None])
    signal = normal(400, *SHAPE, seed=9) * jnp.asarray(sizes, jnp.float32)
    exact, kept = (np.asarray(run(mo.heavy_ball(0.9), signal, s)[1], np.float64)[200:] for s in ("float32", EIGHT))
    error = np.linalg.norm(kept - exact, axis=(0, 2)) / np.linalg.norm(exact, axis=(0, 2))
    # Down to 2^-24 of the largest; below, the scale stays where it is and the error grows with the root of the ratio.
    assert np.all(error[:5] < 0.03)
    assert np.all(error < 0.03 * np.maximum(1, np.sqrt(2.0**-24 / (sizes[:, 0] / sizes[0, 0])) * 1.5))


def test_bursts_that_return_find_their_scale_again():
    bursts = jnp.where(jnp.arange(400) % 4 == 0, 30.0, 1.0)[:, None, None]
    signal = normal(400, *SHAPE, seed=11) * bursts
    exact, kept = (np.asarray(run(mo.heavy_ball(0.1), signal, s)[1], np.float64) for s in ("float32", EIGHT))
    error = np.linalg.norm(kept - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert error[200::4].mean() < 0.03


@jax.jit
def without_memory(sizes):
    """For noise of each of these sizes in turn: rows that outgrew their scales, margins, errors of the velocities."""
    tx = mo.scale_by_momentum(mo.Filter(0.0, 1.0, 1.0, 0.0), storage=EIGHT)

    def step(state, x):
        key, size = x
        g = size * jax.random.normal(key, (16, 512))
        _, state = tx.update(g, state)
        ((v,), codes) = mo.velocity(state), state.velocity.codes[0]
        outgrown = jnp.any(jnp.abs(codes.astype(jnp.int32)) > 118, axis=1)
        return state, (outgrown.mean(), state.velocity.margin[0][0, 0], jnp.linalg.norm(v - g) / jnp.linalg.norm(g))

    start = tx.init(jnp.zeros((16, 512)))
    return jax.lax.scan(step, start, (jax.random.split(jax.random.key(0), len(sizes)), sizes))[1]


def test_on_steady_noise_one_row_in_a_hundred_outgrows_its_scale():
    outgrown, margin, error = map(np.asarray, without_memory(jnp.ones(1200)))
    assert "on steady noise one row in a hundred outgrows it in a step" in TEXT
    assert 0.008 < outgrown[400:].mean() < 0.0125
    assert 1.1 <= margin[400:].min() <= margin[400:].max() < 2
    assert error[400:].mean() < 0.012


def test_a_scale_is_no_more_than_four_times_the_largest_recent_value_whatever_bursts_come():
    bursts = np.where(np.arange(1200) % 40 == 0, 1e3, 1.0)
    _, margin, error = map(np.asarray, without_memory(jnp.asarray(bursts, jnp.float32)))
    assert "It is 1.1 to 4 times that value" in TEXT
    assert margin.max() == 4
    # What is left after 38 steps of a burst of about 4 * 1000, which may have been rounded up to 2.6 times that.
    # A rounded root has an error of size (v s / 3)^(1/2) / 118.
    scale = 4 * 2.6 * 4e3 * 0.9**38
    assert error[40 * 20 + 39 :: 40].max() < np.sqrt(np.sqrt(2 / np.pi) * scale / 3) / 118


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
    from momentum_optax.transform import relative_scales

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
    from momentum_optax.transform import relative_scales

    # Coupled velocities may have entries beyond 1 on the diagonal and forget all the same.
    plus, minus = (
        relative_scales(mo.Filter(((a, 1.0), (-1.19, -a)), (1.0, 1.0), (1.0, 1.0), 0.0)) for a in (decay, -decay)
    )
    np.testing.assert_array_equal(plus, minus)
    assert np.all(np.isfinite(plus))
    assert np.min(plus) > 0


def test_the_tail_ends_where_its_text_says():
    kept = decoded(write(jnp.full((1, 512), -1e12), jnp.uint32(1), 1.0))
    np.testing.assert_allclose(kept, -TAIL[9], rtol=1e-6)
    assert f"{TAIL[9]:.1e}" == "1.7e+07"
    assert "1.7e7 times its row's scale is clipped" in TEXT


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


def test_a_resumed_run_and_a_scanned_one_are_bit_equal():
    tx = mo.scale_by_momentum(mo.aggregated(), storage=mo.storage.int8(5, min_size=1))
    gradients = normal(6, *SHAPE, seed=3)
    update = jax.jit(lambda s, g: tx.update(g, s)[::-1])
    straight, _ = jax.lax.scan(update, tx.init(gradients[0]), gradients)
    state = tx.init(gradients[0])
    for t, g in enumerate(gradients):
        state, _ = update(state, g)
        if t == 2:
            state = jax.tree.map(jnp.asarray, jax.device_get(state))  # as a checkpoint would
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_many_devices_write_the_bytes_of_one():
    from jax.sharding import NamedSharding, PartitionSpec

    signal = normal(5, *SHAPE, seed=6)
    for shape, spec in (((8, 1), ("x",)), ((1, 8), (None, "y")), ((4, 2), ("x", "y"))):
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = jax.device_put(signal, NamedSharding(mesh, PartitionSpec(None, *spec)))
        for a, b in zip(*(jax.tree.leaves(run(mo.nesterov(0.9), s)) for s in (signal, split)), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"min_size": 0}, ValueError, "min_size must be at least 1, got 0"),
        ({"min_size": "3"}, TypeError, "min_size must be a whole number, got '3'"),
    ],
)
def test_wrong_options_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        mo.storage.int8(**arguments)


def test_every_option_changes_the_bytes():
    signal = normal(3, *SHAPE)
    plain = run(mo.heavy_ball(0.9), signal)[1]
    for other in (
        mo.storage.int8(1, min_size=1),
        mo.storage.int8(min_size=5000),
    ):
        assert np.any(np.asarray(run(mo.heavy_ball(0.9), signal, other)[1]) != np.asarray(plain))
