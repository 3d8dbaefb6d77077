"""Averages of weights in Flax's boxes, in NNX, on meshes, in files, beside statistics that are not averaged."""

import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, gradients
from flax import nnx
from flax_models import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import momentum_optax as mo

PARAMS = {"w": jnp.ones((16, 1024)), "b": jnp.ones(16)}
SIGNAL = [gradients(PARAMS, seed) for seed in range(4)]


def build(storage):
    return optax.chain(optax.sgd(0.1, 0.9), mo.average_params(0.5, storage=storage, every=2))


def follow(tx, params, signal=SIGNAL, shardings=None):
    """The average after a few steps, the weights and the state."""

    def step(p, state, g):
        u, state = tx.update(g, state, p)
        return optax.apply_updates(p, u), state

    state = jax.jit(tx.init, out_shardings=shardings)(params)
    step = jax.jit(step)
    for g in signal:
        params, state = step(params, state, g)
    return mo.averaged_params(state, params), params, state


SLOW = {name: pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "bfloat16")}


@pytest.mark.parametrize("storage", [SLOW["float32"], "int8"])
def test_boxes_of_linen_come_back_and_units_name_the_axes_that_they_have(storage):
    boxed = {"w": nn.Partitioned(PARAMS["w"], ("x", "y")), "b": nn.Partitioned(PARAMS["b"], ("x",))}
    signal = [{"w": nn.Partitioned(g["w"], ("x", "y")), "b": nn.Partitioned(g["b"], ("x",))} for g in SIGNAL]
    averaged, _, state = follow(build(storage), boxed, signal)
    assert jax.tree.structure(averaged) == jax.tree.structure(boxed)
    assert_bit_equal(nn.unbox(averaged), follow(build(storage), PARAMS)[0])
    specs = nn.get_partition_spec(state)[1]
    assert specs.codes["w"] == PartitionSpec("x", "y")
    assert specs.unit["w"] == (PartitionSpec("x", None) if storage == "int8" else PartitionSpec())


@pytest.mark.slow
def test_a_live_state_of_nnx_is_read_and_the_model_updated():
    model = nnx.Linear(3, 600, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, build("bfloat16"), wrt=nnx.Param)
    start = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    step = nnx.jit(lambda m, o, g: o.update(m, g))
    signal = [gradients(start, seed) for seed in range(4)]
    for g in signal:
        step(model, optimizer, nnx.State(jax.tree.map(nnx.Param, g)))
    averaged = mo.averaged_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    expected, _, _ = follow(build("bfloat16"), start, signal)
    nnx.update(model, averaged)
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dict(got), expected)


@pytest.mark.parametrize("storage", [*SLOW.values(), "int8"])
def test_averages_do_not_depend_on_the_mesh(storage):
    expected, weights, _ = follow(build(storage), PARAMS)
    mesh = mesh_of(2)
    (axis,) = mesh.axis_names
    shardings = {"w": NamedSharding(mesh, PartitionSpec(axis)), "b": NamedSharding(mesh, PartitionSpec())}
    split = jax.device_put(PARAMS, shardings)
    placed = mo.sharding.state_shardings(build(storage), split, shardings)
    averaged, p, state = follow(build(storage), split, shardings=placed)
    assert state[1].codes["w"].sharding.is_equivalent_to(shardings["w"], 2)
    assert_bit_equal(p, weights)
    assert_bit_equal(averaged, expected)
    tx = mo.sharding.zero1(build(storage), mesh, axis)
    averaged, p, state = follow(tx, jax.device_put(PARAMS, NamedSharding(mesh, PartitionSpec())))
    assert not state[1].codes["w"].sharding.is_fully_replicated
    assert_bit_equal(averaged, expected)


@pytest.mark.slow
def test_states_and_averages_are_saved_and_restored(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = mo.by_path({"w": build("int8"), ".*": build("bfloat16")})
    averaged, params, state = follow(tx, PARAMS)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", (params, state))
        saver.save(tmp_path / "averaged", averaged)
    with ocp.StandardCheckpointer() as saver:
        like = jax.eval_shape(lambda: (PARAMS, tx.init(PARAMS)))
        restored, again = saver.restore(tmp_path / "state", like)
        assert_bit_equal(saver.restore(tmp_path / "averaged", like[0]), averaged)
    assert_bit_equal(again, state)
    assert_bit_equal(mo.averaged_params(again, restored), averaged)


@pytest.mark.slow
def test_the_recipe_of_the_guide_measures_statistics_for_averaged_weights():
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    (code,) = (block for block in re.findall(r"^```python\n(.*?)^```", guide, re.S | re.M) if "def refreshed" in block)
    recipe = {}
    exec(code, recipe)
    rng = np.random.default_rng(0)
    batches = [jnp.asarray(rng.normal(1.0, 2.0, size=(64, 5)), jnp.float32) for _ in range(60)]
    model = recipe["Model"]()
    variables = model.init(jax.random.key(0), batches[0], train=True)
    tx = build("float32")
    # Long steps, after which the last weights have other statistics.
    signal = [jax.tree.map(lambda g: 5 * g, gradients(variables["params"], seed)) for seed in range(4)]
    averaged, params, _ = follow(tx, variables["params"], signal)
    measured = recipe["refreshed"](model, averaged, variables["batch_stats"], batches)["BatchNorm_0"]
    dense = averaged["Dense_0"]
    outputs = np.concatenate(batches) @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    spread = outputs.std(axis=0)
    # The mean over a memory of ten batches of 64.
    assert (abs(measured["mean"] - outputs.mean(axis=0)) < 0.2 * spread).all()
    np.testing.assert_allclose(measured["var"], spread**2, rtol=0.15)
    other = params["Dense_0"]
    there = np.concatenate(batches) @ np.asarray(other["kernel"]) + np.asarray(other["bias"])
    assert (abs(measured["var"] / there.var(axis=0) - 1) > 0.2).all()
