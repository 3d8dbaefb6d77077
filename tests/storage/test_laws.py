"""The laws of `storage/protocol.py`, over every storage, and what each one promises."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, storages_with
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import momentum_optax as mo

SHAPES = [(), (0,), (7,), (3, 5), (2, 1, 4)]
# Of one rounding, relative to the value; those of int8 and int4 depend on scales and are in tests of their own.
RELATIVE_ERROR = {"float32": 0.0, "bfloat16": 2.0**-7, "int8": 0.0, "int4": 0.0}
# Those with scales, which leave small leaves in full unless they are told otherwise; and those in floats.
SCALED = [name for name in storages_with("min_size") if name in STORAGES]
FLOATS = [name for name in STORAGES if name not in SCALED]
every_storage = pytest.mark.parametrize("name", STORAGES)
# Those that round at random. What others add to bfloat16 and int8 takes seconds to compile.
NOISY = [name for name in storages_with("seed") if name in STORAGES]
every_noisy_storage = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("bfloat16", "int8") else pytest.mark.slow) for name in NOISY]
)


def make(name):
    # Bytes for every leaf, however small, so that the laws look at bytes.
    return getattr(mo.storage, name)(**({"min_size": 1} if name in SCALED else {}))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def samples(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * 10.0 ** rng.integers(-30, 30, size=shape), jnp.float32)


STAMP = jnp.uint32(12345)


def context(stamp, order):
    """The `EncodeContext` for `order` velocities of equal size."""
    return mo.storage.EncodeContext(stamp, (1.0,) * order)


def stored(storage, *velocities, stamp=STAMP):
    fresh = storage.init(jax.ShapeDtypeStruct(velocities[0].shape, velocities[0].dtype), len(velocities))
    return storage.encode(velocities, fresh, context(stamp, len(velocities)))


def test_every_storage_has_a_stated_error():
    assert set(RELATIVE_ERROR) == set(STORAGES)


@pytest.mark.parametrize("name", storages_with("min_size"))
def test_a_storage_with_scales_has_a_file_of_tests(name):
    text = pathlib.Path(__file__).with_name(f"test_{name}.py").read_text()
    assert f"mo.storage.{name}.__doc__" in text, "test what its docstring promises"


@pytest.mark.one_in(8)
@every_storage
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fresh_storage_decodes_to_zeros(name, shape):
    storage = make(name)
    decoded = storage.state_type.decode(storage.init(jax.ShapeDtypeStruct(shape, jnp.bfloat16), 3))
    assert [v.shape for v in decoded] == [shape] * 3
    assert all(v.dtype == jnp.float32 and not v.any() for v in decoded)


@pytest.mark.one_in(2)
@every_storage
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_keeps_the_types_of_init(name, shape):
    storage = make(name)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64):
        fresh = storage.init(jax.ShapeDtypeStruct(shape, dtype), 2)
        given = tuple(
            samples(shape, k).astype(jnp.complex64 if dtype == jnp.complex64 else jnp.float32) for k in (1, 2)
        )
        again = storage.encode(given, fresh, context(STAMP, 2))
        assert jax.tree.structure(again) == jax.tree.structure(fresh)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(again)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(fresh)
        ]


@pytest.mark.parametrize("name", FLOATS)
def test_the_error_is_within_the_stated_one_and_zeros_and_signs_are_kept(name):
    storage, values = make(name), samples((4000,)).at[::7].set(0.0)
    (decoded,) = storage.state_type.decode(stored(storage, values))
    values, decoded = np.asarray(values, np.float64), np.asarray(decoded, np.float64)
    assert np.all(abs(decoded - values) <= RELATIVE_ERROR[name] * abs(values))
    assert np.array_equal(np.sign(decoded), np.sign(values))
    if RELATIVE_ERROR[name]:
        assert abs(decoded - values).max() > 0, "a storage that loses nothing should say so"


@pytest.mark.parametrize("storage", [mo.storage.float32(), mo.storage.bfloat16("nearest"), mo.storage.bfloat16()])
def test_what_is_decoded_is_encoded_again_without_change(storage):
    first = stored(storage, samples((1000,)))
    decoded = storage.state_type.decode(first)
    again = storage.encode(decoded, first, context(jnp.uint32(7), 1))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FLOATS)
def test_non_finite_velocities_stay_visible(name):
    storage = make(name)
    (decoded,) = storage.state_type.decode(stored(storage, jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1.0])))
    np.testing.assert_array_equal(decoded, [np.nan, np.inf, -np.inf, 1.0])


@pytest.mark.parametrize("storage", [*map(make, STORAGES), mo.storage.uint8(min_size=1)], ids=[*STORAGES, "uint8"])
def test_a_leaf_whose_codes_are_the_velocities_stays_so(storage):
    values = tuple(abs(samples((3, 5), k)) for k in (1, 2, 3, 4))
    fresh = storage.init(jax.ShapeDtypeStruct((3, 5), jnp.float32), 2)
    full = fresh._replace(**{fresh._fields[0]: values[:2]})
    again = storage.encode(values[2:], full, context(STAMP, 2))
    for parts, expected in ((full, values[:2]), (again, values[2:])):
        np.testing.assert_array_equal(storage.state_type.decode(parts), expected)


@every_storage
def test_a_complex_leaf_keeps_its_dtype(name):
    storage, values = make(name), jnp.asarray([1 + 2j, -0.1j], jnp.complex64)
    (decoded,) = storage.state_type.decode(stored(storage, values))
    np.testing.assert_array_equal(decoded, values)


def width(x):
    """Bytes of an array where int4 is packed, two to a byte."""
    return x.size * (0.5 if x.dtype == jnp.int4 else x.dtype.itemsize)


@every_storage
def test_the_bytes_of_a_large_leaf_are_the_stated_ones_and_scales(name):
    storage = getattr(mo.storage, name)()
    params = {"w": jnp.zeros((256, 768)), "b": jnp.zeros(8192, jnp.bfloat16)}
    for rule in (mo.heavy_ball(0.9), mo.aggregated()):
        state = mo.scale_by_momentum(rule, storage=storage).init(params)
        held = sum(width(x) for x in jax.tree.leaves(state.velocity)) / (256 * 768 + 8192) / rule.pruned().order
        assert storage.bytes_per_parameter <= held <= storage.bytes_per_parameter + (0.03 if name in SCALED else 0)


@pytest.mark.parametrize("storage", [mo.storage.int8, mo.storage.int4, mo.storage.uint8], ids=["int8", "int4", "uint8"])
def test_a_leaf_of_min_size_elements_takes_bytes_and_one_of_fewer_is_kept_in_full(storage):
    keep, narrow = storage(min_size=21), storage(min_size=1)
    for shape in ((3, 7), (21,)):
        smaller = (*shape[:-1], shape[-1] - 1)
        leaf, less = (jax.ShapeDtypeStruct(n, jnp.float32) for n in (shape, smaller))
        assert keep.init(leaf, 1).codes[0].dtype == narrow.init(leaf, 1).codes[0].dtype != jnp.float32
        assert keep.init(less, 1).codes[0].dtype == jnp.float32


@pytest.mark.one_in(2)
@every_noisy_storage
def test_after_a_change_of_sign_the_next_write_is_as_exact(name):
    storage, (first, second) = make(name), (0.1 * samples((4, 600), k) / 1e30 for k in (1, 2))
    before = storage.encode((second,), stored(storage, first), context(STAMP, 1))
    rescaled = [type(before).rescale(before, jnp.float32(factor)) for factor in (-0.5, 0.5)]
    # What is known of the velocities is how large they are: their sign is not remembered.
    for a, b in zip(*(jax.tree.leaves(storage.encode((first,), x, context(STAMP, 1))) for x in rescaled), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.one_in(2)
@every_storage
def test_neighbouring_values_are_as_far_apart_as_stated(name):
    storage, values = make(name), jnp.linspace(0.9, 1.0, 4097)[None]
    before, write = stored(storage, values), context(STAMP, 1)
    if name in SCALED:  # a scale of 1 exactly, or square roots up to 1
        before = before._replace(reach=(jnp.full((1, 1), 1 / storage.code.share),))
        write = write._replace(entering=(jnp.zeros_like(values), 0.0, True))
    (kept,) = storage.state_type.decode(storage.encode((values,), before, write))
    error = abs(np.asarray(kept, np.float64) - np.asarray(values)).max()
    assert error <= storage.step_size
    assert name == "float32" or error > 0.2 * storage.step_size


@pytest.mark.parametrize(("decay", "limit"), [(0.9, 0.984), (0.99, 0.805), (0.999, 0.25), (0.9999, 0.031)])
def test_a_slow_average_stalls_in_nearest_bfloat16_as_its_text_says(decay, limit):
    assert f"{limit:g}" in mo.storage.bfloat16.__doc__
    tx = mo.scale_by_momentum(mo.ema(decay), storage=mo.storage.bfloat16("nearest"))
    state = jax.lax.fori_loop(0, int(20 / (1 - decay)), lambda _, s: tx.update(jnp.ones(3), s)[1], tx.init(jnp.ones(3)))
    assert float(mo.velocity(state)[0][0]) == pytest.approx(limit, abs=6e-4)


def test_an_own_storage_works_through_the_protocol():
    class Own:
        """Float32 by another name: nothing but the protocol is there to be used."""

        state_type = mo.storage.float32().state_type
        reads_step = False

        def init(self, leaf, order):
            return mo.storage.float32().init(leaf, order)

        def encode(self, velocities, previous, context):
            assert context.stamp is None
            return mo.storage.float32().encode(velocities, previous, context)

    g = samples((5, 3))
    ours, theirs = (mo.scale_by_momentum(mo.nesterov(0.9), storage=s) for s in (Own(), "float32"))
    a, b = ours.init(g), theirs.init(g)
    for _ in range(3):
        (u, a), (w, b) = ours.update(g, a), theirs.update(g, b)
        np.testing.assert_array_equal(u, w)


def test_stochastic_rounding_has_no_bias():
    # Values over 24 decades, each rounded under 10,000 stamps; the two neighbours in bfloat16 give the standard error.
    values = jnp.asarray([s * m * 10.0**e for e in (-12, -3, 0, 12) for m in (1.0, 1.2345, 1.999) for s in (1, -1)])
    storage = mo.storage.bfloat16()
    decode = jax.vmap(lambda stamp: storage.state_type.decode(stored(storage, values, stamp=stamp))[0])
    rounded = np.asarray(decode(jnp.arange(10_000, dtype=jnp.uint32)), np.float64)
    exact = np.asarray(values, np.float64)
    low, high = rounded.min(0), rounded.max(0)
    deviation = np.sqrt(np.maximum((high - exact) * (exact - low), 0))
    assert np.all(abs(rounded.mean(0) - exact) <= 4 * deviation / 100)
    assert np.sum(low < high) >= 16, "most values lie between two of bfloat16"


def test_stochastic_rounding_never_turns_a_finite_value_into_infinity():
    largest = jnp.full((1000,), jnp.finfo(jnp.float32).max)
    (decoded,) = mo.storage.bfloat16().state_type.decode(stored(mo.storage.bfloat16(), largest))
    assert np.all(np.asarray(decoded) == np.float32(jnp.finfo(jnp.bfloat16).max))


class Sum(NamedTuple):
    """Two fields that end every step as the gradient."""

    first: Any
    second: Any


def assert_rounded_apart(kept, exact):
    """The errors of all arrays of `kept`, each of which stands for `exact`, are not related."""
    errors = np.array([np.ravel(np.float64(x) - np.float64(exact)) for x in jax.tree.leaves(kept)])
    assert len(errors) > 1
    assert np.all(errors.std(1) > 0)
    for i, error in enumerate(errors):
        products = error * errors[i + 1 :]
        assert np.all(abs(products.sum(1)) < 5 * np.sqrt((products**2).sum(1)))


@every_noisy_storage
def test_equal_velocities_of_a_leaf_are_rounded_apart(name):
    storage, v = make(name), normal(8, 512)
    parts = storage.init(v, 2)
    for stamp in range(3):
        parts = storage.encode((v, v), parts, context(jnp.uint32(stamp), 2))
    assert_rounded_apart(storage.state_type.decode(parts), v)


def test_equal_leaves_are_rounded_apart_in_every_step():
    g = normal(64, 64)
    # It forgets at once, so that what is rounded is always the gradient.
    tx = mo.scale_by_momentum(mo.Filter(0.0, 1.0, 1.0, 0.0), storage="bfloat16")
    state, step, kept = tx.init({"a": g, "b": g}), jax.jit(lambda s: tx.update({"a": g, "b": g}, s)[1]), []
    for _ in range(3):
        state = step(state)
        kept.append(mo.velocity(state))
    assert_rounded_apart(kept, g)


@pytest.mark.slow
def test_equal_fields_and_states_are_rounded_apart_at_init_in_steps_and_when_converted():
    g = normal(64, 64)

    def optimizer(storage):
        # It keeps its gradients, twice; its state begins as the parameters.
        twice = optax.GradientTransformation(lambda params: Sum(params, params), lambda g, s, p=None: (g, Sum(g, g)))
        balls = [mo.scale_by_momentum(mo.heavy_ball(0.9))] * 2
        return optax.chain(*balls, mo.compress(twice, {"first", "second"}, storage))

    @jax.jit
    def states(g):
        narrow, wide = optimizer("bfloat16"), optimizer("float32")
        first = narrow.init({"a": g, "b": g})
        # A heavy ball's first velocity and first update are the gradient.
        second, exact = (tx.update({"a": g, "b": g}, tx.init({"a": g, "b": g}))[1] for tx in (narrow, wide))
        return first, second, mo.convert(exact, "bfloat16")

    for state in states(g):
        assert_rounded_apart([x.parts.values for x in state[2].inner], g)
    assert_rounded_apart(mo.velocity(state), g)


@pytest.mark.slow
def test_a_slow_average_reaches_its_limit_in_stochastic_bfloat16():
    for decay in (0.99, 0.9999):
        tx = mo.scale_by_momentum(mo.ema(decay), storage="bfloat16")
        ones, steps = jnp.ones(4096), int(20 / (1 - decay))
        state = jax.lax.fori_loop(0, steps, lambda _, s, tx=tx, ones=ones: tx.update(ones, s)[1], tx.init(ones))
        assert float(mo.velocity(state)[0].mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.one_in(9)
@every_noisy_storage
def test_noise_that_would_depend_on_the_mesh_is_refused_under_shard_map(name):
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9), storage=make(name))
    g = samples((64, 512))

    def step(g):
        u, state = tx.update(g, tx.init(g))
        return u, mo.velocity(state)[0]

    def run(step, spec, **options):
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, **options))(g)

    # Whole on every device, as in data-parallel training: what one device writes.
    for here, there in zip(run(step, P()), jax.jit(step)(g), strict=True):
        np.testing.assert_array_equal(here, there)
    with pytest.raises(ValueError, match="varies along 'data'"):
        run(step, P("data"))
    # JAX does not know then what is whole; nor under pmap.
    for spec in (P(), P("data")):
        with pytest.raises(ValueError, match=r"cannot know if leaves are split along 'data'.*axis_names=\(\)"):
            run(step, spec, check_vma=False)
    if getattr(jax.config, "jax_pmap_shmap_merge", True):  # else JAX 0.7.2, whose pmap is no shard_map
        with pytest.raises(ValueError, match="cannot know if leaves are split"):
            jax.pmap(step, "data")(g.reshape(8, 8, 512))
    whole = mo.scale_by_momentum(mo.heavy_ball(0.9), storage=dataclasses.replace(make(name), axis_names=()))

    def said(g):
        u, state = whole.update(g, whole.init(g))
        return u, mo.velocity(state)[0]

    for here, there in zip(run(said, P(), check_vma=False), jax.jit(step)(g), strict=True):
        np.testing.assert_array_equal(here, there)
    adam = mo.compress(optax.adam(1e-3), {"mu"}, make(name))
    with pytest.raises(ValueError, match="varies along 'data'"):
        run(lambda g: adam.update(g, adam.init(g))[0], P("data"))


@pytest.mark.parametrize("name", STORAGES)
def test_a_step_is_a_few_equations_for_each_further_leaf(name):
    """Tracing all equations anew for each leaf takes seconds for a model: most are traced once per shape."""
    tx = mo.sgd(0.1, mo.nesterov(mo.schedules.fista()), storage=make(name))

    def equations(leaves):
        params = [jax.ShapeDtypeStruct((16, 16), jnp.float32)] * leaves
        state = jax.eval_shape(tx.init, params)
        return len(jax.make_jaxpr(tx.update)(params, state).eqns)

    # Float32's own: convert two coefficients, four products and sums, the learning rate.
    assert equations(3) - equations(2) <= {"float32": 12, "bfloat16": 20, "int8": 20, "int4": 20}[name]
    assert equations(3) - equations(2) == equations(8) - equations(7)


# The laws once more, over leaves that nobody thought of.

examples = settings(max_examples=12, derandomize=True, deadline=None, database=None)
floats = st.floats(-(2.0**60), 2.0**60, width=32, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-18)
# Few shapes: every one of them is compiled.
leaves = st.sampled_from([(7,), (3, 5)]).flatmap(lambda shape: arrays(np.float32, shape, elements=floats))
stamps = st.integers(0, 2**32 - 1)


@pytest.mark.one_in(2)
@every_storage
@examples
@given(leaf=leaves, stamp=stamps)
def test_any_leaf_keeps_zeros_signs_and_types(name, leaf, stamp):
    storage, v = make(name), jnp.asarray(leaf)
    state = storage.init(v, 1)
    for t in range(2):  # with a scale and without one
        new = storage.encode((v,), state, context(jnp.uint32(stamp) + np.uint32(t), 1))
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(new)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(state)
        ]
        state = new
        (read,) = map(np.asarray, storage.state_type.decode(state))
        assert np.all(np.isfinite(read))
        assert np.all(read[leaf == 0] == 0)
        # A small value may be read as one of the other sign, by less than a step of its row.
        assert np.all(read[leaf > 0] >= -abs(read).max() * storage.step_size)
        assert np.all(read[leaf < 0] <= abs(read).max() * storage.step_size)


@pytest.mark.one_in(3)
@every_storage
@examples
@given(leaf=leaves, exponent=st.integers(-20, 20), stamp=stamps)
def test_a_power_of_two_rescales_any_leaf_exactly(name, leaf, exponent, stamp):
    storage, v = make(name), jnp.asarray(leaf)
    state = storage.encode((v,), storage.init(v, 1), context(jnp.uint32(stamp), 1))
    state = storage.encode((v,), state, context(jnp.uint32(stamp) ^ np.uint32(1), 1))
    (read,) = storage.state_type.decode(state)
    (scaled,) = storage.state_type.decode(storage.state_type.rescale(state, 2.0**exponent))
    np.testing.assert_array_equal(np.asarray(read) * np.float32(2.0**exponent), scaled)


@pytest.mark.parametrize("name", FLOATS)
@examples
@given(leaf=leaves, stamp=stamps)
def test_any_value_in_floats_has_the_stated_error(name, leaf, stamp):
    (read,) = make(name).state_type.decode(stored(make(name), jnp.asarray(leaf), stamp=jnp.uint32(stamp)))
    assert np.all(abs(np.asarray(read, np.float64) - leaf) <= RELATIVE_ERROR[name] * abs(np.float64(leaf)))
