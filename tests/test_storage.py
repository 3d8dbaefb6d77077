"""The laws of `storage/protocol.py`, over every storage, and what each one promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import STORAGES

import momentum_optax as mo

SHAPES = [(), (0,), (7,), (3, 5), (2, 1, 4)]
RELATIVE_ERROR = {"float32": 0.0, "bfloat16": 2.0**-8}
every_storage = pytest.mark.parametrize("name", STORAGES)


def make(name):
    return getattr(mo.storage, name)()


def samples(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, size=shape), jnp.float32)


def stored(storage, *velocities):
    fresh = storage.init(jax.ShapeDtypeStruct(velocities[0].shape, velocities[0].dtype), len(velocities))
    return storage.encode(velocities, fresh)


def test_every_storage_has_a_stated_error():
    assert set(RELATIVE_ERROR) == set(STORAGES)


@every_storage
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_storage_decodes_to_zeros(name, shape):
    storage = make(name)
    decoded = storage.parts.decode(storage.init(jax.ShapeDtypeStruct(shape, jnp.bfloat16), 3))
    assert [v.shape for v in decoded] == [shape] * 3
    assert all(v.dtype == jnp.float32 and not v.any() for v in decoded)


@every_storage
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_keeps_the_types_of_init(name, shape):
    storage = make(name)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64):
        fresh = storage.init(jax.ShapeDtypeStruct(shape, dtype), 2)
        given = tuple(
            samples(shape, k).astype(jnp.complex64 if dtype == jnp.complex64 else jnp.float32) for k in (1, 2)
        )
        again = storage.encode(given, fresh)
        assert jax.tree.structure(again) == jax.tree.structure(fresh)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(again)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(fresh)
        ]


@every_storage
def test_the_error_is_within_the_stated_one_and_zeros_and_signs_are_kept(name):
    storage, values = make(name), samples((4000,)).at[::7].set(0.0)
    (decoded,) = storage.parts.decode(stored(storage, values))
    values, decoded = np.asarray(values, np.float64), np.asarray(decoded, np.float64)
    assert np.all(abs(decoded - values) <= RELATIVE_ERROR[name] * abs(values))
    assert np.array_equal(np.sign(decoded), np.sign(values))
    if RELATIVE_ERROR[name]:
        assert abs(decoded - values).max() > 0, "a storage that loses nothing should say so"


@every_storage
def test_what_is_decoded_is_encoded_again_without_change(name):
    storage = make(name)
    first = stored(storage, samples((1000,)))
    again = storage.encode(storage.parts.decode(first), first)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@every_storage
def test_non_finite_velocities_stay_visible(name):
    storage = make(name)
    (decoded,) = storage.parts.decode(stored(storage, jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1.0])))
    np.testing.assert_array_equal(decoded, [np.nan, np.inf, -np.inf, 1.0])


@every_storage
def test_a_complex_leaf_keeps_its_dtype(name):
    storage, values = make(name), jnp.asarray([1 + 2j, -0.1j], jnp.complex64)
    (decoded,) = storage.parts.decode(stored(storage, values))
    np.testing.assert_array_equal(decoded, values)


def test_bfloat16_takes_two_bytes_per_parameter_and_velocity():
    params = {"w": jnp.zeros((64, 32)), "b": jnp.zeros(32, jnp.bfloat16)}
    for storage, width in (("float32", 4), ("bfloat16", 2)):
        state = mo.scale_by_momentum(mo.aggregated(), storage=storage).init(params)
        assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * width * (64 * 32 + 32)


@pytest.mark.parametrize(("decay", "limit"), [(0.9, 0.984), (0.99, 0.805), (0.999, 0.25), (0.9999, 0.031)])
def test_a_slow_average_stalls_in_nearest_bfloat16_as_its_text_says(decay, limit):
    assert f"{limit:g}" in mo.storage.bfloat16.__doc__
    tx = mo.scale_by_momentum(mo.ema(decay), storage="bfloat16")
    state = jax.lax.fori_loop(0, int(20 / (1 - decay)), lambda _, s: tx.update(jnp.ones(3), s)[1], tx.init(jnp.ones(3)))
    assert float(mo.velocity(state)[0][0]) == pytest.approx(limit, abs=6e-4)


def test_an_own_storage_works_through_the_protocol():
    class Own:
        """Float32 by another name: nothing but the protocol is there to be used."""

        parts = mo.storage.float32().parts

        def init(self, leaf, order):
            return mo.storage.float32().init(leaf, order)

        def encode(self, velocities, previous):
            return mo.storage.float32().encode(velocities, previous)

    g = samples((5, 3))
    ours, theirs = (mo.scale_by_momentum(mo.nesterov(0.9), storage=s) for s in (Own(), "float32"))
    a, b = ours.init(g), theirs.init(g)
    for _ in range(3):
        (u, a), (w, b) = ours.update(g, a), theirs.update(g, b)
        np.testing.assert_array_equal(u, w)
