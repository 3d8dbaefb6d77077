"""The first encoding of values that are known at `init`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compressed import (
    BYTES,
    OPTIMIZERS,
    distance,
    opened,
)
from conformance import assert_bit_equal

import momentum_optax as mo
from momentum_optax.wrappers.fields import decompress_field, is_compressed


def test_values_that_are_not_zero_at_init_are_kept():
    params = {"w": jax.random.normal(jax.random.key(0), (32, 128))}
    make = OPTIMIZERS["schedule_free"][0]
    for init in (lambda tx: tx.init(params), lambda tx: jax.jit(tx.init)(params)):
        z = optax.tree.get(opened(init(mo.compress(make(), {"z"}, BYTES))), "z")
        assert distance(z, params) < 0.03
        z = optax.tree.get(opened(init(mo.compress(make(), {"z"}, "float32"))), "z")
        assert_bit_equal(z, params)


@pytest.mark.parametrize("name", ["adam", "lion"])
def test_no_value_of_a_converted_state_is_far_above_itself(name):
    # A hundred millionth of their row's scale: the least level above zero is twenty times as much.
    sizes = jnp.asarray(np.resize([1.0, 1e-8], (8, 512)), jnp.float32)
    eight = mo.storage.int8(min_size=1)
    if name == "adam":
        adam = optax.scale_by_adam()
        like = mo.compress(adam, {"mu"}, eight).init(sizes)
        kept = opened(mo.convert(adam.init(sizes)._replace(mu=sizes), {"mu": eight}, like=like)).mu
    else:
        tx = mo.scale_by_momentum(mo.lion_mix())
        (kept,) = mo.velocity(mo.convert(tx.update(100 * sizes, tx.init(sizes))[1], eight))
    assert np.all(kept <= 1.5 * sizes)
    np.testing.assert_allclose(kept[:, ::2], 1, rtol=0.02)


def gpt2_small():
    """The shapes of GPT-2 small, 148 leaves."""
    wide, layer = 768, {}
    for name, n, m in (
        ("attention", wide, 3 * wide),
        ("out", wide, wide),
        ("up", wide, 4 * wide),
        ("down", 4 * wide, wide),
    ):
        layer[name] = {"kernel": (n, m), "bias": (m,)}
    layer |= {f"norm{i}": {"scale": (wide,), "bias": (wide,)} for i in range(2)}
    shapes = {"tokens": (50257, wide), "positions": (1024, wide), "norm": {"scale": (wide,), "bias": (wide,)}}
    shapes |= {f"layer{i}": layer for i in range(12)}
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))


@pytest.mark.parametrize("select", [{"mu": "int8"}, {"mu": "int8", "nu": "uint8"}], ids=["one field", "two fields"])
def test_init_of_a_whole_model_computes_nothing(select):
    """Fields that start at zero need no scale. XLA used to fold maxima over 38 million zeros, three times a leaf."""
    params = gpt2_small()
    tx = mo.compress(optax.adamw(1e-3), select)
    program = jax.make_jaxpr(tx.init)(params)
    assert len(jax.tree.leaves(params)) == 148
    # One for each array of the state. JAX 0.7.2 writes down too that constants are placed.
    names = [e.primitive.name for e in program.eqns if e.primitive.name != "device_put"]
    assert len(names) <= len(program.jaxpr.outvars) + 2 * 148
    assert set(names) <= {"broadcast_in_dim", "convert_element_type"}


def test_what_starts_elsewhere_than_at_zero_is_still_written_with_a_scale():
    params = {"w": jax.random.normal(jax.random.key(0), (64, 128))}
    tx = mo.compress(optax.contrib.schedule_free_sgd(0.1), {"z"}, mo.storage.int8(min_size=1))
    for state in (tx.init(params), jax.jit(tx.init)(params)):
        (kept,) = [x for x in jax.tree.leaves(state, is_leaf=is_compressed) if is_compressed(x)]
        error = jnp.linalg.norm(decompress_field(kept)["w"] - params["w"]) / jnp.linalg.norm(params["w"])
        assert error < 0.02
