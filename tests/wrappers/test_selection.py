"""The choice of fields of `compress`: names, mappings, predicates, and storages fit for squares."""

import jax
import jax.numpy as jnp
import optax
import pytest
from compressed import BYTES, PARAMS, distance, opened, run
from conformance import assert_bit_equal

import momentum_optax as mo
from momentum_optax.wrappers.fields import CompressedField
from momentum_optax.wrappers.selection import SECOND_MOMENTS


def test_every_field_has_the_storage_that_a_mapping_gives_it():
    tx = mo.compress(optax.adam(1e-2), {"mu": BYTES, "nu": "bfloat16"})
    _, state = run(tx, 10)
    adam = state.inner[0]
    assert adam.mu.parts.codes[0]["w"].dtype == jnp.int8
    assert adam.nu.parts.values[0]["w"].dtype == jnp.bfloat16
    _, exact = run(optax.adam(1e-2), 10)
    assert distance(optax.tree.get(opened(state), "nu"), optax.tree.get(exact, "nu")) < 0.01


def test_a_predicate_chooses_single_leaves():
    def big(path, leaf):
        return "mu" in jax.tree_util.keystr(path) and leaf.size > 100

    state = mo.compress(optax.adam(1e-2), big, BYTES).init(PARAMS)
    kept = state.inner[0].mu
    assert kept.parts.codes[0]["w"].dtype == jnp.int8
    assert kept.plain["b"].shape == (8,)
    assert state.inner[0].nu.plain["w"].shape == (16, 64)
    tx = mo.compress(optax.adam(1e-2), big, "float32")
    assert_bit_equal(run(tx, 5)[0], run(optax.adam(1e-2), 5)[0])


@pytest.mark.parametrize("storage", ["int8", BYTES], ids=["name", "object"])
def test_squares_are_refused_by_a_storage_that_is_not_fit(storage):
    for make, name in (
        (optax.adam(1e-2), "nu"),
        (optax.rmsprop(1e-2), "nu"),
        (optax.adagrad(1e-2), "sum_of_squares"),
        (optax.adan(1e-2), "n"),
        (optax.contrib.prodigy(), "exp_avg_sq"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' holds second moments.*'float32', 'bfloat16'.*got Int8"):
            mo.compress(make, {name}, storage).init(PARAMS)
        mo.compress(make, {name}, "bfloat16").init(PARAMS)
        mo.compress(make, {name}, storage, second_moments=()).init(PARAMS)
    with pytest.raises(ValueError, match="'nu' holds second moments"):
        mo.compress(optax.adam(1e-2), lambda path, leaf: True, storage).init(PARAMS)


def test_the_names_of_squares_are_fields_of_optax():
    known = [optax.ScaleByAdamState, optax.ScaleByAmsgradState, optax.ScaleByRssState, optax.FactoredState]
    named = {name for state in known for name in state._fields} - {"count", "mu"}
    assert named <= SECOND_MOMENTS


def test_errors_say_what_is_allowed():
    adam = optax.adam(1e-2)
    with pytest.raises(ValueError, match=r"fields of floats .*\('mu', 'nu'\), got 'momentum'"):
        mo.compress(adam, {"mu", "momentum"}).init(PARAMS)
    with pytest.raises(ValueError, match="got 'count'"):
        mo.compress(adam, {"count"}).init(PARAMS)
    with pytest.raises(ValueError, match=r"true of a leaf .*'mu', 'nu'"):
        mo.compress(adam, lambda path, leaf: False).init(PARAMS)
    with pytest.raises(ValueError, match="at least one field"):
        mo.compress(adam, set())
    with pytest.raises(ValueError, match="storage must be one of 'float32'"):
        mo.compress(adam, {"mu"}, "int7")
    with pytest.raises(ValueError, match="must not be compressed already"):
        mo.compress(mo.compress(adam, {"mu"}), {"nu"}, "bfloat16").init(PARAMS)
    with pytest.raises(ValueError, match=r"kept as Float32Velocity, got Int8Velocity: mo\.convert"):
        mo.compress(adam, {"mu"}, "float32").update(PARAMS, mo.compress(adam, {"mu"}, BYTES).init(PARAMS))
    for select in ("mu", 3, int, {1}, {1: "int8"}, [["mu"]]):
        with pytest.raises(TypeError, match="select must"):
            mo.compress(adam, select)
    with pytest.raises(TypeError, match="tx must be a transformation"):
        mo.compress(mo.heavy_ball(0.9), {"mu"})
    for names in ("nu", [["nu"]], 3):
        with pytest.raises(TypeError, match="second_moments must"):
            mo.compress(adam, {"mu"}, second_moments=names)


def test_fields_are_found_by_name():
    _, state = run(mo.compress(optax.adamw(1e-2), {"mu"}, BYTES), 2)
    assert int(optax.tree.get(state, "step")) == 2
    assert isinstance(optax.tree.get(state, "mu"), CompressedField)
    assert mo.compress(optax.adamw(1e-2), {"mu"}, "float32").init(PARAMS).step is None
