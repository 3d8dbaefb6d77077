"""Only the selected parameters change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, avals
from conformance import gradients as drawn
from state.edited import MODULE, PARAMS, Module, debiased, in_head, steps

import momentum_optax as mo


@pytest.mark.one_in(3)
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


@pytest.mark.one_in(2)
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


def test_attributes_of_classes_that_hold_parameters_are_no_fields_of_states():
    tx = mo.compress(optax.adam(0.1), {"mu"}, "bfloat16")
    fresh = tx.init(MODULE)
    _, state = tx.update(MODULE, fresh, MODULE)
    nu, zero = (optax.tree.get(s.inner, "nu") for s in (state, fresh))
    asked = set()
    new = mo.reset(state, fresh, lambda path: asked.add(path) or path == "layers/0")
    assert asked == {"mu", "layers/0"}
    assert_bit_equal(optax.tree.get(new.inner, "nu"), Module(nu.mu, zero.layers))
    new = mo.rescale(state, {"mu": 2.0, "nu": 4.0}, lambda path: path == "mu")
    assert_bit_equal(optax.tree.get(new.inner, "nu"), Module(4 * nu.mu, nu.layers))
    # The parameter called mu is not Adam's first moment.
    assert_bit_equal(optax.tree.get(mo.rescale(state, {"mu": 2.0}).inner, "nu"), nu)
    with pytest.raises(ValueError, match="factor must name fields of floats in opt_state, got 'mu'"):
        mo.rescale(optax.trace(0.9).init(MODULE), {"mu": 2.0})


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
