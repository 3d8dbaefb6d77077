"""Shared arguments: masks of the weight decay, and combinations that would do nothing or two things."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.mark.parametrize(
    ("build", "error", "match"),
    [
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
