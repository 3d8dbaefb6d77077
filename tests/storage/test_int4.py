"""Four bits per velocity: without bias within four scales, and with a stated outcome for every hard case."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import momentum_optax as mo
from momentum_optax.storage import _int4

SHAPE = (8, 512)  # eight rows, each with its own scale
FOUR = mo.storage.int4(min_size=1)
TEXT = " ".join(mo.storage.int4.__doc__.split())


def write(velocity, stamp, scale=None):
    """The parts of a velocity, written as the first one or at a given scale."""
    before = FOUR.init(velocity, 1)
    if scale is not None:
        reach = jnp.full(before.reach[0].shape, scale, jnp.float32)
        before = before._replace(reach=(reach,), margin=(jnp.ones((1,) * velocity.ndim),))
    return FOUR.encode((velocity,), before, mo.storage.EncodeContext(stamp, (1.0,)))


def decoded(parts):
    return np.asarray(FOUR.state_type.decode(parts)[0], np.float64)


def over_stamps(velocity, count, scale):
    """The decoded velocity under each of `count` stamps, shape (count, ...)."""
    once = jax.jit(jax.vmap(lambda stamp: FOUR.state_type.decode(write(velocity, stamp, scale))[0]))
    return np.asarray(once(np.arange(count, dtype=np.uint32)), np.float64)


def run(rule, signal, storage=FOUR):
    """The state at the end, and the velocities after each gradient of `signal`, decoded."""
    tx = mo.scale_by_momentum(rule, storage=storage)

    def step(state, g):
        _, state = tx.update(g, state)
        return state, mo.velocity(state)[0]

    return jax.jit(lambda s: jax.lax.scan(step, tx.init(s[0]), s))(signal)


def both(rule, signal):
    return (np.asarray(run(rule, signal, s)[1], np.float64) for s in ("float32", FOUR))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("decade", [-24, 0, 24])
def test_the_mean_over_the_noise_is_the_value(decade):
    shares = np.concatenate([10.0 ** np.linspace(-6, 0, 400), np.linspace(1, 3.9, 112)])
    exact = np.where(np.arange(512) % 2, -1, 1) * shares
    kept = over_stamps(jnp.asarray(exact[None] * 10.0**decade, jnp.float32), 10_000, 10.0**decade)[:, 0] / 10.0**decade
    y = 6 * np.sqrt(shares)
    cell = np.sqrt(np.where(y < 1, 4 * y**3 / 3 - y**4, y**2 / 3 + 0.03)) / 36
    # Either 4 or about 1, whose own noise is a third times that of a uniform number.
    up = np.maximum(shares - 1, 0) / 3
    deviation = np.where(shares < 1, cell, np.sqrt(up * (4 - shares) ** 2 + (1 - up) * ((shares - 1) ** 2 + 1 / 27)))
    assert np.all(abs(kept.mean(0) - exact) <= 4.5 * deviation / 100 + 1e-6 * shares)
    body = shares < 1
    assert np.median(kept.std(0)[body] / deviation[body]) > 0.9, "the deviations above are tight"


def test_zeros_stay_zeros_and_signs_stay_signs():
    values = normal(*SHAPE).at[:, ::3].set(0.0).at[2].set(0.0)
    for scale in (None, 4.0, 0.5):
        kept = decoded(write(values, jnp.uint32(1), scale))
        assert not kept[np.asarray(values) == 0].any()
        assert np.all(kept * np.asarray(values) >= 0)


@pytest.mark.slow
def test_the_error_at_decay_09_is_the_stated_one_and_the_limit_is_real():
    signal = normal(400, *SHAPE, seed=1)
    errors = {}
    for decay in (0.9, 0.95, 0.99):
        exact, kept = (x[200:] for x in both(mo.heavy_ball(decay), signal))
        errors[decay] = np.sqrt(((kept - exact) ** 2).mean() / (exact**2).mean())
    assert "0.4 on white noise" in TEXT
    assert 0.35 < errors[0.9] < 0.45
    assert 0.5 < errors[0.95] < 1.2
    assert errors[0.99] > 1


@pytest.mark.one_in(6)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e12, 1e30])
def test_the_first_step_tells_the_scale_and_nothing_else(size):
    signal = normal(30, 64, 512, seed=2) * jnp.float32(size)
    kept = np.asarray(run(mo.heavy_ball(0.5), signal)[1], np.float64)
    assert not kept[0].any()
    assert "the velocity begins with the second gradient" in TEXT
    exact = np.asarray(run(mo.heavy_ball(0.5), signal[1:], "float32")[1], np.float64)
    error = np.linalg.norm(kept[1:] - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert np.all(error < 0.6), "from the second step on"


def test_a_single_row_finds_its_scale_within_a_few_steps():
    signal = normal(60, 1, 4096, seed=3)
    exact, kept = both(mo.heavy_ball(0.5), signal)
    error = np.linalg.norm(kept - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert "may need a few steps more" in TEXT
    assert np.all(error[20:] < 0.5)


def test_a_converted_float32_velocity_keeps_its_first_step():
    signal = normal(4, *SHAPE, seed=8)
    plain, four = (mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s) for s in ("float32", FOUR))
    _, state = plain.update(signal[0], plain.init(signal[0]))
    exact = mo.velocity(state)[0]
    state = mo.convert(state, FOUR)
    assert np.linalg.norm(mo.velocity(state)[0] - exact) < 0.4 * np.linalg.norm(exact)
    _, state = four.update(signal[1], state)
    exact = 0.9 * exact + signal[1]
    assert np.linalg.norm(mo.velocity(state)[0] - exact) < 0.6 * np.linalg.norm(exact)


@pytest.mark.slow
def test_what_is_converted_has_no_bias_and_is_as_exact_as_in_a_run():
    from momentum_optax.wrappers.initial import encode_initial

    @jax.jit
    def leaves(v):
        """The velocities read from 200 leaves, converted each with its own noise."""
        return jax.vmap(lambda number: FOUR.state_type.decode(encode_initial(FOUR, (v,), number))[0])(jnp.arange(200))

    v = normal(64, 512, seed=3)
    # The largest values decide about the scale, and must not do so by the noise that they are rounded with.
    large = jnp.where(abs(v) > 2.5, v, 0)
    shares = np.asarray((leaves(v) * large).sum((1, 2)) / (large**2).sum(), np.float64)
    assert abs(shares.mean() - 1) < 4.5 * shares.std() / np.sqrt(200)
    v = v * jnp.asarray(1.3 ** -np.arange(64.0)[:, None], jnp.float32)
    assert jnp.linalg.norm(leaves(v) - v, axis=(1, 2)).mean() < 0.4 * jnp.linalg.norm(v)


def test_a_zero_stays_one_under_any_noise():

    # Where the noise ends, half a code plus it is rounded to the next whole number.
    ends = 0.5 - np.arange(64, dtype=np.float32) * np.float32(2.0**-25)
    noise = jnp.concatenate([ends, -ends, normal(100) * 1e-7])[None]

    @jax.jit
    def read(scale):
        codes = _int4._encode(jnp.zeros_like(noise), scale, jnp.zeros((1, 1)), noise)
        return _int4._decode(codes, scale, noise)

    for size in (1.0, 1e-20, 1e20):
        np.testing.assert_array_equal(read(jnp.full((1, 1), size, jnp.float32)), 0)


def test_a_lone_spike_is_cut_and_a_lasting_rise_is_followed():
    signal = normal(80, *SHAPE, seed=4)
    spiked = signal.at[40, 3, 100].multiply(1e6)
    exact, kept = both(mo.heavy_ball(0.5), spiked)
    scale = abs(exact[39, 3]).max() * 4  # the margin's bound
    assert 0 < abs(kept[40, 3, 100]) <= 4 * scale * 1.01
    assert "more than 4 times its row's scale is clipped" in TEXT
    others = np.arange(8) != 3
    _, clean = both(mo.heavy_ball(0.5), signal)
    np.testing.assert_array_equal(kept[40, others], clean[40, others])
    rise = signal * jnp.where(jnp.arange(80) < 40, 1.0, 1e4)[:, None, None]
    exact, kept = both(mo.heavy_ball(0.5), rise)
    error = np.linalg.norm(kept - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert error[40] > 0.9
    assert np.all(error[48:] < 0.6)


def test_rows_of_different_sizes_have_scales_of_their_own():
    sizes = jnp.asarray(4.0 ** -np.arange(4.0), jnp.float32).repeat(2)[:, None]
    exact, kept = (x[200:] for x in both(mo.heavy_ball(0.8), normal(300, *SHAPE, seed=9) * sizes))
    error = np.linalg.norm(kept - exact, axis=(0, 2)) / np.linalg.norm(exact, axis=(0, 2))
    assert np.all(error < 0.5)


def test_a_row_that_was_silent_wakes_up_within_a_few_steps():
    signal = normal(240, *SHAPE, seed=10).at[1:200, 1].set(0.0)
    exact, kept = both(mo.heavy_ball(0.5), signal)
    assert abs(kept[199, 1]).max() < 1e-2
    error = np.linalg.norm((kept - exact)[200:, 1], axis=1) / np.linalg.norm(exact[200:, 1], axis=1)
    # Its scale never fell below 2^-8 of the leaf's largest, and 8 times a step is back within three.
    assert "Scales follow by up to 8 times a step" in TEXT
    assert np.all(error[3:] < 0.6)


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
    # Of one row in few bits the first write tells no more than the size to some orders of magnitude.
    v = {"b": normal(*shape, seed=3) * jnp.float32(size)}
    _, state = mo.scale_by_momentum(mo.heavy_ball(0.9)).update(v, mo.scale_by_momentum(mo.heavy_ball(0.9)).init(v))

    def convert(state):
        return mo.convert(state, mo.storage.int4(min_size=1))

    (read,) = mo.velocity((jax.jit(convert) if compiled else convert)(state))
    assert np.linalg.norm(read["b"] / size - v["b"] / size) < 0.5 * np.linalg.norm(v["b"] / size)
