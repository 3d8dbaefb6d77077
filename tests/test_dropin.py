"""`sgd`, `lion` and `signum` in place of Optax's: arguments, steps and state; and what they have beyond."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import finished_optimizers, rule_functions

import momentum_optax as mo

EPS, BF16 = 2.0**-24, 2.0**-9  # half a unit in the last place of float32 and bfloat16, relative


@pytest.mark.parametrize("name", ["sgd", "lion", "signum"])
def test_arguments_have_optax_s_names_order_and_defaults(name):
    ours, theirs = (inspect.signature(getattr(module, name)).parameters.values() for module in (mo, optax))
    shown = [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default, p.kind) for p in ours][: len(shown)] == shown
    assert all(p.kind == p.KEYWORD_ONLY for p in list(ours)[len(shown) :])


def normal(seed):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in (("w", (6, 4)), ("b", (5,)))}


PARAMS = normal(0)
SIGNAL = jax.tree.map(lambda *x: jnp.stack(x), *map(normal, range(1, 13)))


def updates(tx):
    """The updates of twelve compiled steps, and the last state."""

    def step(state, g):
        u, state = tx.update(g, state, PARAMS)
        return state, u

    state, out = jax.jit(lambda: jax.lax.scan(step, tx.init(PARAMS), SIGNAL))()
    return out, state


def size(state):
    """Bytes of everything that has the size of a parameter."""
    return sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)


SCHEDULE = optax.linear_schedule(0.1, 0.01, 10)
GRID = itertools.product(
    (0.1, SCHEDULE), (None, 0.0, 0.9, 1.0), (False, True), (None, jnp.float32, jnp.bfloat16, "bfloat16")
)
# A schedule of the rate and the other ways to say a dtype are slow tests.
GRID = [
    pytest.param(*row, marks=pytest.mark.slow if row[0] is SCHEDULE or row[3] in (jnp.float32, "bfloat16") else ())
    for row in GRID
]


@pytest.mark.parametrize(("rate", "momentum", "nesterov", "dtype"), GRID)
def test_sgd_is_optax_s_over_its_whole_option_grid(rate, momentum, nesterov, dtype):
    arguments = (rate, momentum, nesterov, dtype)
    # Positionally, as a program that says optax.sgd may.
    (got, ours), (expected, theirs) = updates(mo.sgd(*arguments)), updates(optax.sgd(*arguments))
    decay = momentum or 0.0
    # Each of twelve steps rounds a product and a sum; in bfloat16 Optax also rounds the decayed and the kept velocity.
    # What a step adds to the error decays with the velocity.
    unit = 4 * EPS + (2 * BF16 if dtype in (jnp.bfloat16, "bfloat16") and decay else 0)
    for name in PARAMS:
        largest = sum(decay**k for k in range(12)) * float(jnp.abs(SIGNAL[name]).max()) * 0.1 * (1 + decay)
        bound = unit * sum(decay**k for k in range(12)) * largest
        np.testing.assert_allclose(got[name], expected[name], rtol=0, atol=bound)
        assert got[name].dtype == expected[name].dtype
    # A momentum of 0 keeps nothing here.
    assert size(ours) == (size(theirs) if momentum else 0)


def test_a_bfloat16_accumulator_rounds_to_nearest_as_optax_s():
    for name, options in (("sgd", (0.9, False)), ("signum", (0.9,)), ("lion", (0.9, 0.9))):
        ours, theirs = (getattr(module, name)(0.1, *options, jnp.bfloat16) for module in (mo, optax))
        state, other = (tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1] for tx in (ours, theirs))
        (v,) = mo.velocity(state)
        expected = next(x for x in jax.tree.leaves(other) if x.dtype == jnp.bfloat16 and x.shape == (5,))
        np.testing.assert_array_equal(v["b"], expected.astype(jnp.float32))
        # Neither a counter nor noise: that rounding to nearest needs none.
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(state))


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["lion", "signum"])
def test_sign_methods_keep_their_velocity_in_optax_s_dtype(name, dtype):
    place = {"lion": (0.1, 0.8, 0.7, dtype), "signum": (0.1, 0.8, dtype)}[name]
    (got, ours), (expected, theirs) = updates(getattr(mo, name)(*place)), updates(getattr(optax, name)(*place))
    for leaf in PARAMS:
        # A sign differs only where what it is taken of is as small as the rounding.
        same = abs(got[leaf] - expected[leaf]) < 1e-6
        assert np.mean(same) >= (1 if dtype != jnp.bfloat16 else 0.97)
    assert size(ours) == size(theirs)


def test_sgd_has_no_velocity_and_decays_nothing_by_default():
    assert mo.velocity(mo.sgd(0.1).init(PARAMS)) == ()
    u, _ = mo.sgd(0.1).update(PARAMS, mo.sgd(0.1).init(PARAMS))
    jax.tree.map(lambda x, p: np.testing.assert_array_equal(x, -0.1 * p), u, PARAMS)


# Each optimizer with a weight decay, at the rate 0.1.
DECAYING = {
    "sgd": lambda **options: mo.sgd(0.1, **options),
    "sgd with momentum": lambda **options: mo.sgd(0.1, 0.9, **options),
    "lion": lambda **options: mo.lion(0.1, **options),
    "signum": lambda **options: mo.signum(0.1, **options),
    "muon": lambda **options: mo.muon(0.1, **options),
    "mars_adamw": lambda **options: mo.contrib.mars_adamw(0.1, **options),
    "mars_lion": lambda **options: mo.contrib.mars_lion(0.1, **options),
}
ONES = {"w": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}


def test_every_optimizer_with_a_weight_decay_takes_a_mask():
    takes = {name: set(inspect.signature(f).parameters) for name, f in finished_optimizers().items()}
    masked = {name for name, arguments in takes.items() if "mask" in arguments}
    assert masked == {name.split(" ")[0] for name in DECAYING}
    assert masked == {name for name, arguments in takes.items() if "weight_decay" in arguments}


@pytest.mark.parametrize("mask", [{"w": True, "b": False}, lambda p: jax.tree.map(lambda x: x.shape[0] > 2, p)])
@pytest.mark.parametrize("name", DECAYING)
def test_a_mask_says_which_parameters_decay(name, mask):
    tx = DECAYING[name](weight_decay=0.5, mask=mask)
    zero = jax.tree.map(jnp.zeros_like, ONES)
    extra = {"previous_gradient": zero} if name.startswith("mars") else {}
    u, _ = tx.update(zero, tx.init(ONES), ONES, **extra)
    np.testing.assert_allclose(u["w"], -0.1 * 0.5 * ONES["w"], rtol=1e-6)
    np.testing.assert_array_equal(u["b"], 0 * ONES["b"])


@pytest.mark.parametrize("name", DECAYING)
def test_a_mask_without_what_it_masks_is_refused(name):
    make = DECAYING[name]
    with pytest.raises(ValueError, match="mask needs a weight_decay to act on, got weight_decay None"):
        make(weight_decay=None, mask={"w": True, "b": False})
    for mask in (True, False, jnp.array(True)):
        with pytest.raises(TypeError, match="mask must be a tree of bools or a function of the parameters"):
            make(weight_decay=0.1, mask=mask)
    # A weight decay that a sweep sets to 0 is none, whatever the mask.
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


@pytest.mark.parametrize("abstract", [False, True])
def test_muon_names_a_bias_at_init_with_the_recipe(abstract):
    params = {"layer": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    params = jax.eval_shape(lambda: params) if abstract else params
    match = r"params\['layer'\]\['bias'\] must be a matrix, got shape \(2,\); .*optax\.partition"
    with pytest.raises(ValueError, match=match) as caught:
        mo.muon(0.1).init(params)
    assert len(str(caught.value)) < 300
    # The recipe of the message, run.
    recipe = str(caught.value).split("another optimizer: ")[1]
    tx = eval(recipe, {"optax": optax, "mo": mo, "jax": jax})
    tx.init(params) if not abstract else jax.eval_shape(tx.init, params)


# A decay of 1: sums take it and forget nothing; averages refuse it, where the gradient would have weight 0.

SUMS = {
    "heavy_ball": lambda d: mo.scale_by_momentum(mo.heavy_ball(d)),
    "nesterov": lambda d: mo.scale_by_momentum(mo.nesterov(d)),
    "torch_nesterov": lambda d: mo.scale_by_momentum(mo.torch_nesterov(d)),
    "aggregated": lambda d: mo.scale_by_momentum(mo.aggregated((d,))),
    "simplified_ademamix": lambda d: mo.scale_by_momentum(mo.simplified_ademamix(d)),
    "synthesized_nesterov": lambda d: mo.scale_by_momentum(mo.synthesized_nesterov(d, 0.0)),
    "complex_heavy_ball": lambda d: mo.scale_by_momentum(mo.complex_heavy_ball(d, 0.0)),
    "sgd": lambda d: mo.sgd(1.0, d),
    "sgd, nesterov": lambda d: mo.sgd(1.0, d, nesterov=True),
    "relativistic": lambda d: mo.contrib.relativistic(1.0, d, 0.0),
    "torch_sgd": lambda d: mo.interop.torch_sgd(1.0, d),
    "timm_sgdw": lambda d: mo.interop.timm_sgdw(1.0, d),
    "apex_sgd": lambda d: mo.interop.apex_sgd(1.0, d),
    "flash_sgd": lambda d: mo.interop.flash_sgd(1.0, d),
    "heavyball_sgd": lambda d: mo.interop.heavyball_sgd(1.0, d),
    "keras_sgd": lambda d: mo.interop.keras_sgd(1.0, d),
    "tf1_momentum": lambda d: mo.interop.tf1_momentum(1.0, d),
    "caffe_sgd": lambda d: mo.interop.caffe_sgd(1.0, d),
    "aggmo": lambda d: mo.interop.aggmo(1.0, (d,)),
    "muon_sum": mo.interop.muon_sum,
}
AVERAGES = {
    "ema": mo.ema,
    "quasi_hyperbolic": lambda d: mo.quasi_hyperbolic(d, 0.5),
    "ademamix_mix, fast": lambda d: mo.ademamix_mix(fast=d),
    "ademamix_mix, slow": lambda d: mo.ademamix_mix(slow=d),
    "pid": lambda d: mo.pid(0.1, 0.1, 0.1, d),
    "lion_mix": lambda d: mo.lion_mix(b2=d),
    "muon_mix": mo.muon_mix,
    "grokfast": mo.grokfast,
    "mars": mo.mars_mix,
    "nadam_mix": mo.nadam_mix,
    "adan_mix": lambda d: mo.adan_mix(b1=d),
    "adan_mix, change": lambda d: mo.adan_mix(b2=d),
    "lion": lambda d: mo.lion(0.1, b2=d),
    "signum": lambda d: mo.signum(0.1, d),
    "muon": lambda d: mo.muon(0.1, d),
    "normalized_sgd": lambda d: mo.normalized_sgd(0.1, d),
    "yellowfin": lambda d: mo.contrib.yellowfin(decay=d),
    "mars_adamw": lambda d: mo.contrib.mars_adamw(0.1, d),
    "mars_lion": lambda d: mo.contrib.mars_lion(0.1, d),
    "qhoptim_qhm": lambda d: mo.interop.qhoptim_qhm(0.1, d, 0.7),
    "interop.lion": lambda d: mo.interop.lion(betas=(0.9, d)),
    "interop.signum": lambda d: mo.interop.signum(momentum=d),
    "muon_average": mo.interop.muon_average,
}
# Without a decay that a user gives.
WITHOUT = {
    *("aggregated_exponential", "triple_momentum", "robust_momentum", "accelerated", "mass", "recht_pid", "optimistic"),
    *("grokfast_average", "chebyshev", "schedule_free", "srsgd", "storm", "accsgd"),
}


def test_every_rule_optimizer_and_dialect_says_what_it_does_at_a_decay_of_1():
    public = {*rule_functions(), *finished_optimizers(), *mo.interop.dialect.DIALECTS}
    assert {name.split(",")[0].removeprefix("interop.") for name in (*SUMS, *AVERAGES)} | WITHOUT == public


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_takes_a_decay_of_1_and_forgets_nothing(name):
    tx, g = SUMS[name](1.0), jnp.ones((2, 2))
    state, step, steps = tx.init(g), jax.jit(tx.update), []
    for _ in range(5):
        u, state = step(g, state, g)
        steps.append(abs(float(u[0, 0])))
    # The sum of the gradients so far; Nesterov's forms look one ahead.
    ahead = "nesterov" in name and name != "synthesized_nesterov"
    np.testing.assert_allclose(steps, np.arange(1, 6) + ahead, rtol=1e-6)
    with pytest.raises(ValueError, match=r"must be (a float )?in"):
        SUMS[name](-1.5)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_refuses_a_decay_of_1(name):
    AVERAGES[name](0.5)
    with pytest.raises(ValueError, match=r"must be in [\[(]-?[01], 1\), got 1\.0"):
        AVERAGES[name](1.0)


def test_analysis_of_a_sum_that_forgets_nothing_is_infinite_and_silent():
    rule = mo.heavy_ball(1.0)
    assert mo.analysis.dc_gain(rule) == mo.analysis.mean_lag(rule) == np.inf
    assert mo.analysis.stationary_variance(rule, 0.1, 1.0, 1.0) == np.inf
    assert mo.analysis.iterations(rule, 0.1, 1.0) == np.inf
