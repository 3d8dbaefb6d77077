"""The promises of every storage about a run: it is the same when it is stopped, in one scan, and on many devices."""

import jax
import jax.numpy as jnp
import optax
import pytest
from conformance import SQUARES, STORAGES, assert_bit_equal, normal
from jax.sharding import NamedSharding, PartitionSpec

import momentum_optax as mo

SHAPE = (8, 512)  # eight rows for the storages that have them
EVERY = [*STORAGES, *SQUARES]


def optimizer(name):
    """A transformation with three velocities in a storage, or with squares in it."""
    if name in SQUARES:
        squares = getattr(mo.storage, name)(min_size=1)
        return mo.compress(optax.scale_by_adam(b1=0.0, b2=0.9), {"nu"}, squares)
    return mo.scale_by_momentum(mo.aggregated(), storage=STORAGES[name]())


def every(*fast):
    """A row for each storage; those of the others take long to compile."""
    marks = {name: () if name in fast else pytest.mark.slow for name in EVERY}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in EVERY])


def scanned(tx, signal):
    """The state after all gradients of `signal`."""
    return jax.jit(lambda s: jax.lax.scan(lambda state, g: (tx.update(g, state)[1], None), tx.init(s[0]), s)[0])(signal)


@every("bfloat16")
def test_a_resumed_run_and_a_scanned_one_are_bit_equal(name):
    tx, signal = optimizer(name), normal((6, *SHAPE), 3)
    state, update = tx.init(signal[0]), jax.jit(lambda state, g: tx.update(g, state)[1])
    for t, g in enumerate(signal):
        state = update(state, g)
        if t == 2:
            state = jax.tree.map(jnp.asarray, jax.device_get(state))  # as a checkpoint would
    assert_bit_equal(scanned(tx, signal), state)


@every("bfloat16", "int8")
def test_many_devices_write_what_one_writes(name):
    tx, signal = optimizer(name), normal((5, *SHAPE), 6)
    for shape, spec in (((8, 1), ("x",)), ((1, 8), (None, "y")), ((4, 2), ("x", "y"))):
        mesh = jax.make_mesh(shape, ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = jax.device_put(signal, NamedSharding(mesh, PartitionSpec(None, *spec)))
        assert_bit_equal(scanned(tx, split), scanned(tx, signal))
