"""The noise of stochastic rounding: a hash of all of its numbers and of nothing else, which are data of a program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.storage.noise import random_bits, stamp_of

MASK = 2**32 - 1


def hashed(*numbers):
    """The finalizer of MurmurHash3 (Appleby) after each number, in Python's integers."""
    x = 0
    for number in numbers:
        x = ((x ^ number % 2**32) + 0x9E3779B9) & MASK
        x = ((x ^ x >> 16) * 0x85EBCA6B) & MASK
        x = ((x ^ x >> 13) * 0xC2B2AE35) & MASK
        x ^= x >> 16
    return x


@pytest.mark.parametrize("numbers", [(3,), (-1, 7), (2**31 + 5, 0, 12)])
def test_a_stamp_is_a_hash_whatever_is_known_of_its_numbers(numbers):
    *before, leaf = numbers
    arrays = [jnp.asarray(n % 2**32, jnp.uint32) for n in before]
    stamps = [stamp_of(*numbers), stamp_of(*arrays, leaf), stamp_of(*before, leaf=leaf), stamp_of(*arrays, leaf=leaf)]
    assert [int(stamp) for stamp in stamps] == [hashed(*numbers)] * 4


def test_noise_differs_by_seed_step_leaf_velocity_and_element_and_by_nothing_else():
    base = np.asarray(random_bits((64, 32), stamp_of(0, stamp_of(3, 1), 0)))
    assert np.array_equal(base, jax.jit(lambda s: random_bits((64, 32), stamp_of(0, stamp_of(s, 1), 0)))(3))
    for numbers in ((1, 3, 1, 0), (0, 4, 1, 0), (0, 3, 2, 0), (0, 3, 1, 1), (0, 1, 3, 0)):
        seed, step, leaf, k = numbers
        other = np.asarray(random_bits((64, 32), stamp_of(seed, stamp_of(step, leaf), k)))
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 0.09  # 4 standard errors
    assert len(np.unique(base)) == base.size
    uniform = base.ravel() / 2.0**32
    assert abs(uniform.mean() - 0.5) < 4 / np.sqrt(12 * base.size)
    for lag in (1, 2, 31, 32, 33):
        assert abs(np.corrcoef(uniform[lag:], uniform[:-lag])[0, 1]) < 4 / np.sqrt(base.size)


def test_a_stamp_takes_whole_numbers_modulo_32_bits():
    for number in (-1, 2**31, 2**32 - 1, 2**32 + 5):
        assert int(stamp_of(number, 3)) == int(stamp_of(jnp.uint32(number % 2**32), 3))


@pytest.mark.parametrize("shape", [(), (1, 1), (5,), (3, 1, 4)])
def test_an_element_is_known_by_its_position(shape):
    position = np.arange(int(np.prod(shape)), dtype=np.uint32).reshape(shape)
    expected = [hashed((int(i) * 0x9E3779B9 + 11 - 0x9E3779B9) % 2**32) for i in position.ravel()]
    assert random_bits(shape, jnp.uint32(11)).ravel().tolist() == expected


def kernels(tx, count):
    """The bodies of the kernels of a compiled step on `count` leaves of one shape, without names."""
    params = {f"leaf {i}": jax.ShapeDtypeStruct((16, 64), jnp.float32) for i in range(count)}

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        weights = {name: x.astype(jnp.bfloat16) for name, x in params.items()}
        kept = mo.apply_updates(weights, updates, rounding="stochastic", step=optax.tree.get(state, "step"))
        return optax.apply_updates(params, updates), state, kept

    state = jax.eval_shape(tx.init, params)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile().as_text()
    bodies = re.findall(r"^(?!ENTRY)%?[\w.\-]+ \(.*?\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert bodies
    return {renamed(re.sub(r", metadata=\{[^}]*\}", "", body)) for body in bodies}


def renamed(body):
    """A computation with its values numbered in the order of their names' first appearance."""
    names = {}
    return re.sub(r"%[\w.\-]+", lambda name: f"%{names.setdefault(name.group(), len(names))}", body)


# Squares come with `compress`; what they and int4 add takes seconds to compile.
OPTIMIZERS = {
    "bfloat16": lambda: mo.sgd(0.1, 0.9, storage="bfloat16"),
    "int8": lambda: mo.sgd(0.1, 0.9, storage=mo.storage.int8(min_size=1)),
    "int4": lambda: mo.sgd(0.1, 0.9, storage=mo.storage.int4(min_size=1)),
    "uint8": lambda: mo.compress(optax.adamw(0.1), {"mu": "bfloat16", "nu": mo.storage.uint8(min_size=1)}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "bfloat16" else pytest.mark.slow) for x in OPTIMIZERS]
)
def test_leaves_of_one_shape_have_the_same_kernels(name):
    tx = OPTIMIZERS[name]()
    assert kernels(tx, 2) == kernels(tx, 4)
