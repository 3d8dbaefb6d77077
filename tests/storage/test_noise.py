"""The noise of stochastic rounding: a hash of all of its numbers and of nothing else, which are data of a program."""

import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import momentum_optax as mo
from momentum_optax.storage import noise
from momentum_optax.storage.noise import column_numbers, element_bits, random_bits, stamp_of, stamp_of_step

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


def number_of(step):
    """What stands for a step, in Python's integers."""
    return hashed(step ^ 0x243F6A88) ^ hashed(step ^ 0x85A308D3)


def odd_hash(index, salt):
    return hashed(index * 0x9E3779B9 + salt - 0x9E3779B9) | 1


@pytest.mark.parametrize("step", [0, 7, -1, 2**31 - 1])
def test_a_step_has_one_number_whether_it_is_known_or_not(step):
    assert int(stamp_of_step(step)) == number_of(step) == int(stamp_of_step(jnp.int32(step)))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1, 3), (4, 1), (0, 3), (3, 0)])
def test_the_bits_of_an_element_are_the_product_of_its_numbers_constants_or_not(shape, monkeypatch):
    columns = 1 if not shape else shape[-1]
    rows = int(np.prod(shape[:-1]))
    expected = [
        number_of(9) * odd_hash(j, hashed(3, 5)) * (odd_hash(i, 0x2545F491) if len(shape) > 1 else 1) & MASK
        for i in range(rows)
        for j in range(columns)
    ]
    for is_constant in (True, False):
        monkeypatch.setattr(noise, "_is_constant", lambda shape, is_constant=is_constant: is_constant)
        bits = element_bits(shape, stamp_of_step(9), column_numbers(columns, 3, 5))
        assert bits.shape == shape
        assert bits.dtype == jnp.uint32
        assert bits.ravel().tolist() == expected


def test_the_numbers_of_columns_are_not_kept_beyond_the_program_that_has_them():
    # 64 kB for the longest leaf, and as much again for each of the others.
    numbers = weakref.ref(column_numbers(1 << 14, 3, 5))
    assert numbers() is None


STEPS, LEAVES, ROWS, COLUMNS = 32, 4, 32, 64


def flaws(bits):
    """What is wrong with bits of (step, leaf, row, column), each beyond what chance gives once in 10^6."""
    top = np.asarray(bits >> 16, np.int64)
    noise = (top + 0.5) / 2**16 - 0.5
    found = []
    for axis, name in enumerate(("step", "leaf", "row", "column")):
        for lag in (1, 2, 3):
            moved = np.moveaxis(noise, axis, 0)
            # The mean of products of independent uniform numbers has a standard deviation of 1/12 over the root.
            products = moved[lag:] * moved[:-lag]
            if abs(products.mean()) * 12 * np.sqrt(products.size) > 5:
                found.append(name)
    for name, part in (("upper", top >> 8), ("lower", top & 255)):
        counts = np.bincount(part.ravel(), minlength=256)
        chi2 = ((counts - top.size / 256) ** 2).sum() / (top.size / 256)
        # Of 255 degrees of freedom: mean 255, standard deviation 22.6, and a tail that is longer than a normal one's.
        if abs(chi2 - 255) > 6 * np.sqrt(2 * 255):
            found.append(name)
    # Powers of white noise are exponential: the largest of n exceeds x with a probability of n exp(-x).
    power = np.abs(np.fft.fft2(noise)) ** 2 * 12 / (ROWS * COLUMNS)
    if power.max() > np.log(1e6 * power.size):
        found.append("spectrum")
    return set(found)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_is_white_over_steps_leaves_rows_and_columns(seed):
    columns = np.stack([column_numbers(COLUMNS, seed, leaf, 0) for leaf in range(LEAVES)])
    one_leaf = jax.vmap(lambda stamp, numbers: element_bits((ROWS, COLUMNS), stamp, numbers), (None, 0))
    all_steps = jax.jit(jax.vmap(lambda step: one_leaf(stamp_of_step(step), columns)))
    assert not flaws(np.asarray(all_steps(jnp.arange(STEPS))))


def test_what_is_not_hashed_is_found_not_to_be_white():
    shape = (STEPS, LEAVES, ROWS, COLUMNS)
    step, _, row, column = (x.astype(np.uint32) for x in np.indices(shape))
    rng = np.random.default_rng(0)
    white = rng.integers(2**32, size=shape, dtype=np.uint32)
    assert not flaws(white)
    assert "column" in flaws(((row * COLUMNS + column) * np.uint32(0x9E3779B9)) + white[:, :, :1, :1])
    assert "column" in flaws(white[..., :1] * (2 * column + 1))
    assert "row" in flaws(white[:, :, :1] * (2 * row + 1))
    assert "leaf" in flaws(np.broadcast_to(white[:, :1], shape))
    assert "step" in flaws(np.broadcast_to(white[:1], shape))
    assert "step" in flaws((2 * step + 1) * white[:1])
    assert {"upper", "spectrum"} <= flaws(white >> 1)
    assert "lower" in flaws(white & np.uint32(2**32 - 2**17))


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
