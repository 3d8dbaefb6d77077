"""The optimizers of the language model: those of Optax where Optax has them, and what does not go together."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from examples.lm import optimizers
from examples.lm.optimizers import BEHIND, OPTIMIZERS, RULES
from examples.lm.settings import Settings

MATRICES = {"w": optax.contrib.MuonDimensionNumbers(), "b": None}
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "b": jnp.ones(4)}


def steps_of(tx, steps=8):
    """The parameters after some steps whose gradients are functions of the step and the parameters."""

    @jax.jit
    def run(params):
        def step(carry, i):
            params, state = carry
            gradients = jax.tree.map(lambda p: 3 * p + jnp.cos(i + p), params)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]

    return run(PARAMS)


def clipped(*transformations):
    return optax.chain(optax.clip_by_global_norm(1.0), *transformations)


RATE = optax.warmup_cosine_decay_schedule(0.0, 0.05, 2, 40, 0.005)
MASK = {"w": True, "b": False}
OPTAX = {
    "sgd": clipped(optax.sgd(RATE, 0.9, nesterov=True)),
    "adamw": clipped(optax.adamw(RATE, b2=0.99, weight_decay=0.1, mask=MASK)),
    "lion": clipped(optax.lion(RATE, 0.9, 0.99, weight_decay=0.1, mask=MASK)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTAX)
def test_it_takes_the_steps_of_optax(name):
    tx = optimizers.build(Settings(optimizer=name, learning_rate=0.05, steps=40), MATRICES)
    found, expected = steps_of(tx), steps_of(OPTAX[name])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), found, expected)


@pytest.mark.slow
def test_muon_steps_matrices_as_far_as_adamw_would_and_leaves_the_rest_to_it():
    tx = optimizers.build(Settings(optimizer="muon", learning_rate=0.05, steps=40), MATRICES)
    muon = clipped(
        optax.contrib.muon(
            RATE,
            beta=0.95,
            consistent_rms=0.2,
            weight_decay=0.1,
            adam_b2=0.99,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=MATRICES,
        )
    )
    found, expected = steps_of(tx), steps_of(muon)
    # Optax debiases the momentum, which leaves its direction all but the same, and has Nesterov's Adam.
    np.testing.assert_allclose(found["w"], expected["w"], atol=0.02)
    assert np.abs(found["w"] - PARAMS["w"]).max() > 0.1
    adam = clipped(optax.adamw(RATE, b2=0.99, weight_decay=0.0))
    np.testing.assert_allclose(found["b"], steps_of(adam)["b"], atol=0.02)


@pytest.mark.slow
def test_every_option_of_an_optimizer_changes_its_steps():
    rows = [Settings(optimizer=name, learning_rate=0.05, steps=40) for name in OPTIMIZERS]
    rows += [rows[0]._replace(rule=rule) for rule in RULES if rule != "nesterov"]
    rows += [rows[1]._replace(behind=behind) for behind in BEHIND]
    rows.append(rows[1]._replace(steps=20))
    found = [np.asarray(steps_of(optimizers.build(row, MATRICES))["w"]) for row in rows]
    for (a, x), (b, y) in itertools.combinations(zip(rows, found, strict=True), 2):
        assert np.abs(x - y).max() > 1e-5, (a, b)


# Bytes of an element.
SIZES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:storage int8 turns")
@pytest.mark.parametrize(
    ("name", "storage"), [x for x in itertools.product(OPTIMIZERS, SIZES) if x != ("muon", "int4")]
)
def test_memories_are_kept_in_the_storage(name, storage):
    tx = optimizers.build(Settings(optimizer=name, storage=storage, behind="lookahead"), MATRICES)
    size = SIZES[storage]
    # The velocity, AdamW's squares, the sum of the updates since the last meeting.
    expected = size + (max(1, size) if name == "adamw" else 0) + size
    found = mo.state_bytes(tx, {"w": jax.ShapeDtypeStruct((64, 512), jnp.float32), "b": PARAMS["b"]}).total
    # Scales: 12 bytes for each row of 512 are 4.7 % of half a byte.
    assert expected < found / (64 * 512) < 1.06 * expected


def test_four_bits_are_refused_for_muon():
    with pytest.raises(ValueError, match=r"^storage must not be int4"):
        optimizers.build(Settings(optimizer="muon", storage="int4"), MATRICES)


def test_a_rule_beside_moments_is_refused():
    with pytest.raises(ValueError, match=r"^rule must be own with adamw, which has moments instead, got nesterov"):
        optimizers.build(Settings(optimizer="adamw", rule="nesterov"), MATRICES)


def test_other_rules_of_sgd_go_as_far_along_a_gradient_that_stays():
    for rule, record in RULES.items():
        rate = optimizers.default_rate("sgd", rule)
        assert rate * record.dc_gain() == pytest.approx(10 * OPTIMIZERS["sgd"].learning_rate), rule
        assert optimizers.default_rate("lion", rule) == OPTIMIZERS["lion"].learning_rate
    assert optimizers.default_rate("sgd", "own") == optimizers.default_rate("sgd", "nesterov")


def test_the_rate_warms_up_and_falls_to_a_tenth():
    rate = optimizers.schedule(Settings(learning_rate=2.0, steps=100))
    np.testing.assert_allclose([rate(0), rate(5), rate(100)], [0.0, 2.0, 0.2], rtol=1e-6)
    for steps in range(1, 5):
        assert np.isfinite(float(optimizers.schedule(Settings(steps=steps))(steps)))
