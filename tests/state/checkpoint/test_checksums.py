"""Checksums: one changed bit is found in every dtype, and host and device agree."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from precision import enable_x64
from state.checkpoint.orbax_runs import placed

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, check, describe

WIDTHS = {
    "bool": 1, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int32": 32, "uint32": 32, "int64": 64, "uint64": 64,
    "float16": 16, "float32": 32, "float64": 64, "complex64": 64, "complex128": 128, "bfloat16": 16,
    "float8_e4m3fn": 8, "float8_e5m2": 8, "int4": 4, "uint4": 4, "int2": 2,
}  # fmt: skip
ON_DEVICE = ("bool", "int8", "uint16", "int32", "float16", "float32", "complex64", "bfloat16", "float8_e5m2", "int4")


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def from_bits(name, rows):
    """An array whose elements have these bits, of which a row holds as many bytes as an element."""
    dtype = numpy_dtype(name)
    if WIDTHS[name] == 1:
        return (rows[:, 0] & 1).astype(bool)
    if WIDTHS[name] < 8:
        values = (rows[:, 0].astype(np.int64)) & (2 ** WIDTHS[name] - 1)
        if name.startswith("int"):
            values = values - (values >> (WIDTHS[name] - 1)) * 2 ** WIDTHS[name]
        return values.astype(dtype)
    return np.ascontiguousarray(rows).view(dtype).reshape(len(rows))


def sums(state):
    return {path: entry.get("checksum") for path, entry in describe(state)["fields"].items()}


@pytest.mark.parametrize("name", WIDTHS)
def test_every_single_bit_of_an_array_of_the_host_counts(name):
    width = WIDTHS[name]
    rows = np.random.default_rng(0).integers(0, 256, (3, max(width // 8, 1)), np.uint8)
    flipped = {"whole": from_bits(name, rows)}
    for place in range(3):
        for bit in range(width):
            other = rows.copy()
            other[place, bit // 8] ^= np.uint8(1 << bit % 8)
            flipped[f"{place}/{bit}"] = from_bits(name, other)
    found = sums({k.replace("/", "-"): x for k, x in flipped.items()})
    assert len(found) == 3 * width + 1
    # Each from the whole, and each from each other: two flips of one bit in two places are two states.
    assert len(set(found.values())) == len(found)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ON_DEVICE)
def test_an_array_of_the_device_has_the_checksum_of_the_same_array_of_the_host(name):
    rows = np.random.default_rng(1).integers(0, 256, (6, max(WIDTHS[name] // 8, 1)), np.uint8)
    rows[:, -1] &= 0x3F  # no NaN, whose bits a device may change
    host = from_bits(name, rows).reshape(2, 3)
    assert describe({"x": host}) == describe({"x": jnp.asarray(host)})


def test_eight_bytes_count_alike_on_host_and_device():
    x = np.random.default_rng(2).normal(size=(2, 3))
    with enable_x64(True):
        for dtype in (np.float64, np.complex128, np.int64, np.uint64):
            host = (abs(x) * 2.0**40 * (1 + 1j if dtype is np.complex128 else 1)).astype(dtype)
            assert describe({"x": host}) == describe({"x": jnp.asarray(host)})


@pytest.mark.parametrize("order", ["<i8", ">i8", ">f4"])
def test_byte_order_and_layout_in_memory_do_not_count(order):
    x = np.arange(12, dtype=order[1:]).reshape(3, 4) * 3**9
    assert describe(x) == describe(x.astype(order)) == describe(np.asfortranarray(x))


def test_whole_numbers_of_any_size():
    numbers = [0, 1, -1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**32 + 1, 2**63 - 1, 2**63, 2**64, 10**40]
    numbers += [10**40 ^ (1 << bit) for bit in range(132)]
    found = sums({str(x): x for x in numbers})
    assert len(set(found.values())) == len(numbers)
    assert describe(3)["fields"] == describe(np.int32(3))["fields"]
    assert describe(2**40)["fields"] == describe(np.int64(2**40))["fields"]
    assert describe(2**64)["fields"]["."]["dtype"] == "int"
    # The counter that the high word alone tells from 0.
    assert sums(np.int64(2**32)) != sums(np.int64(0))
    check(json.loads(json.dumps(describe({"tokens": 2**70}))), {"tokens": 2**70})
    with pytest.raises(CheckpointError, match=r"^tokens must have the checksum"):
        check(describe({"tokens": 2**70}), {"tokens": 2**70 + 2**33})


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
def test_each_bit_of_a_key_counts(implementation):
    data = jax.random.key_data(jax.random.key(0, impl=implementation))
    keys = {"whole": jax.random.wrap_key_data(data, impl=implementation)}
    for i in range(data.size):
        for bit in range(32):
            flipped = data.at[i].set(data[i] ^ np.uint32(1 << bit))
            keys[f"{i}-{bit}"] = jax.random.wrap_key_data(flipped, impl=implementation)
    assert len(set(sums(keys).values())) == len(keys)


@pytest.mark.parametrize("bad", ["x", object(), np.array(["x"]), np.array([None]), np.datetime64(1, "s")])
def test_what_has_no_bits_to_sum_is_named(bad):
    with pytest.raises(TypeError, match=r"^state must hold arrays and numbers, got .* at a/b"):
        describe({"a": {"b": bad}})
    with pytest.raises(CheckpointError, match=r"^a must be an array or a number, got"):
        mo.checkpoint.from_fields({"a": bad}, {"a": 1.0})


def mixed(x):
    """The finalizer of MurmurHash3, in Python's whole numbers."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_a_checksum_is_a_sum_over_hashes_of_bits_and_places_on_every_mesh():
    _, shardings = placed((4, 2))
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 64)), jnp.float32)
    bits = np.asarray(w).view(np.uint32).ravel()
    expected = sum(mixed(mixed(int(b)) ^ mixed(i * 0x9E3779B9 % 2**32)) for i, b in enumerate(bits)) % 2**32
    state = {
        "w": w, "split": jax.device_put(w, shardings["w"]), "numpy": np.asarray(w), "half": w.astype(jnp.bfloat16),
        "four": w.astype(jnp.int4), "bool": w > 0, "complex": w + 1j, "key": jax.random.key(0), "number": 3.5,
    }  # fmt: skip
    found = describe(state)["fields"]
    assert found["w"] == {"shape": [16, 64], "dtype": "float32", "checksum": expected}
    assert found["split"] == found["numpy"] == found["w"]
    assert found["half"]["dtype"] == "bfloat16"
    assert found["key"]["dtype"] == "key<fry>"
    for key, other in (
        ("w", w.at[3, 5].add(1e-7)), ("w", jnp.roll(w, 1)), ("w", w.at[8:].set(0)), ("half", -state["half"]),
        ("four", state["four"].at[1, 1].set(7)), ("bool", ~state["bool"]), ("complex", w + 2j), ("number", 3.25),
        ("key", jax.random.key(1)),
    ):  # fmt: skip
        with pytest.raises(
            CheckpointError, match=rf"^{key} must have the checksum \d+ with which it was saved, got \d+"
        ):
            check(describe(state), state | {key: other})
