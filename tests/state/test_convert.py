"""`convert`: fields compressed and decompressed, and velocities that keep their bits."""

import jax
import jax.numpy as jnp
import optax
import pytest
from conformance import STORAGES, assert_bit_equal, avals
from state.running import ALL, BYTES, COMPRESSED, FIELDS, PARAMS, SCHEDULE, SGD, made, outcome

import momentum_optax as mo

IN_FLOATS = {"mu_bfloat16", "mu_float32", "nu", "plain"}


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "new", [name if name in IN_FLOATS else pytest.param(name, marks=pytest.mark.slow) for name in COMPRESSED]
)
def test_compressed_fields_are_packed_and_read_in_full(new):
    tx = made(new)[0]
    like = tx.init(PARAMS)
    for old in IN_FLOATS if new in IN_FLOATS else COMPRESSED:
        state = made(old)[1]
        # A predicate is asked at init, and Adam itself has no say.
        if new not in {"plain", "predicate"}:
            said = outcome(tx, state)
            same = FIELDS[old] == FIELDS[new] and old != "predicate"
            assert (said is None) == same, (old, said)
        converted = mo.convert(state, FIELDS[new], like=like)
        assert avals(converted) == avals(like), old
        assert outcome(tx, converted) is None, old


def test_a_field_that_like_compresses_needs_a_storage_that_is_fit_for_it():
    like = jax.eval_shape((ALL | COMPRESSED)["both"]().init, PARAMS)
    with pytest.raises(ValueError, match="storage must say how to keep 'nu', which like compresses"):
        mo.convert(made("plain")[1], {"mu": BYTES}, like=like)
    with pytest.raises(ValueError, match="'nu' holds second moments"):
        mo.convert(made("plain")[1], {"mu": BYTES, "nu": BYTES}, like=like)


def test_arguments_of_another_kind_are_named():
    state = made("mu_float32")[1]
    with pytest.raises(TypeError, match=r"like must be an optimizer's state, .* got a transformation"):
        mo.convert(SGD(0.9).init(PARAMS), "int8", like=SGD(0.9))
    for names in ("mu", 3):
        with pytest.raises(TypeError, match=f"second_moments must be a collection of names, got {names!r}"):
            mo.convert(state, "float32", second_moments=names)
    with pytest.raises(ValueError, match=r"storage must have at least one pattern, such as '\.\*', got none"):
        mo.convert(SGD(0.9).init(PARAMS), {})


def test_imaginary_parts_are_not_dropped():
    complex_params = {"w": jnp.ones(3, jnp.complex64)}
    like = SGD(0.9).init({"w": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"like must be complex as the new state at velocity.values\[0\]\['w'\], got f"
    ):
        mo.convert(SGD(0.9).init(complex_params), "float32", like=like)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", STORAGES)
def test_what_is_in_that_storage_already_stays_to_the_bit(name):
    state = made(name)[1]
    tx = SGD(SCHEDULE, dampening=0.5, storage=STORAGES[name]())
    converted = mo.convert(state, STORAGES[name](), like=tx.init(PARAMS))
    assert_bit_equal(optax.tree.get(converted, "velocity"), optax.tree.get(state, "velocity"))
    assert_bit_equal(mo.convert(made("both")[1], FIELDS["both"]), made("both")[1])
