"""`rescale` against NumPy and against the run of the multiplied gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals
from state.edited import ADAM, PARAMS, UINT8, full, steps

import momentum_optax as mo


# int4 shares its layout with int8, which takes seconds.
@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "storage", [pytest.param(name, marks=pytest.mark.slow) if name == "int8" else name for name in STORAGES]
)
def test_a_factor_is_that_of_numpy_and_a_power_of_two_that_of_the_gradients(storage):
    tx = mo.scale_by_momentum(mo.aggregated((0.5, 0.9)), storage=STORAGES[storage]())
    _, state = steps(tx)
    rescale = jax.jit(mo.rescale)
    for factor in (3.7, -0.3, 0.125):
        new = rescale(state, jnp.float32(factor))
        assert avals(new) == avals(state)
        for old, v in zip(mo.velocity(state), mo.velocity(new), strict=True):
            exact = jax.tree.map(lambda x, c=factor: np.float32(c) * np.float64(x), old)
            # Half a unit in the last place of a bfloat16, or four of a float32.
            rtol = 0 if factor == 0.125 else 2.0**-8 if storage == "bfloat16" else 2.0**-21
            jax.tree.map(lambda a, b, r=rtol: np.testing.assert_allclose(a, b, rtol=r, atol=0), full(v), exact)
        assert any(np.any(np.asarray(v["body"]) != 0) for v in mo.velocity(new))
        if hasattr(state.velocity, "codes"):
            assert_bit_equal(new.velocity.codes, state.velocity.codes)
            scales = (np.asarray(s.velocity.scale[0]["head"]["w"]) for s in (new, state))
            np.testing.assert_array_equal(next(scales), np.float32(factor) * next(scales))
    wanted, after = steps(tx, 2, 1.0, state, start=3)
    got, later = steps(tx, 2, 0.125, rescale(state, jnp.float32(0.125)), start=3)
    assert_bit_equal(got, jax.tree.map(lambda x: x * 0.125, wanted))
    assert_bit_equal(mo.velocity(later), jax.tree.map(lambda x: x * 0.125, mo.velocity(after)))


def test_squares_in_a_byte_take_powers_of_two_exactly():
    tx = mo.compress(optax.scale_by_rms(0.9), {"nu": UINT8})
    rescale = jax.jit(lambda s, c: mo.rescale(s, {"nu": c}))
    decode = jax.jit(lambda parts: parts.decode(parts)[0])

    def squares(state):
        parts = state.inner.nu.parts
        return np.asarray(decode(type(parts)(*((field[0]["head"]["w"],) for field in parts))))

    for count in (1, 3):  # after the first step codes go in strides of two octaves
        _, state = steps(tx, count)
        old = squares(state)
        assert (old > 0).all()
        for octaves in (-5, -4, 0, 7, 10):
            np.testing.assert_array_equal(squares(rescale(state, jnp.float32(2.0**octaves))), old * 2.0**octaves)


def test_squares_in_a_byte_take_another_number_without_bias():
    values = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (64, 600)), jnp.float32)
    parts = mo.storage.uint8(min_size=1).init(values, 1)
    encode = jax.jit(lambda p, stamp: UINT8.encode((values,), p, mo.storage.EncodeContext(stamp, (1.0,))))
    for stamp in range(3):
        parts = encode(parts, jnp.uint32(stamp))
    (old,) = parts.decode(parts)
    (new,) = jax.jit(lambda p: p.decode(type(p).rescale(p, 1.3)))(parts)
    relative = np.asarray(new, np.float64) / (np.float32(1.3) * np.float64(old)) - 1
    assert abs(relative).max() < 0.25
    # A rounding between levels a quarter of an octave apart has a deviation of at most 1/8.
    assert abs(relative.mean()) < 5 * 0.125 / np.sqrt(relative.size)


def test_fields_of_compress_and_of_optax_take_factors_of_their_own():
    tx = mo.compress(optax.adam(0.1), ADAM)
    wanted, _ = steps(tx, 5, 1.0)
    _, state = steps(tx, 3)
    with pytest.raises(ValueError, match=r"mapping with one number for each of 'mu', 'nu', since 'nu' holds squares"):
        mo.rescale(state, 0.5)
    new = jax.jit(lambda s: mo.rescale(s, {"mu": 0.5, "nu": 0.25}))(state)
    assert avals(new) == avals(state)
    got, _ = steps(tx, 2, 0.5, new, start=3)
    # Epsilon alone, 1e-8 beside a root of about 1 or, in the first rounding, of 2^-16, is not multiplied.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), got, wanted[3:])
    _, plain = steps(optax.chain(optax.trace(0.9), optax.scale(-1.0)), 2)
    np.testing.assert_array_equal(mo.rescale(plain, {"trace": -3.0})[0].trace["body"], -3 * plain[0].trace["body"])


def test_what_has_either_sign_and_what_is_no_float_is_known_in_fields_of_compress():
    # Adan's v is an average of differences, whatever its name says elsewhere.
    state = mo.compress(optax.adan(0.1), {"m": "bfloat16", "v": "bfloat16"}).init(PARAMS)
    state = jax.tree.map(lambda x: jnp.full_like(x, 3) if x.dtype == jnp.bfloat16 else x, state)
    new = mo.rescale(state, -0.5)
    for name in ("m", "v"):
        old, v = (optax.tree.get(s, name).parts.values for s in (state, new))
        assert_bit_equal(v, jax.tree.map(lambda x: -0.5 * x, old))
    counts = optax.GradientTransformation(
        lambda p: optax.TraceState({"w": p["w"], "seen": jnp.int32(7)}), lambda g, s, p=None: (g, s)
    )
    state = mo.compress(counts, {"trace"}, "bfloat16").init({"w": jnp.ones(3), "seen": jnp.int32(0)})
    new = mo.rescale(state, 4.0)
    assert avals(new) == avals(state)
    plain = new.inner.trace.plain
    assert int(plain["seen"]) == 7
    np.testing.assert_array_equal(new.inner.trace.parts.values[0]["w"], 4)


@pytest.mark.parametrize("factor", [1e39, -1e39, 1e-39, -1e-45, 5e-324, 1.7e308, 3.5e38])
def test_a_factor_that_no_normal_float32_holds_is_refused_by_its_range(factor):
    state = mo.sgd(0.1, 0.9).init(PARAMS)
    with pytest.raises(
        ValueError, match=r"factor for 'velocity' must be 0 or of a size in \[1\.18e-38, 3\.4e\+38\]"
    ) as error:
        mo.rescale(state, factor)
    assert len(str(error.value)) < 300
    for bad in (float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"factor for 'velocity' must be in \(-inf, inf\), got (inf|nan)"):
            mo.rescale(state, bad)


@pytest.mark.parametrize(
    "storage", [name if "float" in name else pytest.param(name, marks=pytest.mark.slow) for name in STORAGES]
)
def test_the_ends_of_float32_and_zero_are_factors(storage):
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9), storage=STORAGES[storage]())
    _, state = steps(tx)
    (none,) = mo.velocity(mo.rescale(state, 0))
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(none))
    _, after = steps(tx, 2, state=mo.rescale(state, 0.0))
    assert all(np.isfinite(x).all() and np.asarray(x).any() for x in jax.tree.leaves(mo.velocity(after)))
    tiny = float(np.finfo(np.float32).tiny)
    there = mo.rescale(mo.rescale(state, 2.0**60), tiny)
    for a, b in zip(*(jax.tree.leaves(mo.velocity(x)) for x in (there, state)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64) * 2.0**60 * tiny)
