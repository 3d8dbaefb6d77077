"""Descriptions: a checkpoint that does not fit is refused with the name of its field."""

import json

import jax.numpy as jnp
import optax
import pytest
from state.checkpoint.orbax_runs import BYTES, OPTIMIZERS, PARAMS, abstract

import momentum_optax as mo
from momentum_optax.state.checkpoint import CheckpointError, check, describe, fields


def test_a_description_survives_json_and_fits_its_own_state_only():
    states = {name: abstract(make()) for name, make in OPTIMIZERS.items()}
    for name, state in states.items():
        layout = json.loads(json.dumps(describe(state)))
        for other, target in states.items():
            if name == other:
                check(layout, target)
            else:
                with pytest.raises(CheckpointError, match=r"^\S+ must (be|not be) .*, got .*"):
                    check(layout, target)


def test_a_checkpoint_that_does_not_fit_is_refused_by_the_name_of_its_field():
    layout = describe(abstract(mo.sgd(0.1, 0.9, storage=BYTES)))
    assert list(layout["fields"])[:3] == ["0", "1", "2"]
    momentum = "2/velocity"
    for tx, params, message in (
        (mo.sgd(0.1, 0.9), PARAMS, f"{momentum} must be a Float32Velocity, got an Int8Velocity"),
        (mo.sgd(0.1, mo.ema(0.9), storage=BYTES), PARAMS, None),
        (optax.sgd(0.1, 0.9), PARAMS, "0 must be a TraceState, got an EmptyState"),
        (mo.sgd(0.1, mo.aggregated((0.5, 0.9)), storage=BYTES), PARAMS, f"{momentum}/codes/1/b must be int8[64], got"),
        (mo.sgd(lambda t: 0.1, 0.9, storage=BYTES), PARAMS, "3 must be a ScaleByScheduleState, got an EmptyState"),
        (
            mo.sgd(0.1, 0.9, storage=BYTES),
            PARAMS | {"x": PARAMS["b"]},
            f"{momentum}/codes/0/x must be int8[64], got nothing",
        ),
        (
            mo.sgd(0.1, 0.9, storage=BYTES),
            {k: PARAMS[k] for k in "bs"},
            f"{momentum}/codes/0/w must not be there, got int8[16",
        ),
        (
            mo.sgd(0.1, 0.9, storage=BYTES),
            PARAMS | {"w": jnp.ones((16, 32))},
            "w must be int8[16, 32], got int8[16, 64]",
        ),
        (mo.sgd(0.1, 0.9, storage="int8"), PARAMS, f"{momentum}/codes/0/b must be float32[64], got int8[64]"),
    ):
        if message is None:  # rates and coefficients are in no state
            check(layout, abstract(tx, params))
            continue
        with pytest.raises(CheckpointError) as error:
            check(layout, abstract(tx, params))
        assert message in str(error.value)
    for path in layout["fields"]:
        less = layout | {"fields": {k: x for k, x in layout["fields"].items() if k != path}}
        with pytest.raises(CheckpointError, match=rf"^{path} must be .*, got nothing$"):
            check(less, abstract(mo.sgd(0.1, 0.9, storage=BYTES)))


def test_what_is_no_description_is_refused():
    tx = mo.sgd(0.1, 0.9)
    layout = describe(abstract(tx))
    for bad in (None, {}, {"fields": {}}, {**layout, "fields": None}, {**layout, "fields": {"0": 3}}, []):
        with pytest.raises(CheckpointError, match="description must be what describe gives"):
            check(bad, abstract(tx))
    with pytest.raises(CheckpointError, match=r"have format 2, got 3: it was written by newer code"):
        check({**layout, "format": 3}, abstract(tx))
    with pytest.raises(CheckpointError, match=r"have version 3, got 0: migrate"):
        check(layout, abstract(tx), version=3)
    with pytest.raises(ValueError, match="two at a/b"):
        describe({"a/b": 1.0, "a": {"b": 2.0}})
    with pytest.raises(ValueError, match="two at a/b"):
        fields({"a/b": 1.0, "a": {"b": 2.0}})
    with pytest.raises(TypeError, match=r"arrays and numbers, got 'x' at a"):
        describe({"a": "x"})
