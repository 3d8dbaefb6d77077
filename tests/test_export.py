"""Compiled steps that leave the process, and states in formats that know no four-bit numbers."""

import importlib
import io
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from jax import export

import momentum_optax as mo
from momentum_optax.distributed import outer

STORAGES = {
    "float32": mo.storage.float32(),
    "bfloat16": mo.storage.bfloat16(),
    "int8": mo.storage.int8(min_size=1),
    "int4": mo.storage.int4(min_size=1),
}
MAKERS = {
    **{name: lambda keep=keep: mo.sgd(0.1, 0.9, storage=keep) for name, keep in STORAGES.items()},
    "compress": lambda: mo.compress(optax.adam(0.1), {"mu": STORAGES["int8"], "nu": mo.storage.uint8(min_size=1)}),
    "guarded": lambda: mo.guarded(mo.scale_by_momentum(mo.ema(0.9), debias=True), "leaf", max_ratio=4.0),
}


def gradient(shape, seed):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)}


@pytest.mark.parametrize(
    ("name", "dims", "constraints", "shape"),
    [
        ("float32", "n,m", (), (3, 5)),
        ("bfloat16", "n,m", (), (3, 5)),
        ("int8", "n,1024", (), (3, 1024)),
        ("int4", "n,m", ("m >= 512",), (3, 600)),
        pytest.param("compress", "n", ("n >= 2",), (700,), marks=pytest.mark.slow),
        ("guarded", "n,m", (), (3, 5)),
        pytest.param("int8", "n,m", ("n >= 8", "m >= 512"), (9, 600), marks=pytest.mark.slow),
        pytest.param("int8", "n", (), (700,), marks=pytest.mark.slow),
        pytest.param("int4", "n,1024", (), (3, 1024), marks=pytest.mark.slow),
        pytest.param("compress", "n,1024", (), (3, 1024), marks=pytest.mark.slow),
    ],
)
def test_a_step_for_every_size_is_the_step_of_each_to_the_bit(name, dims, constraints, shape):
    tx = MAKERS[name]()
    params = {"w": jax.ShapeDtypeStruct(export.symbolic_shape(dims, constraints=constraints), jnp.float32)}
    exported = export.export(jax.jit(tx.update))(params, jax.eval_shape(tx.init, params), params)
    state = there = tx.init(gradient(shape, 0))
    for t in range(3):
        g = gradient(shape, t)
        u, state = jax.jit(tx.update)(g, state, g)
        v, there = exported.call(g, there, g)
        assert_bit_equal(u, v)
        assert_bit_equal(state, there)
    assert any(x.any() for x in jax.tree.leaves(u))


@pytest.mark.parametrize(
    ("keep", "dims", "words"),
    [
        ("int8", "n,m", r"above or below min_size, 4096 elements, .* got \(n, m\): bound them"),
        (STORAGES["int8"], "24,m", r"the least length of a row, 512 elements, .* got \(m,\): bound them"),
        ("int4", "n", r"above or below min_size, 4096 elements"),
        (STORAGES["int4"], "n,m,2", r"the least length of a row"),
        ("bfloat16", "k", r"above or below one element"),
    ],
)
def test_sizes_that_decide_how_a_leaf_is_kept_must_be_bounded(keep, dims, words):
    params = {"w": jax.ShapeDtypeStruct(export.symbolic_shape(dims), jnp.float32)}
    tx = mo.compress(optax.adam(0.1), {"mu"}, keep) if dims == "k" else mo.sgd(0.1, 0.9, storage=keep)
    with pytest.raises(ValueError, match=words) as caught:
        jax.eval_shape(tx.init, params)
    assert "constraints=('n >= 8', 'm >= 512')" in str(caught.value)
    assert len(str(caught.value)) < 300


# NamedTuples that are in no state.
OTHERS = {
    *(
        "AnyVelocity",
        "Axes",
        "CodeShapes",
        "ConstantForm",
        "EncodeContext",
        "FieldPath",
        "Layout",
        "Limits",
        "NormalForm",
    ),
    *(
        "OuterMomentum",
        "ParameterVelocity",
        "Part",
        "PostHoc",
        "ResolvedRule",
        "RowNumbers",
        "RowSparse",
        "Selection",
        "Side",
    ),
    "StateBytes",
}


def named_tuples():
    """The public NamedTuple classes that the package's modules define."""
    for found in pkgutil.walk_packages(mo.__path__, f"{mo.__name__}."):
        for thing in vars(importlib.import_module(found.name)).values():
            if isinstance(thing, type) and issubclass(thing, tuple) and thing.__module__ == found.name:
                yield thing


STATES = [kind for kind in named_tuples() if not kind.__name__.startswith("_") and kind.__name__ not in OTHERS]


def test_the_states_are_found():
    assert {mo.transform.MomentumState, mo.embeddings.RowSparseState, outer.OuterState} < set(STATES)
    assert len({kind.__name__ for kind in STATES}) == len(STATES)


@pytest.mark.parametrize("kind", sorted(STATES, key=lambda kind: kind.__name__))
def test_the_class_of_a_state_has_a_name_in_what_jax_export_writes(kind):
    with pytest.raises(ValueError, match=rf"momentum_optax\.{kind.__name__}"):
        export.register_namedtuple_serialization(kind, serialized_name=f"momentum_optax.{kind.__name__}")


def test_a_serialized_step_is_read_again():
    pytest.importorskip("flatbuffers")
    tx = mo.guarded(mo.scale_by_momentum(mo.ema(0.9), storage=STORAGES["int4"], debias=True), max_ratio=5.0)
    g = gradient((3, 1024), 0)
    state = tx.init(g)
    read = export.deserialize(export.export(jax.jit(tx.update))(g, state).serialize())
    assert_bit_equal(read.call(g, state), jax.jit(tx.update)(g, state))


def test_four_bits_go_through_a_file_as_bytes():
    tx = mo.sgd(0.1, 0.9, storage=STORAGES["int4"])
    g, state = gradient((3, 1024), 0), tx.init(gradient((3, 1024), 0))
    for _ in range(2):
        _, state = jax.jit(tx.update)(g, state)
    fields = mo.checkpoint.fields(state)
    # What np.save, and with it Equinox, makes of four bits.
    assert _written(fields)["2/velocity/codes/0/w"].dtype == np.dtype("V1")
    wide = {path: x.astype(jnp.int8) if x.dtype == jnp.int4 else x for path, x in fields.items()}
    found = {path: jnp.asarray(x).astype(fields[path].dtype) for path, x in _written(wide).items()}
    assert_bit_equal(mo.checkpoint.from_fields(found, state), state)


def _written(arrays):
    file = io.BytesIO()
    np.savez(file, **{path: np.asarray(x) for path, x in arrays.items()})
    file.seek(0)
    return dict(np.load(file))
