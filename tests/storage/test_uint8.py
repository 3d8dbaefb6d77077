"""Squares in one byte: without bias, relative accuracy whatever the memory, and a stated outcome for hard cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.storage.noise import stamp_of_step

SHAPE = (8, 512)  # eight rows, each with its own range
SQUARES = mo.storage.uint8(min_size=1)
TEXT = " ".join(mo.storage.uint8.__doc__.split())


def levels(base_octave, fine):
    """The values of the codes 1 to 255, in float64: quarters of octaves, then factors of 4; octaves without `fine`."""
    if not fine:
        return 2.0 ** (base_octave + np.arange(254.0))
    quarters = np.concatenate([np.arange(fine), fine + 8 * np.arange(255 - fine)]).astype(float)
    return 2.0 ** (base_octave + quarters // 4) * (1 + quarters % 4 / 4)


def write(values, stamp, largest=None):
    """The parts of `values`, written as the first ones or where each row's largest was in the octave of `largest`."""
    before = SQUARES.init(values, 1)
    if largest is not None:
        octave = np.maximum(np.floor(np.log2(np.asarray(largest, np.float64))) + 127 - 32, 1).astype(np.uint32)
        rows = np.broadcast_to(octave, before.following[0].shape) * np.uint32(2**23)
        before = before._replace(following=(jnp.asarray(rows, jnp.uint32),))
    return SQUARES.encode((values,), before, mo.storage.EncodeContext(stamp, (1.0,)))


def decoded(parts):
    return np.asarray(SQUARES.state_type.decode(parts)[0], np.float64)


def over_steps(values, count, largest=None):
    once = jax.jit(jax.vmap(lambda t: SQUARES.state_type.decode(write(values, stamp_of_step(t), largest))[0]))
    return np.asarray(once(np.arange(count, dtype=np.uint32)), np.float64)


def between(grid, x):
    """The deviation of rounding `x` at random between the levels around it."""
    above = np.searchsorted(grid, x, side="right")
    low, high = grid[above - 1], grid[np.minimum(above, len(grid) - 1)]
    return np.sqrt(np.maximum((high - x) * (x - low), 0))


def averages(signal, decay, storage):
    """The averages of the squares of `signal` after each step, through the public interface."""
    adam = optax.scale_by_adam(b1=0.0, b2=decay)
    tx = mo.compress(adam, {"nu"}, storage)

    def step(state, g):
        _, state = tx.update(g, state)
        parts = state.inner.nu.parts
        return state, type(parts).decode(parts)[0]

    return jax.jit(lambda s: jax.lax.scan(step, tx.init(s[0]), s))(signal)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_the_noise_of_leaves_velocities_and_seeds_differs():
    squares = jnp.broadcast_to(jnp.linspace(1.1, 1.9, SHAPE[1]), SHAPE)

    def written(seed, *numbers):
        storage = mo.storage.uint8(seed, min_size=1)
        context = mo.storage.EncodeContext(stamp_of_step(0), (1.0, 1.0), numbers=numbers)
        return storage.encode((squares, squares), storage.init(squares, 2), context).codes

    a, b = written(0, 1, 0)
    for other in (b, written(1, 1, 0)[0], written(0, 1, 1)[0], written(0, 2, 0)[0], jnp.roll(a, 1, 0)):
        assert 0.2 < np.mean(np.asarray(a != other)) < 0.6


@pytest.mark.one_in(8)
@pytest.mark.parametrize("decade", range(-24, 25, 6))
def test_the_mean_over_the_noise_is_the_value(decade):
    shares = 10.0 ** np.concatenate([np.linspace(-9, 4, 400), np.linspace(4, 12, 112)])
    values = jnp.asarray(shares[None] * 10.0**decade, jnp.float32)
    exact = np.asarray(values, np.float64)[0]
    for largest, grid in (
        (10.0**decade, levels(np.floor(np.log2(10.0**decade)) - 32, 192)),
        (None, levels(-126, 0)),
    ):
        kept = over_steps(values, 10_000, largest)[:, 0]
        deviation = between(grid, exact)
        assert np.all(abs(kept.mean(0) - exact) <= 4.5 * deviation / 100 + 1e-6 * exact)
        often = (kept > exact).mean(0)
        fair = (often > 0.05) & (often < 0.95)
        assert fair.sum() > 200
        np.testing.assert_allclose(kept.std(0)[fair], deviation[fair], rtol=0.1, err_msg="the levels are these")


def test_zeros_stay_zeros_and_nothing_else_becomes_one():
    values = jnp.abs(normal(*SHAPE)).at[:, ::3].set(0.0).at[0, 1].set(1e-37).at[2].set(0.0)
    for largest in (None, 4.0):
        kept = decoded(write(values, jnp.uint32(1), largest))
        np.testing.assert_array_equal(kept == 0, np.asarray(values) == 0)


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_the_error_of_an_average_is_as_stated_whatever_its_memory(decay):
    steps = int(4 / (1 - decay))
    signal = normal(steps, *SHAPE, seed=1)
    exact, kept = (np.asarray(averages(signal, decay, s)[1], np.float64)[-1] for s in ("float32", SQUARES))
    assert "about a third" in TEXT
    assert "about 17 %" in TEXT
    squares = np.sqrt((((kept - exact) / exact) ** 2).mean())
    roots = np.sqrt(((np.sqrt(kept / exact) - 1) ** 2).mean())
    assert 0.15 < squares < 0.36
    assert 0.07 < roots < 0.18
    assert abs((kept / exact).mean() - 1) < 0.03, "no drift"


def test_a_slow_average_reaches_its_limit():
    ones = jnp.ones((8, 512))
    tx = mo.compress(optax.scale_by_adam(b2=0.999), {"nu"}, SQUARES)
    state = jax.lax.fori_loop(0, 10_000, lambda _, s: tx.update(ones, s)[1], tx.init(ones))
    values = decoded(state.inner.nu.parts)
    assert values.mean() == pytest.approx(1, abs=0.03)


def test_a_spike_is_rounded_between_powers_of_four_and_then_as_any_other_value():
    signal = normal(60, *SHAPE).at[40].multiply(1e6)
    exact, kept = (np.asarray(averages(signal, 0.9, s)[1], np.float64) for s in ("float32", SQUARES))
    assert np.all(kept[40] <= 4 * exact[40])
    assert np.all(kept[40] >= exact[40] / 4)
    assert kept[40].mean() == pytest.approx(exact[40].mean(), rel=0.1)
    # It fades as the average does, and its error is that of the step and of the quarters of an octave after it.
    ratio = kept[40:] / exact[40:]
    np.testing.assert_allclose(ratio.mean((1, 2)), 1, atol=0.02)
    assert np.all(ratio.std((1, 2)) < 0.9)
    assert ratio[0].std() > 0.3


def test_rows_that_wake_up_keep_relative_accuracy():
    signal = normal(200, *SHAPE, seed=2).at[1:150, 1].set(0.0).at[:150, 2].set(0.0)
    signal = signal * jnp.asarray(10.0 ** (-2.0 * np.arange(8.0)[:, None]), jnp.float32)
    exact, kept = (np.asarray(averages(signal, 0.9, s)[1], np.float64) for s in ("float32", SQUARES))
    assert not kept[149, 2].any()
    for row in (1, 2):
        ratio = kept[150, row] / exact[150, row]
        assert 0.8 < np.average(ratio, weights=exact[150, row]) < 1.25
        assert np.all(ratio < 4.001)
    last = kept[199] / exact[199]
    assert np.all(np.sqrt(((np.sqrt(last) - 1) ** 2).mean(1)) < 0.18), "each row, down to 1e-14 in the gradient"


def test_a_row_of_zeros_holds_what_a_leaf_of_large_values_wakes_it_with():
    before = SQUARES.init(jnp.zeros(SHAPE), 1)
    for t in range(2):
        before = SQUARES.encode(
            (jnp.full(SHAPE, 1e20).at[1].set(0.0),), before, mo.storage.EncodeContext(jnp.uint32(t), (1.0,))
        )
    awake = SQUARES.encode((jnp.full(SHAPE, 4e20),), before, mo.storage.EncodeContext(jnp.uint32(2), (1.0,)))
    ratio = decoded(awake)[1] / 4e20
    assert "up to 2^12 times the largest one of its leaf" in TEXT
    assert np.all((ratio > 1 / 4.01) & (ratio < 4.01))


def test_a_base_follows_from_the_largest_values_of_its_row_and_of_its_leaf():
    scales = 10.0 ** -np.asarray([0, 5, 12, 20, 30, 37, 60, 60])
    values = jnp.asarray(scales[:, None] * np.linspace(0.1, 1, SHAPE[1]), jnp.float32)
    first, second, third = (mo.storage.EncodeContext(stamp_of_step(t), (1.0,)) for t in range(3))
    # The second write is in quarters of an octave.
    state = SQUARES.encode((values,), SQUARES.encode((values,), SQUARES.init(values, 1), first), second)
    largest = decoded(state).max(1, keepdims=True)
    assert (largest == 0).sum() == 2
    with np.errstate(divide="ignore"):
        octaves = np.maximum(np.floor(np.log2(largest)) + 127, 33) - 32
    octaves[largest == 0] = 0
    expected = np.maximum(np.maximum(octaves, octaves.max() - 130), 1)
    # Version 0.1 kept this, where there is a part of it now.
    raised = state._replace(following=(jnp.asarray(expected * 2**23, jnp.uint32),))
    parts, same = (SQUARES.encode((values,), before, third) for before in (state, raised))
    np.testing.assert_array_equal(parts.base[0], expected * 2**23)
    for new, old in zip(parts, same, strict=True):
        np.testing.assert_array_equal(new[0], old[0])


def test_small_values_of_a_row_become_the_smallest_that_it_has():
    values = jnp.ones((1, 512)).at[0, :100].set(1e-30)
    kept = decoded(write(values, jnp.uint32(3), 1.0))
    np.testing.assert_array_equal(kept[0, :100], 2.0**-32)
    assert "smaller ones become the smallest" in TEXT


def test_a_first_step_is_read_as_it_was_written_also_in_the_strides_of_version_0_2():
    codes = jnp.arange(1, 128, dtype=jnp.uint8)[None]
    zero, least = jnp.zeros((1, 1), jnp.uint32), jnp.full((1, 1), 2**23, jnp.uint32)
    old = SQUARES.state_type((codes,), (least,), (zero,), (zero,))
    np.testing.assert_array_equal(decoded(old)[0], 4.0 ** np.arange(-63.0, 64.0))
    tripled = decoded(SQUARES.state_type.rescale(old, 3.0))[0, 20:-20] / 4.0 ** np.arange(-43.0, 44.0)
    assert set(tripled) == {1.0, 4.0}


@pytest.mark.slow
def test_what_the_page_says_of_a_row_after_a_single_huge_gradient():
    gradients = np.ones((402, 16, 512)) + 0.1 * np.random.default_rng(0).normal(size=(402, 16, 512))
    tx = mo.compress(optax.scale_by_adam(), {"nu": "uint8"})

    def after(spike):
        signal = jnp.asarray(gradients, jnp.float32).at[2, 0, 0].set(spike)
        run = jax.jit(lambda signal: jax.lax.scan(lambda s, g: tx.update(g, s)[::-1], tx.init(signal[0]), signal)[1])
        return float(jnp.median(run(signal)[-1, 0, 1:]))

    assert after(1e5) == pytest.approx(1, abs=0.05)
    assert 1 / 10 < after(1e7) < 1 / 4
    assert after(jnp.inf) < 1e-9


@pytest.mark.parametrize(("bad", "expected"), [(jnp.nan, 0.0), (jnp.inf, None)])
def test_non_finite_squares_touch_no_other_element(bad, expected):
    signal = normal(30, *SHAPE, seed=4)
    clean, dirty = (np.asarray(averages(s, 0.9, SQUARES)[1]) for s in (signal, signal.at[5, 3, 100].set(bad)))
    assert np.isfinite(dirty).all()
    assert dirty[5, 3, 100] == expected if expected is not None else dirty[5, 3, 100] > 1e30
    others = np.ones(SHAPE, bool)
    others[3] = False
    np.testing.assert_array_equal(dirty[:, others], clean[:, others])
    assert np.all(dirty[5, 3, 101:] > 0)


def test_the_largest_and_smallest_floats_fit():
    # What lies beyond the row's range gets its last code, which is a number too.
    for largest in (2.0**-126, 1.0, 2.0**127):
        values = jnp.full((1, 512), 3e38).at[0, ::2].set(1.2e-38)
        kept = decoded(write(values, jnp.uint32(9), largest))
        assert np.isfinite(kept).all()
        assert np.all(kept > 0)
        again = SQUARES.encode(
            (jnp.full((1, 512), 2.0),),
            write(values, jnp.uint32(9), largest),
            mo.storage.EncodeContext(jnp.uint32(1), (1.0,)),
        )
        assert np.isfinite(decoded(again)).all()


@pytest.mark.slow
def test_adams_steps_are_what_they_were_but_for_the_noise():
    signal = normal(100, *SHAPE, seed=6)
    adam = optax.scale_by_adam(b1=0.0, b2=0.95)
    plain, ours = adam, mo.compress(adam, {"nu"}, SQUARES)
    a, b = plain.init(signal[0]), ours.init(signal[0])
    for g in signal:
        (u, a), (w, b) = jax.jit(plain.update)(g, a), jax.jit(ours.update)(g, b)
    ratio = np.asarray(w / u, np.float64)
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() < 0.2


def test_one_byte_and_the_small_leaves_in_full():
    params = {"w": jnp.zeros((768, 2304)), "b": jnp.zeros(4095), "c": jnp.zeros((96, 64), jnp.complex64)}
    state = mo.compress(optax.adamw(1e-3), {"nu": "uint8"}).init(params).inner[0].nu.parts
    assert {k: str(x.dtype) for k, x in state.codes[0].items()} == {"w": "uint8", "b": "float32", "c": "complex64"}
    assert sum(part[0]["w"].nbytes for part in state) / params["w"].size <= 1.03


def test_it_is_for_squares_alone():
    with pytest.raises(ValueError, match="either sign, got Uint8"):
        mo.scale_by_momentum(mo.heavy_ball(0.9), storage="uint8")
    params = {"w": jnp.zeros((8, 8))}
    with pytest.raises(ValueError, match=r"'mu' may hold values of either sign.*got Uint8"):
        mo.compress(optax.adam(1e-2), {"mu"}, "uint8").init(params)
    with pytest.raises(ValueError, match="'mu' may hold values of either sign"):
        mo.compress(optax.adam(1e-2), lambda path, leaf: True, "uint8").init(params)
    with pytest.raises(ValueError, match="'v' may hold"):
        mo.compress(optax.adan(1e-2), {"v"}, "uint8").init(params)
    state = mo.compress(optax.adam(1e-2), {"mu", "nu"}, "float32").init(params)
    with pytest.raises(ValueError, match="'mu' may hold"):
        mo.convert(state, "uint8")
    mo.convert(state, {"nu": "uint8"})
    with pytest.raises(ValueError, match="'velocity' may hold"):
        mo.convert(mo.scale_by_momentum(mo.ema(0.9)).init(params), "uint8")
