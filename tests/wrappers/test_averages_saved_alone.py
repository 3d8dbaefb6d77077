"""Averaged weights saved alone for evaluation: what Orbax and safetensors are given, and what comes back."""

import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, gradients
from flax import nnx

import momentum_optax as mo

PARAMS = {
    "layers": [{"kernel": jnp.ones((2, 600)), "bias": jnp.zeros(600)}, {"kernel": jnp.ones((3, 4), jnp.bfloat16)}],
    "scale": jnp.ones(()),
}
NAMES = {"layers/0/kernel", "layers/0/bias", "layers/1/kernel", "scale"}
# Types of the format's header and of NumPy.
TYPES = {"F32": np.dtype("float32"), "BF16": jnp.dtype("bfloat16")}


def named(tree):
    """The recipe of the guide: arrays by names such as "layers/0/kernel"."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in pairs}


def placed(found, like):
    """The recipe of the guide: a tree like another one, of the arrays with its names."""
    names = iter(named(like))
    return jax.tree.map(lambda _: found[next(names)], like)


def averaged():
    """An average of weights, away from them."""
    tx = optax.chain(optax.sgd(0.5), mo.average_params(0.5, storage=mo.storage.bfloat16()))
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(2):
        updates, state = tx.update(gradients(params, t), state, params)
        params = optax.apply_updates(params, updates)
    found = mo.averaged_params(state, params)
    assert abs(found["layers"][0]["kernel"] - params["layers"][0]["kernel"]).max() > 0.1
    return found


def written(arrays):
    """A file of the format: the length of a header in JSON, the header, and the bytes of the arrays, in this order."""
    header, body = {}, b""
    types = {dtype: name for name, dtype in TYPES.items()}
    for name, x in ((name, np.asarray(x)) for name, x in arrays.items()):
        offsets = [len(body), len(body) + x.nbytes]
        header[name] = {"dtype": types[x.dtype], "shape": x.shape, "data_offsets": offsets}
        body += x.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def read(file):
    """The arrays of a file."""
    end = 8 + struct.unpack("<Q", file[:8])[0]
    found = {}
    for name, entry in json.loads(file[8:end]).items():
        begin, stop = (end + at for at in entry["data_offsets"])
        found[name] = np.frombuffer(file[begin:stop], TYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def test_an_average_is_a_dictionary_of_plain_arrays_and_comes_back_bit_for_bit():
    average = averaged()
    arrays = named(average)
    assert arrays.keys() == NAMES
    assert all(isinstance(x, jax.Array) for x in arrays.values())
    assert {x.dtype.name for x in arrays.values()} == {"float32", "bfloat16"}
    # A contiguous copy: safetensors refuses arrays that share memory.
    assert len({x.unsafe_buffer_pointer() for x in arrays.values()}) == len(arrays)
    assert_bit_equal(placed(read(written(arrays)), PARAMS), average)


def test_averages_of_flax_models_have_the_names_of_their_layers():
    boxed = {"dense": {"kernel": nn.Partitioned(jnp.ones((2, 3)), ("x", None))}}
    tx = mo.average_params(0.5)
    assert named(nn.unbox(mo.averaged_params(tx.init(boxed), boxed))).keys() == {"dense/kernel"}
    weights = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    average = mo.averaged_params(tx.init(weights), weights)
    assert named(nnx.to_pure_dict(average)).keys() == {"kernel", "bias"}


@pytest.mark.slow
def test_orbax_saves_an_average_alone_and_restores_it_without_the_optimizer(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    average = averaged()
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "averaged", average)
    with ocp.StandardCheckpointer() as saver:
        shapes = jax.eval_shape(lambda: PARAMS)
        assert_bit_equal(saver.restore(tmp_path / "averaged", shapes), average)


@pytest.mark.slow
def test_safetensors_itself_writes_and_reads_an_average(tmp_path):
    files = pytest.importorskip("safetensors.flax")
    average = averaged()
    files.save_file(named(average), tmp_path / "averaged.safetensors")
    assert_bit_equal(placed(files.load_file(tmp_path / "averaged.safetensors"), PARAMS), average)
    # The format is the one above.
    assert_bit_equal(placed(read((tmp_path / "averaged.safetensors").read_bytes()), PARAMS), average)
