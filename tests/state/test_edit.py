"""Surgery: `reset` against `init`, `rescale` against NumPy and against the run of the multiplied gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals
from conformance import gradients as drawn

import momentum_optax as mo

PARAMS = {"head": {"w": jnp.ones((8, 600))}, "body": jnp.ones((4, 3))}
UINT8 = mo.storage.uint8(min_size=1)
ADAM = {"mu": mo.storage.int8(min_size=1), "nu": UINT8}


def in_head(path):
    return path.startswith("head/")


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


def steps(tx, count=3, factor=1.0, state=None, start=0):
    """Updates and the state after some steps, compiled."""
    state = tx.init(PARAMS) if state is None else state
    update, out = compiled(tx), []
    for t in range(start, start + count):
        g = jax.tree.map(lambda x: x * jnp.float32(factor), drawn(PARAMS, t))
        u, state = update(g, state, PARAMS)
        out.append(u)
    return out, state


def full(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def debiased(storage):
    """Two velocities of different size, ages, gains, and a schedule after them."""
    rule = mo.quasi_hyperbolic(lambda t: 0.9 - 0.1 / (t + 2), 0.7)
    return optax.chain(
        mo.scale_by_momentum(rule, storage=STORAGES[storage](), debias=True), optax.scale_by_schedule(lambda t: -0.1)
    )


# int4 shares its layout with int8, which takes seconds.
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


@pytest.mark.parametrize(
    "storage", ["float32", "int8", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bfloat16", "int4"))]
)
def test_only_what_is_selected_changes(storage):
    tx = debiased(storage)
    _, state = steps(tx)
    fresh = tx.init(PARAMS)
    anew = jax.jit(mo.reset)(state, fresh)
    assert_bit_equal(anew[0], fresh[0])
    assert int(anew[1].count) == 3, "a schedule after it goes on"
    reset = jax.jit(lambda s, f, on: mo.reset(s, f, lambda path: on & in_head(path)))
    rescale = jax.jit(lambda s, on: mo.rescale(s, 2.0, lambda path: on & in_head(path)))
    for new, same in (
        (mo.rescale(state, 2.0, in_head), rescale(state, True)),
        (mo.reset(state, fresh, in_head), reset(state, fresh, True)),
    ):
        assert_bit_equal(new, same)
        assert avals(new) == avals(state)
        assert_bit_equal((new[0].step, new[1]), (state[0].step, state[1]))
        (old,), (v,) = mo.velocity(state), mo.velocity(new)
        assert_bit_equal(v["body"], old["body"])
        assert not np.array_equal(v["head"]["w"], old["head"]["w"])
    assert_bit_equal(v["head"], jax.tree.map(jnp.zeros_like, v["head"]))
    np.testing.assert_array_equal(new[0].gain[0]["head"]["w"], 0)
    assert_bit_equal(new[0].gain[0]["body"], state[0].gain[0]["body"])
    assert_bit_equal(reset(state, fresh, False), state)
    assert_bit_equal(rescale(state, False), state)


def test_a_parameter_that_begins_anew_has_its_first_step_again():
    # PyTorch's first gradient enters undampened, and only the first.
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9, dampening=0.75, first_step="gradient"))
    _, state = steps(tx)
    new = mo.reset(state, tx.init(PARAMS), in_head)
    (u,), after = steps(tx, 1, state=new, start=3)
    g, (before,) = drawn(PARAMS, 3), mo.velocity(state)
    np.testing.assert_allclose(u["head"]["w"], g["head"]["w"], rtol=1e-6)
    np.testing.assert_allclose(u["body"], 0.9 * before["body"] + 0.25 * g["body"], rtol=1e-5)
    np.testing.assert_array_equal(after.age["head"]["w"], 1)
    np.testing.assert_array_equal(after.age["body"], 4)


NESTED = {
    "alone": lambda tx: tx,
    "mini-batches": lambda tx: optax.MultiSteps(tx, 1),
    "masked": lambda tx: optax.masked(tx, {"head": True, "body": True}),
    "in chains": lambda tx: optax.chain(optax.clip(10.0), optax.chain(tx)),
    "injected": lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(1.0),
}


@pytest.mark.parametrize("name", NESTED)
def test_parameters_in_fields_of_optax_are_selected_however_deep_the_fields_are(name):
    tx = NESTED[name](optax.trace(0.9))
    _, state = steps(tx, 2)
    new = mo.rescale(state, {"trace": 4.0}, in_head)
    assert avals(new) == avals(state)
    (old,), (v,) = ([x for _, x in optax.tree.get_all_with_path(s, "trace")] for s in (state, new))
    assert_bit_equal(v, {"head": jax.tree.map(lambda x: 4 * x, old["head"]), "body": old["body"]})


@pytest.mark.parametrize("name", NESTED)
def test_a_partial_reset_asks_about_parameters_alone_and_lets_counters_go_on(name):
    # nu stays in float32 beside mu, and the counts belong to no parameter.
    tx = mo.compress(NESTED[name](optax.adam(0.1)), {"mu": "bfloat16"})
    _, state = steps(tx, 2)
    fresh, asked = tx.init(PARAMS), set()
    new = mo.reset(state, fresh, lambda path: asked.add(path) or in_head(path))
    every = mo.reset(state, fresh, lambda path: asked.add(path) or True)
    assert asked == {"head/w", "body"}
    nu, zero = (optax.tree.get(s.inner, "nu") for s in (state, fresh))
    assert_bit_equal(optax.tree.get(new.inner, "nu"), {"head": zero["head"], "body": nu["body"]})
    assert_bit_equal(optax.tree.get(every.inner, "nu"), zero)
    for after in (new, every):
        assert int(optax.tree.get(after.inner, "ScaleByAdamState").count) == 2
        assert int(after.step) == 2


WRAPPED = {
    "guarded": lambda: mo.guarded(mo.sgd(0.1, mo.nesterov(0.9)), "leaf"),
    "restart": lambda: optax.chain(mo.adaptive_restart(mo.nesterov(mo.schedules.fista())), optax.scale(-0.1)),
    "scheduled": lambda: mo.scheduled_restart(mo.sgd(0.1, 0.9), 100),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.ema(0.9)), "mean"),
    "masked": lambda: optax.masked(mo.sgd(0.1, 0.9), {"head": True, "body": False}),
    "injected": lambda: optax.inject_hyperparams(mo.sgd)(learning_rate=0.1, momentum=0.9),
    "accumulated": lambda: optax.MultiSteps(mo.sgd(0.1, 0.9), 1),
    "partitioned": lambda: optax.partition({"a": mo.sgd(0.1, 0.9), "b": mo.sgd(0.2, 0.9)}, {"head": "a", "body": "b"}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_velocities_are_found_in_any_state(name):
    tx = WRAPPED[name]()
    state = steps(tx, 2)[1]
    new = mo.rescale(state, 4.0)
    assert avals(new) == avals(state)
    assert_bit_equal(mo.velocity(new), jax.tree.map(lambda x: 4 * x, mo.velocity(state)))
    fresh = tx.init(PARAMS)
    anew = mo.reset(state, fresh)
    assert avals(anew) == avals(state)
    assert_bit_equal(mo.velocity(anew), mo.velocity(fresh))
    some = mo.velocity(mo.reset(state, fresh, in_head))
    for v, old in zip(some, mo.velocity(state), strict=True):
        assert not any(np.asarray(x).any() for x in jax.tree.leaves(v["head"]))
        assert_bit_equal(v["body"], old["body"])


def test_the_counters_of_wrappers_and_the_anchor_go_on():
    outer = mo.outer.diloco()
    state = outer.init(PARAMS)
    _, momentum = steps(mo.sgd(0.7, 0.9, nesterov=True))
    state = state._replace(momentum=momentum, anchor=drawn(PARAMS, 9))
    new = mo.reset(state, outer.init(PARAMS))
    assert_bit_equal(new.anchor, state.anchor)
    assert_bit_equal(new.momentum, outer.init(PARAMS).momentum)
    tx = WRAPPED["guarded"]()
    bad = jax.tree.map(lambda x: x * jnp.nan, PARAMS)
    _, state = compiled(tx)(bad, tx.init(PARAMS), PARAMS)
    assert int(mo.reset(state, tx.init(PARAMS)).skipped["body"].sum()) == 1


def test_fields_of_compress_begin_anew_as_their_optimizer_does():
    tx = mo.compress(optax.adagrad(0.1), {"sum_of_squares": "bfloat16"})
    _, state = steps(tx)
    fresh = tx.init(PARAMS)
    assert_bit_equal(mo.reset(state, fresh), fresh)  # 0.1, not zero
    tx = mo.compress(optax.adam(0.1), {"mu": "bfloat16"})  # nu stays in float32, beside it
    _, state = steps(tx)
    fresh = tx.init(PARAMS)
    new = mo.reset(state, fresh, in_head)
    assert_bit_equal(new.step, state.step)
    assert_bit_equal(new.inner[0].count, state.inner[0].count)
    assert_bit_equal(new.inner[0].nu, {"head": fresh.inner[0].nu["head"], "body": state.inner[0].nu["body"]})
    for a, b, part in zip(fresh.inner[0].mu.parts, state.inner[0].mu.parts, new.inner[0].mu.parts, strict=True):
        assert_bit_equal(part, ({"head": a[0]["head"], "body": b[0]["body"]},))


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


def test_a_partial_reset_reaches_all_that_compress_holds():
    # A field with a leaf that is too small to be kept in the storage, and velocities of our own inside.
    params = {"head": {"w": jnp.ones((4, 4)), "bias": jnp.ones(1)}, "body": jnp.ones((4, 4))}
    tx = mo.compress(optax.chain(optax.scale_by_adam(), mo.scale_by_momentum(mo.ema(0.9))), {"mu"}, "bfloat16")
    fresh = tx.init(params)
    _, state = jax.jit(tx.update)(drawn(params, 0), fresh, params)
    new = mo.reset(state, fresh, in_head)
    for part in (lambda s: s.inner[0].mu.plain, lambda s: s.inner[0].nu, lambda s: mo.velocity(s)[0]):
        old, begin, now = (part(s) for s in (state, fresh, new))
        assert_bit_equal(now, {"head": begin["head"], "body": old["body"]})
        assert not np.array_equal(begin["head"]["bias"], old["head"]["bias"])


def test_errors_say_what_is_allowed():
    _, state = steps(mo.sgd(0.1, 0.9))
    for call in (lambda s, f: mo.rescale(s, 2.0, f), lambda s, f: mo.reset(s, mo.sgd(0.1, 0.9).init(PARAMS), f)):
        with pytest.raises(ValueError, match=r"true of a parameter, and is false of all: 'body', 'head/w'"):
            call(state, lambda path: False)
        with pytest.raises(TypeError, match=r"select must return True or False, got 1 for"):
            call(state, lambda path: 1)
    with pytest.raises(ValueError, match=r"fresh must be .* 2/velocity must be a Float32Velocity, got a Int8Velocity"):
        mo.reset(state, mo.sgd(0.1, 0.9, storage="int8").init(PARAMS))
    with pytest.raises(ValueError, match=r"opt_state must hold a state of scale_by_momentum or compress, got none"):
        mo.reset(*[optax.adam(0.1).init(PARAMS)] * 2)
    with pytest.raises(ValueError, match=r"opt_state must hold velocities"):
        mo.rescale(optax.adam(0.1).init(PARAMS), 2.0)
    with pytest.raises(ValueError, match=r"factor must name fields of floats in opt_state, got 'trace'"):
        mo.rescale(state, {"velocity": 2.0, "trace": 2.0})
    with pytest.raises(ValueError, match=r"fields of floats, got 'count' of int32"):
        mo.rescale(optax.adam(0.1).init(PARAMS), {"count": 2.0})
    with pytest.raises(ValueError, match=r"factor for 'velocity' must be in \(-inf, inf\), got nan"):
        mo.rescale(state, float("nan"))
    with pytest.raises(TypeError, match=r"factor for 'velocity' must be a number, got 'x'"):
        mo.rescale(state, "x")
    adam = mo.compress(optax.adam(0.1), ADAM).init(PARAMS)
    with pytest.raises(ValueError, match=r"factor for 'nu' must be in \[0, inf\), got -1"):
        mo.rescale(adam, {"nu": -1})


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
