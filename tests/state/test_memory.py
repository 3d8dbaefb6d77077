"""`state_bytes` against arithmetic and against the arrays themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from state.edited import MODULE

import momentum_optax as mo

PARAMS = {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32), "b": jax.ShapeDtypeStruct((1024,), jnp.bfloat16)}
SIZE = 512 * 1024


def test_adam_takes_eight_bytes_a_float32_parameter_and_a_counter():
    found = mo.state_bytes(optax.adam(1e-3), PARAMS)
    assert found.by_field == {"0/count": 4, "0/mu": 4 * SIZE + 2 * 1024, "0/nu": 4 * SIZE + 2 * 1024}
    assert found.total == found.per_device == sum(found.by_field.values())


@pytest.mark.parametrize(("storage", "codes"), [("float32", 4), ("bfloat16", 2), ("int8", 1), ("int4", 0.5)])
def test_a_velocity_takes_what_its_storage_says(storage, codes):
    found = mo.state_bytes(mo.scale_by_momentum(mo.heavy_ball(0.9), storage=storage), PARAMS)
    first = next(iter(found.by_field))
    small = {"float32": 4, "bfloat16": 2, "int8": 4, "int4": 4}[storage]  # 1024 elements are kept in full
    assert found.by_field[first] == codes * SIZE + small * 1024


def test_parameters_in_a_class_and_random_keys_are_counted():
    tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(0)), optax.trace(0.9))
    # Threefry's keys are two words.
    assert mo.state_bytes(tx, MODULE).by_field == {"0/count": 4, "0/rng_key": 8, "1/trace": 4 * 14}


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
def test_the_sum_is_that_of_the_arrays(storage):
    tx = mo.compress(optax.adam(1e-3), {"mu"}, storage)
    state = tx.init({k: jnp.zeros(x.shape, x.dtype) for k, x in PARAMS.items()})
    assert mo.state_bytes(tx, PARAMS).total == sum(x.nbytes for x in jax.tree.leaves(state))


def test_bytes_per_device_follow_the_shardings():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("x", "y"))
    shardings = {"w": NamedSharding(mesh, PartitionSpec("x", "y")), "b": NamedSharding(mesh, PartitionSpec("y"))}
    tx = mo.sgd(0.1, 0.9, storage="int8")
    found = mo.state_bytes(tx, PARAMS, shardings)
    placed = jax.jit(tx.init, out_shardings=mo.sharding.state_shardings(tx, PARAMS, shardings))(
        {k: jnp.zeros(x.shape, x.dtype) for k, x in PARAMS.items()}
    )
    on_first = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(placed))
    assert found.per_device == on_first < found.total / 4
    assert found.total == mo.state_bytes(tx, PARAMS).total
