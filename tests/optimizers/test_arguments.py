"""Shared arguments: masks of the weight decay, and combinations that would do nothing or two things."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import finished_optimizers

import momentum_optax as mo

# Each optimizer with a weight decay, at the rate 0.1.
DECAYING = {
    "sgd": lambda **options: mo.sgd(0.1, **options),
    "sgd with momentum": lambda **options: mo.sgd(0.1, 0.9, **options),
    "lion": lambda **options: mo.lion(0.1, **options),
    "signum": lambda **options: mo.signum(0.1, **options),
    "muon": lambda **options: mo.muon(0.1, **options),
    "normuon": lambda **options: mo.normuon(0.1, **options),
    "mars_adamw": lambda **options: mo.contrib.mars_adamw(0.1, **options),
    "mars_lion": lambda **options: mo.contrib.mars_lion(0.1, **options),
}
ONES = {"w": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}


def test_every_optimizer_with_a_weight_decay_takes_a_mask():
    takes = {name: set(inspect.signature(f).parameters) for name, f in finished_optimizers().items()}
    masked = {name for name, arguments in takes.items() if "mask" in arguments}
    assert masked == {name.split(" ")[0] for name in DECAYING}
    assert masked == {name for name, arguments in takes.items() if "weight_decay" in arguments}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda p: jax.tree.map(lambda x: x.shape[0] > 2, p)])
@pytest.mark.parametrize("name", DECAYING)
def test_a_mask_says_which_parameters_decay(name, mask):
    tx = DECAYING[name](weight_decay=0.5, mask=mask)
    zero = jax.tree.map(jnp.zeros_like, ONES)
    extra = {"previous_gradient": zero} if name.startswith("mars") else {}
    u, _ = tx.update(zero, tx.init(ONES), ONES, **extra)
    np.testing.assert_allclose(u["w"], -0.1 * 0.5 * ONES["w"], rtol=1e-6)
    np.testing.assert_array_equal(u["b"], 0 * ONES["b"])


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", DECAYING)
def test_a_mask_without_what_it_masks_is_refused(name):
    make = DECAYING[name]
    with pytest.raises(ValueError, match="mask needs a weight_decay to act on, got weight_decay None"):
        make(weight_decay=None, mask={"w": True, "b": False})
    for mask in (True, False, jnp.array(True)):
        with pytest.raises(TypeError, match="mask must be a tree of bools or a function of the parameters"):
            make(weight_decay=0.1, mask=mask)
    # A weight decay that a sweep sets to 0 does nothing, whatever the mask.
    tx = make(weight_decay=0.0, mask={"w": True, "b": False})
    extra = {"previous_gradient": ONES} if name.startswith("mars") else {}
    tx.update(ONES, tx.init(ONES), **extra)


def assert_refused(error, match, function, *arguments):
    with pytest.raises(error, match=match) as caught:
        function(*arguments)
    assert len(str(caught.value)) < 300


LACKS = r"mask must be a tree like the parameters or a prefix of it: it lacks params\['b'\]"


@pytest.mark.parametrize("name", DECAYING)
def test_a_mask_that_does_not_fit_the_parameters_is_named_at_init(name):
    for mask, error, match in (
        ({"w": True}, ValueError, LACKS + "$"),
        ({"w": True, "b": True, "c": True}, ValueError, r"has params\['c'\], which is no parameter"),
        ({"w": True, "bias": True}, ValueError, LACKS + r" and has params\['bias'\]"),
        ([True, False], ValueError, LACKS + r" and has params\[0\]"),
        ({"w": {"kernel": True}, "b": True}, ValueError, r"lacks params\['w'\] and has params\['w'\]\['kernel'\]"),
        ({"w": True, "b": None}, TypeError, r"mask must hold True or False .*, got None for params\['b'\]"),
        ({"w": "no", "b": True}, TypeError, r"got 'no' for params\['w'\]"),
        (ONES, TypeError, r"got float32\[2,2\] for params\['b'\]"),
        (lambda p: {"w": True}, ValueError, LACKS),
        ({"w": lambda p: True, "b": True}, TypeError, r"got .* for params\['w'\]"),
    ):
        assert_refused(error, match, DECAYING[name](weight_decay=0.5, mask=mask).init, ONES)


@pytest.mark.parametrize("name", ["sgd", "lion", "muon"])
def test_a_mask_may_be_a_prefix_in_boxes_or_of_numpys_bools(name):
    tree = {"block": ONES, "none": None}
    boxed = {"block": {key: nn.Partitioned(key == "w", ("x", None)) for key in ONES}, "none": None}
    alone = {"block": {"w": np.True_, "b": jnp.array(False)}, "none": None}
    zero = jax.tree.map(jnp.zeros_like, tree)
    for mask, decays in ((True, {"w", "b"}), ({"block": False, "none": True}, ()), (boxed, {"w"}), (alone, {"w"})):
        # A single bool stands for an injected function, which is refused where it is given.
        tx = DECAYING[name](weight_decay=0.5, mask=(lambda p: True) if mask is True else mask)
        u, _ = tx.update(zero, tx.init(tree), tree)
        assert {key for key in ONES if np.any(u["block"][key])} == set(decays)


@pytest.mark.parametrize("name", ["sgd", "sgd with momentum", "lion", "signum", "muon"])
def test_a_mask_is_asked_of_the_parameters_where_a_gradient_is_none(name):
    tx = DECAYING[name](weight_decay=0.5, mask=lambda p: jax.tree.map(lambda x: x.shape[0] > 2, p))
    state = tx.init(ONES)
    whole, _ = tx.update(ONES, state, ONES)
    u, after = tx.update({"w": ONES["w"], "b": None}, state, ONES)
    np.testing.assert_array_equal(u["w"], whole["w"])
    assert u["b"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["sgd", "sgd with momentum", "lion", "signum", "muon", "normuon"])
def test_a_decay_needs_gradients_and_parameters_of_one_tree(name):
    tx = DECAYING[name](weight_decay=0.5)
    state = tx.init(ONES)
    lack, have = r"the gradients lack params\['b'\], present", r"the gradients have params\['c'\], absent"
    assert_refused(ValueError, lack, tx.update, {"w": ONES["w"]}, state, ONES)
    assert_refused(ValueError, have, tx.update, ONES | {"c": ONES["b"]}, state, ONES)
    assert_refused(ValueError, r"have params\['b'\], absent in params", tx.update, ONES, state, {"w": ONES["w"]})
    assert_refused(
        ValueError, r"for params\['b'\], which was None in params", tx.update, ONES, state, ONES | {"b": None}
    )
    # That would be broadcast.
    short, match = ONES | {"w": jnp.ones((1, 2))}, r"gradient for params\['w'\] must have shape \(1, 2\), got \(3, 2\)"
    assert_refused(ValueError, match, tx.update, ONES, state, short)


@pytest.mark.parametrize("name", ["sgd", "sgd with momentum", "lion", "muon"])
def test_a_decay_goes_with_boxes_around_gradients_or_parameters_or_neither(name):
    boxed = {"w": nn.Partitioned(ONES["w"], ("x", None)), "b": ONES["b"]}
    masks = (None, lambda p: jax.tree.map(lambda x: x.shape[0] > 2, p))
    for mask in masks:
        tx = DECAYING[name](weight_decay=0.5, mask=mask)
        expected, _ = tx.update(ONES, tx.init(ONES), ONES)
        for init, gradients, params in ((a, b, c) for a in (ONES, boxed) for b in (ONES, boxed) for c in (ONES, boxed)):
            u, _ = tx.update(gradients, tx.init(init), params)
            assert jax.tree.structure(u) == jax.tree.structure(gradients)
            jax.tree.map(np.testing.assert_array_equal, nn.meta.unbox(u), expected)


def test_a_placeholder_of_optax_meets_no_mask():
    tx = mo.lion(0.1, mask={"w": True, "b": False})
    state = tx.init(ONES)
    twice = optax.tree.map_params(tx, lambda x: x + 2, state)
    np.testing.assert_array_equal(twice[0].velocity.values[0]["w"], 2)


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
        (
            lambda: mo.sgd(0.1, storage={f"layers/{i}/attention/kernel": "int8" for i in range(30)}),
            ValueError,
            r"storage needs a momentum to keep, got \{.* and momentum None",
        ),
        (
            lambda: mo.sgd(0.1, storage="int8"),
            ValueError,
            "storage needs a momentum to keep, got 'int8' and momentum None",
        ),
        (lambda: mo.sgd(0.1, 0.0, storage="int8"), ValueError, r"storage needs a momentum .* momentum 0\.0"),
        (
            lambda: mo.sgd(0.1, 0.9, False, jnp.bfloat16, storage="int8"),
            ValueError,
            "accumulator_dtype and storage say",
        ),
        (lambda: mo.lion(0.1, mu_dtype="bfloat16", storage="int8"), ValueError, "mu_dtype and storage say the same"),
        (
            lambda: mo.sgd(0.1, 0.9, False, jnp.float16),
            ValueError,
            "accumulator_dtype must be None, float32 .*storage=",
        ),
        (lambda: mo.sgd(0.1, 0.9, False, "float64"), ValueError, "accumulator_dtype must be None, float32"),
        (lambda: mo.sgd(0.1, 0.9, False, jnp.int8), ValueError, "accumulator_dtype must be None, float32"),
        (lambda: mo.sgd(0.1, 0.9, False, "bf16"), ValueError, "accumulator_dtype must be None, float32 .* got 'bf16'"),
    ],
)
def test_what_would_do_nothing_or_two_things_is_refused(build, error, match):
    with pytest.raises(error, match=match) as caught:
        build()
    assert len(str(caught.value)) < 300
