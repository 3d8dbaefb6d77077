"""Storages of what Muon orthogonalises: int4 is refused and int8 warned of, however the storage is said."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

import momentum_optax as mo

PARAMS = {"embed": jnp.ones((4, 2)), "layer": {"kernel": jnp.ones((2, 6)), "bias": jnp.ones(6)}}
NUMBERS = mo.matrices.excluding("embed")
OBJECTS = {"bfloat16": mo.storage.bfloat16(), "int8": mo.storage.int8(min_size=1), "int4": mo.storage.int4(min_size=1)}
# A storage by its name, as an object, for a leaf by patterns of paths, and by a function of path and shape.
WAYS = {
    "name": lambda name: name,
    "object": lambda name: OBJECTS[name],
    "patterns": lambda name: {"layer/kernel": name, ".*": "float32"},
    "function": lambda name: lambda path, leaf: name if path == "layer/kernel" else "float32",
}


def compressed(storage):
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=NUMBERS)
    return mo.compress(tx, {"mu": storage})


def compressed_by_predicate(storage):
    tx = optax.contrib.muon(0.1, muon_weight_dimension_numbers=NUMBERS)
    return mo.compress(tx, lambda path, leaf: leaf.shape == (2, 6), storage)


MAKERS = {make.__name__: partial(make, 0.1, weight_dimension_numbers=NUMBERS) for make in (mo.muon, mo.normuon)}
CASES = [(name, way) for name in (*MAKERS, "compress") for way in WAYS] + [("compress by predicate", "name")]


@pytest.mark.parametrize(("maker", "way"), CASES)
def test_int4_is_refused_and_int8_warned_of(maker, way):
    def init(name):
        storage = WAYS[way](name)
        if maker in MAKERS:
            return jax.eval_shape(MAKERS[maker](storage=storage).init, PARAMS)
        make = compressed if maker == "compress" else compressed_by_predicate
        return jax.eval_shape(make(storage).init, PARAMS)

    with pytest.raises(ValueError, match=r"storage must not be int4 here: .*take 'bfloat16' or 'int8'") as caught:
        init("int4")
    assert len(str(caught.value)) < 300
    with pytest.warns(UserWarning, match=r"storage int8 turns the orthogonalised direction .* Take 'bfloat16'") as seen:
        init("int8")
    assert all(len(str(x.message)) < 300 for x in seen)
    init("bfloat16")


def test_other_parameters_may_be_kept_in_any_storage():
    few = OBJECTS["int4"]
    patterns = {"layer/kernel": "bfloat16", ".*": few}
    for kept in (patterns, lambda path, leaf: patterns.get(path, few)):
        state = jax.eval_shape(compressed(kept).init, PARAMS)
        codes = [x for x in jax.tree.leaves(state) if x.dtype in (jnp.int4, jnp.bfloat16)]
        # Of the embedding, which is Adam's; of the kernel; and of the bias, Adam's too.
        assert sorted((x.dtype.name, x.shape) for x in codes) == [
            ("bfloat16", (2, 6)),
            ("int4", (4, 2)),
            ("int4", (6,)),
        ]
