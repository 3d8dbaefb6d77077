"""Updates read from the new velocities, and the programs that they compile to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.filters import post_write_form, velocity_only_readout
from tests.filters.simulation import simulate


@pytest.mark.parametrize(
    ("rule", "late"),
    [
        (mo.heavy_ball(0.9), (1.0, (1.0,), 0.0)),
        (mo.ema(0.99), (1.0, (1.0,), 0.0)),
        (mo.nesterov(0.9), (1.0, (1.0,), 1.0)),
        (mo.nesterov(0.9).scale(0.1), (0.1, (1.0,), 1.0)),
        (mo.aggregated((0.0, 0.9, 0.99)).pruned(), (1 / 3, (1.0, 1.0), 1.0)),
        (mo.lion_mix(), (1.0, (0.9 / 0.99,), 0.1 - 0.01 * 0.9 / 0.99)),  # nothing is saved, nor lost
        (mo.primal_averaging(0.9, 0.7), (1.0, (0.07 / 0.9,), 0.3)),
        (mo.Filter(0.9, 1.0, 0.9, 1.0, lookahead=lambda t: t), (1.0, (1.0,), 0.0)),  # which the update does not read
        (mo.Filter(1e-6, 1.0, 0.5, 1.0), None),  # the difference of large numbers
        (mo.heavy_ball(1e-6), (1.0, (1.0,), 0.0)),
        (mo.optimistic().at(1), None),  # the new velocity does not contain the old one
        (mo.nesterov(lambda t: 0.9), None),
    ],
)
def test_an_update_is_read_from_the_new_velocities_where_that_takes_no_more_multiplications(rule, late):
    found = post_write_form(rule)
    assert (found is None) == (late is None)
    if late:
        assert found[0] == pytest.approx(late[0])
        assert (*found[1], found[2]) == pytest.approx((*late[1], late[2]), rel=1e-15, abs=1e-15)
        A, B, C, D = rule.matrices()
        np.testing.assert_allclose(found[0] * (found[1] @ A), C, rtol=1e-12)
        np.testing.assert_allclose(found[0] * (found[1] @ B + found[2]), D, rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [mo.heavy_ball(lambda t: 0.9), mo.heavy_ball(0.9, dampening=0.1, first_step="gradient"), mo.ema(jnp.array(0.9))],
)
def test_an_update_that_is_known_to_be_a_new_velocity_is_read_from_it(rule):
    assert post_write_form(rule) == (1.0, (1.0,), 0.0)
    assert post_write_form(rule.at(3)) == (1.0, (1.0,), 0.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("off", [1e-6, -1e-6, 1e-9])
def test_a_coefficient_that_is_nearly_one_is_not_taken_for_one(off, x64):
    signal = np.random.default_rng(0).normal(size=20)
    for rule in (
        mo.heavy_ball(0.9).scale(1 + off),
        mo.Filter(0.9, 1.0, 0.9 * (1 + off), 1.0),
        mo.Filter(0.9, 1.0, 0.9, 1 + off),
        mo.aggregated((0.5, 0.9)).scale(2 * (1 + off)),
    ):
        runs = [mo.scale_by_momentum(rule)]
        # Micro-batches of one gradient, where they are possible: they read the update from the velocities too.
        runs += [mo.accumulated(rule, 1)] if velocity_only_readout(rule) else []
        for tx in runs:
            step = jax.jit(lambda state, g, tx=tx: tx.update(g, state)[::-1])
            _, got = jax.lax.scan(step, tx.init(jnp.zeros(())), jnp.asarray(signal))
            np.testing.assert_allclose(got, simulate(rule, signal), rtol=0, atol=1e-13 * 20)


def compiled_bytes(tx):
    """Bytes per parameter of a donated step, as XLA counts them for this CPU."""

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state)
        return optax.apply_updates(params, updates), state

    leaf = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(leaf, jax.eval_shape(tx.init, leaf), leaf).compile()
    return compiled.cost_analysis()["bytes accessed"] / 512**2, compiled.memory_analysis().temp_size_in_bytes


def test_nesterov_moves_the_bytes_of_optax_and_aggregated_needs_no_copy():
    theirs = compiled_bytes(optax.chain(optax.trace(0.9, nesterov=True), optax.scale(-0.1)))
    ours = compiled_bytes(optax.chain(mo.scale_by_momentum(mo.nesterov(0.9)), optax.scale(-0.1)))
    # One number of the state more, the look-ahead for `eval_params`: 4 bytes that are read and written a few times.
    assert ours[0] - theirs[0] <= 24 / 512**2
    assert ours[1] - theirs[1] <= 4
    moved, temporary = compiled_bytes(optax.chain(mo.scale_by_momentum(mo.aggregated()), optax.scale(-0.1)))
    assert moved <= 44.01
    assert temporary == 0
