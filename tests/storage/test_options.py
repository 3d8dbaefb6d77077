"""The options of storages: each one acts, and a wrong value is named."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conformance import SQUARES, STORAGES, normal, storages_with

import momentum_optax as mo
from momentum_optax.storage.noise import stamp_of_step
from momentum_optax.storage.protocol import encode_context

EVERY = [*STORAGES, *SQUARES]
# Another value of each option, which changes what is stored of a small leaf; and values that are refused.
OTHER = {"seed": 1, "min_size": 5000, "rounding": "nearest"}
WRONG = {
    "seed": [
        (-1, ValueError, "seed must be at least 0, got -1"),
        (0.5, TypeError, "seed must be a whole number, got 0.5"),
        *((number, ValueError, r"seed must be below 2\*\*32, got") for number in (2**32, 2**64)),
    ],
    "min_size": [
        (0, ValueError, "min_size must be at least 1, got 0"),
        ("3", TypeError, "min_size must be a whole number, got '3'"),
    ],
    "rounding": [("up", ValueError, "rounding must be")],
    "axis_names": [(("data",), ValueError, r"axis_names must be None or.*got \('data',\)")],
}
# It acts in a mesh only, where `test_laws.py` has it.
IN_A_MESH = {"axis_names"}


def build(name, **options):
    """A storage of bytes for every leaf, however small."""
    small = {"min_size": 1} if name in storages_with("min_size") else {}
    return getattr(mo.storage, name)(**small | options)


@functools.cache
def written(name, **options):
    """What is read after two writes of the same array."""
    storage, v = build(name, **options), jnp.abs(normal((4, 64)))

    @jax.jit
    def write(parts, step):
        return storage.encode((v,), parts, encode_context(storage, v, (stamp_of_step(step), 0), (1.0,)))

    return np.asarray(storage.state_type.decode(write(write(storage.init(v, 1), 0), 1))[0])


ROWS = [(name, option) for name in EVERY for option in inspect.signature(getattr(mo.storage, name)).parameters]


@pytest.mark.parametrize("name", EVERY)
def test_a_name_stands_for_the_storage_without_options(name):
    assert mo.storage.resolve(name) == getattr(mo.storage, name)()


@pytest.mark.parametrize(("name", "option"), [row for row in ROWS if row[1] not in IN_A_MESH])
def test_every_option_changes_what_is_stored(name, option):
    assert np.any(written(name, **{option: OTHER[option]}) != written(name))


@pytest.mark.parametrize(("name", "option"), ROWS)
def test_a_wrong_value_is_named(name, option):
    for value, error, message in WRONG[option]:
        with pytest.raises(error, match=message):
            build(name, **{option: value})


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", storages_with("seed"))
def test_every_seed_of_32_bits_gives_noise(name):
    read = [written(name, seed=seed) for seed in (0, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1)]
    assert all(np.isfinite(x).all() for x in read)
    assert all((a != b).any() for i, a in enumerate(read) for b in read[:i])
