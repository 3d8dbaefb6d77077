"""Four bits per velocity: without bias up to three times a row's largest, and with a stated outcome for hard cases."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax.storage import _int4
from momentum_optax.storage.noise import mix

SHAPE = (8, 512)  # eight rows, each with its own scale
FOUR = mo.storage.int4(min_size=1)
TEXT = " ".join(mo.storage.int4.__doc__.split())
# Square roots stand for values up to this part of a row's scale.
BOUND = 0.64


def write(velocity, stamp, bound=None):
    """The parts of a velocity, written as the first one or with a given bound of the square roots."""
    before = FOUR.init(velocity, 1)
    shape = before.noise[0].shape
    before = before._replace(noise=(mix(jnp.arange(shape[0], dtype=jnp.uint32).reshape(shape) ^ mix(stamp)) | 1,))
    if bound is None:
        return FOUR.encode((velocity,), before, mo.storage.EncodeContext(None, (1.0,)))
    before = before._replace(reach=(jnp.full(shape, bound / BOUND, jnp.float32),))
    nothing = (jnp.zeros_like(velocity), 0.0, True)
    return FOUR.encode((velocity,), before, mo.storage.EncodeContext(None, (1.0,), nothing))


def decoded(parts):
    return np.asarray(FOUR.state_type.decode(parts)[0], np.float64)


def over_stamps(velocity, count, bound):
    """The decoded velocity under each of `count` stamps, shape (count, ...)."""
    once = jax.jit(jax.vmap(lambda stamp: FOUR.state_type.decode(write(velocity, stamp, bound))[0]))
    return np.asarray(once(np.arange(count, dtype=np.uint32)), np.float64)


def run(rule, signal, storage=FOUR):
    """The state at the end, and the velocities after each gradient of `signal`, decoded."""
    tx = mo.scale_by_momentum(rule, storage=storage)

    def step(state, g):
        _, state = tx.update(g, state)
        return state, mo.velocity(state)

    return jax.jit(lambda s: jax.lax.scan(step, tx.init(s[0]), s))(signal)


def both(rule, signal):
    return (np.asarray(run(rule, signal, s)[1][0], np.float64) for s in ("float32", FOUR))


def errors(exact, kept, axes=(1, 2)):
    return np.linalg.norm(kept - exact, axis=axes) / np.linalg.norm(exact, axis=axes)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def deviation_beyond(x):
    """Of what is read of a value of more than one bound, by summing over the octave and the size of the noise."""
    u = 8 * (np.arange(80_000) + 0.5) / 80_000
    beyond = 1 + 2.0 ** np.floor(u) / 8
    # The u below which the last code must be chosen for the mean to be the value.
    last = np.searchsorted(np.cumsum(beyond - 1) / len(u), x - 1)
    is_last = np.arange(len(u)) < last[:, None]
    # Of 6, read with a noise of half the rest of u, of either sign, the mean is 1 whatever u is.
    squares = np.where(is_last, beyond**2, 1 + (u % 1) ** 2 / 36).mean(1)
    return np.sqrt(squares - np.where(is_last, beyond, 1).mean(1) ** 2)


@pytest.mark.parametrize("decade", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in (-24, 24))])
def test_the_mean_over_the_noise_is_the_value(decade):
    shares = np.concatenate([10.0 ** np.linspace(-6, 0, 400), np.linspace(1.001, 4.9, 112)])
    exact = np.where(np.arange(512) % 2, -1, 1) * shares
    kept = over_stamps(jnp.asarray(exact[None] * 10.0**decade, jnp.float32), 10_000, 10.0**decade)[:, 0] / 10.0**decade
    y = 6 * np.sqrt(np.minimum(shares, 1))
    deviation = np.sqrt(np.where(y < 1, 4 * y**3 / 3 - y**4, y**2 / 3 + 0.03)) / 36
    deviation[400:] = deviation_beyond(shares[400:])
    # A few of the 10,000 where hardly any of the writes are not zero.
    assert np.all(abs(kept.mean(0) - exact) <= 4.5 * deviation / 100 + 1e-6 * shares)
    assert np.median(kept.std(0)[:400] / deviation[:400]) > 0.9, "the deviations above are tight"
    assert np.all(abs(kept.std(0)[400:] / deviation[400:] - 1) < 0.2)


def test_the_last_code_ends_where_its_text_says():
    kept = over_stamps(jnp.full((1, 512), -1e6), 4000, 1.0)
    assert "3.2 times its row's scale" in TEXT
    # Eight levels, from 1.125 to 17.
    np.testing.assert_allclose(kept.mean() * BOUND, -3.19, rtol=0.06)
    np.testing.assert_allclose(np.unique(kept.round(4))[::-1], -(1 + 2.0 ** np.arange(8) / 8))


def test_zeros_stay_zeros_and_signs_stay_signs():
    values = normal(*SHAPE).at[:, ::3].set(0.0).at[2].set(0.0)
    for bound in (None, 4.0, 0.5):
        kept = decoded(write(values, jnp.uint32(1), bound))
        assert not kept[np.asarray(values) == 0].any()
        assert np.all(kept * np.asarray(values) >= 0)


def test_a_zero_stays_one_under_any_noise():
    # Where the noise ends, half a code plus it is rounded to the next whole number.
    ends = np.int64(2**31 - 1) - np.arange(4096)
    noise = jnp.asarray(np.concatenate([ends, -1 - ends, np.arange(-50, 50)]).astype(np.int32))[None]
    for size in (1.0, 1e-20, 1e20):
        inverse, row = jnp.full((1, 1), size, jnp.float32), jnp.ones((1, 1), jnp.uint32)
        codes, _ = _int4._encode(jnp.zeros(noise.shape), inverse, noise, None, row)
        np.testing.assert_array_equal(_int4._decode(codes, jnp.ones((1, 1)), noise, row), 0)


@pytest.mark.slow
def test_the_error_at_decay_09_is_the_stated_one_and_the_limit_is_real():
    signal = normal(400, *SHAPE, seed=1)
    found = {}
    for decay in (0.9, 0.95, 0.99):
        exact, kept = (x[200:] for x in both(mo.heavy_ball(decay), signal))
        found[decay] = np.sqrt(((kept - exact) ** 2).mean() / (exact**2).mean())
    assert "relative error of a stored velocity is 0.4" in TEXT
    assert "0.8 at decay 0.95" in TEXT
    assert 0.35 < found[0.9] < 0.45
    assert 0.7 < found[0.95] < 0.9
    assert found[0.99] > 1


@pytest.mark.one_in(5)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e12, 1e30])
def test_the_first_step_is_as_exact_as_any_other_at_any_size(size):
    error = errors(*both(mo.heavy_ball(0.5), normal(30, *SHAPE, seed=2) * jnp.float32(size)))
    assert "within 0.2 in norm" in TEXT
    assert 0.1 < error[0] < 0.2
    # The roundings of the steps before halve from step to step, which makes 1.15 times one in norm.
    assert error[5:].mean() < 1.15 * 0.2


@pytest.mark.slow
def test_a_spike_and_a_row_that_wakes_up_are_kept_and_forgotten():
    spiked = normal(260, *SHAPE, seed=4).at[40].multiply(1e6)
    exact, kept = both(mo.heavy_ball(0.9), spiked)
    error = errors(exact, kept)
    assert error[40] < 0.2
    # The noise of its roundings adds up as it decays, and decays with it.
    assert np.all(np.linalg.norm((kept - exact)[41:], axis=(1, 2)) < 0.3 * np.linalg.norm(exact[40]))
    assert "most of what is left of a spike is noise" in TEXT
    assert error[100:150].min() > 1
    assert np.all(error[220:] < 0.5)
    silent = normal(1040, 4, 512, seed=10).at[1:1000, 1].set(0.0)
    exact, kept = (x[1000:, 1] for x in both(mo.heavy_ball(0.5), silent))
    error = errors(exact, kept, 1)
    assert error[0] < 0.2
    assert np.all(error < 0.25)


def test_a_lone_spike_is_cut_and_a_lasting_rise_is_kept_at_once():
    signal = normal(80, *SHAPE, seed=4)
    spiked = signal.at[40, 3, 100].multiply(1e6)
    exact, kept = both(mo.heavy_ball(0.5), spiked)
    # The scale is at least 1.35 times the largest before, and no more than that plus what entered.
    assert 0 < abs(kept[40, 3, 100]) <= 17 * BOUND * 4 * abs(exact[39, 3]).max()
    others = np.arange(8) != 3
    _, clean = both(mo.heavy_ball(0.5), signal)
    np.testing.assert_array_equal(kept[40:, others], clean[40:, others])
    rise = signal * jnp.where(jnp.arange(80) < 40, 1.0, 1e4)[:, None, None]
    assert np.all(errors(*both(mo.heavy_ball(0.5), rise)) < 0.25)


def test_what_the_window_does_not_see_is_within_reach_a_few_writes_later():
    # Nothing but the last element of each piece that the window has the first one of.
    value = jnp.zeros((64, 512)).at[:, 31::32].set(0.7)
    parts = write(value, jnp.uint32(3))
    for _ in range(12):
        assert not decoded(parts)[np.asarray(value) == 0].any()
        parts = FOUR.encode((value,), parts, mo.storage.EncodeContext(None, (1.0,)))
    assert np.linalg.norm(decoded(parts) - np.asarray(value)) < 0.3 * np.linalg.norm(value)


def test_rows_of_different_sizes_have_scales_of_their_own():
    sizes = jnp.asarray(10.0 ** (-3 * np.arange(8.0)), jnp.float32)[:, None]
    exact, kept = (x[100:] for x in both(mo.heavy_ball(0.8), normal(200, *SHAPE, seed=9) * sizes))
    assert np.all(errors(exact, kept, (0, 2)) < 0.35)


def test_velocities_of_different_sizes_share_a_scale_times_their_gains():
    signal = normal(300, *SHAPE, seed=12)
    exact, kept = (run(mo.aggregated((0.0, 0.5, 0.9)), signal, s)[1] for s in ("float32", FOUR))
    found = [errors(np.asarray(a)[100:], np.asarray(b)[100:]).mean() for a, b in zip(exact, kept, strict=True)]
    # With one scale for all the fast one's would be several times as large as it needs.
    assert len(found) == 2
    assert found[0] < 0.3
    assert found[1] < 0.5


def test_writes_rows_velocities_and_leaves_are_rounded_apart():
    v = normal(1, 512, seed=5)
    v = jnp.concatenate([v, v])
    leaves = [FOUR.numbered(FOUR.init(v, 2), v, number) for number in range(2)]

    @jax.jit
    def twice(parts):
        first = FOUR.encode((v, v), parts, mo.storage.EncodeContext(None, (1.0, 1.0)))
        second = FOUR.encode((v, v), first, mo.storage.EncodeContext(None, (1.0, 1.0)))
        return [FOUR.state_type.decode(x) for x in (first, second)]

    kept = np.asarray([twice(parts) for parts in leaves], np.float64).reshape(-1, 512)
    found = kept - np.asarray(v[0], np.float64)
    for i, j in itertools.combinations(range(len(found)), 2):
        assert abs(np.corrcoef(found[i], found[j])[0, 1]) < 5 / np.sqrt(512)


def test_a_converted_float32_velocity_keeps_its_first_step():
    signal = normal(4, *SHAPE, seed=8)
    plain, four = (mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s) for s in ("float32", FOUR))
    _, state = plain.update(signal[0], plain.init(signal[0]))
    exact = mo.velocity(state)[0]
    state = mo.convert(state, FOUR)
    assert np.linalg.norm(mo.velocity(state)[0] - exact) < 0.2 * np.linalg.norm(exact)
    _, state = four.update(signal[1], state)
    exact = 0.9 * exact + signal[1]
    assert np.linalg.norm(mo.velocity(state)[0] - exact) < 0.3 * np.linalg.norm(exact)


def test_a_single_element_decides_about_the_scale_of_its_row_when_it_is_converted():
    v = normal(*SHAPE, seed=8).at[3, 100].set(50.0)
    kept = FOUR.fitted(FOUR.numbered(FOUR.init(v, 1), v, 0), (v,), (1.0,))
    kept = decoded(FOUR.encode((v,), kept, mo.storage.EncodeContext(None, (1.0,))))
    # Half a code of six, squared.
    assert abs(kept[3, 100] / 50 - 1) <= 1 / 6 + 1e-6


@pytest.mark.slow
def test_what_is_converted_has_no_bias_and_is_as_exact_as_in_a_run():
    from momentum_optax.wrappers.initial import encode_initial

    @jax.jit
    def leaves(v):
        """The velocities read from 200 leaves, converted each with its own noise."""
        parts = [encode_initial(FOUR, (v,), number) for number in range(200)]
        return jnp.stack([FOUR.state_type.decode(x)[0] for x in parts])

    v = normal(8, 512, seed=3)
    # The largest values decide about the scale, and must not do so by the noise that they are rounded with.
    large = jnp.where(abs(v) > 2.5, v, 0)
    kept = leaves(v)
    shares = np.asarray((kept * large).sum((1, 2)) / (large**2).sum(), np.float64)
    assert abs(shares.mean() - 1) < 4.5 * shares.std() / np.sqrt(200)
    assert jnp.linalg.norm(kept - v, axis=(1, 2)).mean() < 0.2 * jnp.linalg.norm(v)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_non_finite_gradient_restarts_its_element_and_touches_no_other(bad):
    signal = normal(30, *SHAPE, seed=4)
    clean, dirty = (np.asarray(run(mo.heavy_ball(0.9), s)[1][0]) for s in (signal, signal.at[5, 3, 100].set(bad)))
    assert dirty[5, 3, 100] == 0
    others = np.ones(SHAPE, bool)
    others[3] = False
    np.testing.assert_array_equal(dirty[:, others], clean[:, others])
    assert np.isfinite(dirty[5:]).all()


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_the_next_scale_does_not_follow_from_what_is_not_finite(bad):
    velocity = normal(*SHAPE)
    with_zero, with_bad = (write(velocity.at[:, 100].set(x), jnp.uint32(1), 8.0) for x in (0.0, bad))
    np.testing.assert_array_equal(with_bad.reach[0], with_zero.reach[0])


def test_half_a_byte_and_the_small_leaves_in_full():
    params = {
        "w": jnp.zeros((768, 2304)),
        "b": jnp.zeros(4095),
        "c": jnp.zeros((96, 64), jnp.complex64),
        "s": jnp.ones(()),
    }
    state = jax.eval_shape(mo.scale_by_momentum(mo.heavy_ball(0.9), storage="int4").init, params)
    codes = state.velocity.codes[0]
    assert {k: str(x.dtype) for k, x in codes.items()} == {
        "w": "int4",
        "b": "float32",
        "c": "complex64",
        "s": "float32",
    }
    others = sum(part[0]["w"].size * 4 for part in state.velocity[1:])
    assert 0.5 + others / params["w"].size <= 0.55


@pytest.mark.parametrize(
    ("shape", "size"),
    [((8,), 1.0), *(pytest.param(s, x, marks=pytest.mark.slow) for s in ((1, 512), (4, 8)) for x in (1e-20, 1e20))],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_leaf_of_few_rows_is_converted_at_its_size(shape, size, compiled):
    v = {"b": normal(*shape, seed=3) * jnp.float32(size)}
    _, state = mo.scale_by_momentum(mo.heavy_ball(0.9)).update(v, mo.scale_by_momentum(mo.heavy_ball(0.9)).init(v))

    def convert(state):
        return mo.convert(state, mo.storage.int4(min_size=1))

    (read,) = mo.velocity((jax.jit(convert) if compiled else convert)(state))
    assert np.linalg.norm(read["b"] / size - v["b"] / size) < 0.3 * np.linalg.norm(v["b"] / size)
