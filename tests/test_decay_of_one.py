"""A decay of 1: sums take it and forget nothing; averages refuse it, since the gradient would have weight 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import finished_optimizers, rule_functions

import momentum_optax as mo

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
    "mars_mix": mo.mars_mix,
    "nadam_mix": mo.nadam_mix,
    "adan_mix": lambda d: mo.adan_mix(b1=d),
    "adan_mix, change": lambda d: mo.adan_mix(b2=d),
    "lion": lambda d: mo.lion(0.1, b2=d),
    "signum": lambda d: mo.signum(0.1, d),
    "muon": lambda d: mo.muon(0.1, d),
    "normuon": lambda d: mo.normuon(0.1, d),
    "normuon, squares": lambda d: mo.normuon(0.1, b2=d),
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


@pytest.mark.one_in(2)
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
