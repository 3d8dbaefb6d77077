"""`convert` between storages: of rules, of compressed fields, and of both."""

import jax
import jax.numpy as jnp
import optax
import pytest
from compressed import (
    BYTES,
    OPTIMIZERS,
    PARAMS,
    STORAGES,
    distance,
    opened,
    run,
    signal,
)
from conformance import assert_bit_equal, avals

import momentum_optax as mo
from momentum_optax.wrappers.compress import CompressedState

TRANSFORMS = {
    "heavy_ball": lambda s: mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s),
    "scheduled": lambda s: mo.scale_by_momentum(mo.nesterov(mo.schedules.fista()), storage=s),
    "aggregated": lambda s: mo.scale_by_momentum(mo.aggregated((0.0, 0.9, 0.99)), storage=s),
    "debiased": lambda s: mo.scale_by_momentum(mo.ema(0.9), storage=s, debias=True),
    "chained": lambda s: mo.sgd(0.1, 0.9, dampening=0.3, weight_decay=0.1, storage=s),
    "none": lambda s: optax.chain(
        mo.scale_by_momentum(mo.aggregated((0.0,)), storage=s), mo.scale_by_momentum(mo.ema(0.9), storage=s)
    ),
    "adam": lambda s: mo.compress(optax.adam(1e-2), {"mu"}, s),
    "partition": lambda s: mo.compress(OPTIMIZERS["partition"][0](), {"mu", "trace"}, s),
    "both": lambda s: optax.chain(
        mo.scale_by_momentum(mo.ema(0.9), storage=s), mo.compress(optax.adam(1e-2), {"mu"}, s)
    ),
}


def velocities(state):
    """All velocities and compressed fields, decoded."""
    found = [
        optax.tree.get_all_with_path(opened(x), name)
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, CompressedState))
        if isinstance(x, CompressedState)
        for name in ("mu", "trace")
    ]
    return mo.velocity(state), [v for pairs in found for _, v in pairs]


@pytest.mark.one_in(16)
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(("old", "new"), [("float32", "int8"), ("int8", "bfloat16"), ("bfloat16", "float32")])
def test_a_converted_state_is_one_of_the_new_optimizer_with_the_old_velocities(name, old, new):
    make = TRANSFORMS[name]
    params = {**PARAMS, "empty": jnp.zeros((0, 2))}
    _, state = run(make(STORAGES[old]), 3, params)
    tx = make(STORAGES[new])
    like = jax.eval_shape(tx.init, params)
    converted = mo.convert(state, STORAGES[new], like=like)
    assert avals(converted) == avals(like)
    most = {"float32": 1e-12, "bfloat16": 2.0**-7, "int8": 0.05}[new]
    assert distance(velocities(converted), velocities(state)) < most
    g = signal(1, params)[0]
    u, after = jax.jit(tx.update)(g, converted, params)
    assert avals(after) == avals(like)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(u))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_float32_to_bytes_and_back_needs_no_example(name):
    make = TRANSFORMS[name]
    state = run(make("float32"), 3)[1]
    there = mo.convert(state, BYTES)
    assert avals(there) == avals(make(BYTES).init(PARAMS))
    back = mo.convert(there, "float32")
    assert distance(velocities(back), velocities(there)) == 0.0
    assert_bit_equal(run(make("float32"), 3)[1], state)  # the state that was given is as it was


def test_a_converted_state_goes_on_as_the_old_one():
    def make(s):
        return optax.chain(mo.scale_by_momentum(mo.heavy_ball(0.9), storage=s), optax.scale(-0.1))

    _, state = run(make("float32"), 5)
    exact, ours, tx = state, mo.convert(state, BYTES), make(BYTES)
    for g in signal(10):
        _, exact = make("float32").update(g, exact)
        _, ours = tx.update(g, ours)
    assert distance(mo.velocity(ours), mo.velocity(exact)) < 0.05


def test_a_mapping_converts_what_it_names():
    tx = mo.compress(optax.adam(1e-2), {"mu": "float32", "nu": "float32"})
    _, state = run(tx, 3)
    new = mo.convert(state, {"mu": BYTES, "nu": "bfloat16"})
    assert avals(new) == avals(mo.compress(optax.adam(1e-2), {"mu": BYTES, "nu": "bfloat16"}).init(PARAMS))
    new = mo.convert(state, {"mu": BYTES})
    assert_bit_equal(new.inner[0].nu, state.inner[0].nu)
    assert mo.convert(new, {"mu": "float32"}).step is not None  # nu might need it
    assert mo.convert(new, "float32").step is None


@pytest.mark.parametrize("new", ["bfloat16", {"velocity": "bfloat16", "mu": "bfloat16"}], ids=["all", "by name"])
def test_a_converted_state_goes_on_counting(new):
    # Both count for their storage, and the first for its schedule too.
    rule = mo.nesterov(mo.schedules.fista())
    tx = optax.chain(mo.scale_by_momentum(rule, storage="bfloat16"), mo.compress(optax.adam(1e-2), {"mu"}, "bfloat16"))
    state = tuple(s._replace(step=jnp.int32(3)) for s in tx.init({"w": jnp.ones(4)}))
    # Float32 needs no count, and the schedule does.
    assert int(mo.convert(mo.convert(state, "float32"), new)[0].step) == 3
    assert [int(s.step) for s in mo.convert(state, new)] == [3, 3]


def test_a_conversion_is_told_which_fields_are_squares():
    state = mo.compress(optax.adam(1e-2), {"mu", "nu"}, "float32", second_moments=()).init(PARAMS)
    assert avals(mo.convert(state, BYTES, second_moments=())) == avals(
        mo.convert(state, {"mu": BYTES, "nu": BYTES}, second_moments=())
    )
    with pytest.raises(ValueError, match="'mu' holds second moments"):
        mo.convert(state, BYTES, second_moments={"mu"})


def test_an_example_gives_a_converted_state_its_width_back(x64):
    params = {"w": jnp.ones((4, 4), jnp.float64)}
    tx = mo.scale_by_momentum(mo.ema(0.9))
    there = mo.convert(tx.init(params), "bfloat16")
    assert mo.velocity(mo.convert(there, "float32"))[0]["w"].dtype == jnp.float32
    back = mo.convert(there, "float32", like=jax.eval_shape(tx.init, params))
    assert avals(back) == avals(tx.init(params))


def test_conversion_errors():
    state = mo.compress(optax.adam(1e-2), {"mu": BYTES, "nu": "float32"}).init(PARAMS)
    with pytest.raises(ValueError, match="'nu' holds second moments"):
        mo.convert(state, "int8")
    with pytest.raises(ValueError, match=r"it has 'mu', 'nu'\), got 'velocity'"):
        mo.convert(state, {"velocity": "int8"})
    for squares in ("uint8", {"velocity": "uint8"}):
        with pytest.raises(ValueError, match="'velocity' may hold values of either sign"):
            mo.convert(mo.scale_by_momentum(mo.ema(0.9)).init(PARAMS), squares)
    with pytest.raises(ValueError, match="it has none"):
        mo.convert(optax.adam(1e-2).init(PARAMS), "int8")
    with pytest.raises(ValueError, match="like must have the structure"):
        mo.convert(state, "float32", like=optax.sgd(1e-2, 0.9).init(PARAMS))
    other = mo.compress(optax.adam(1e-2), {"mu", "nu"}, "float32").init({**PARAMS, "w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="like must have the shapes"):
        mo.convert(state, "float32", like=other)
    with pytest.raises(ValueError, match="storage must be one of"):
        mo.convert(state, "int7")
    mo.convert(mo.compress(optax.adan(1e-2), {"v"}, "float32").init(PARAMS), "int8")  # of either sign
