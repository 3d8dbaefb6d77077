"""Rules behind an optimizer and averages of the weights on eight devices, and from one mesh to another by Orbax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal, gradients
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import momentum_optax as mo

PARAMS = {"w": jnp.ones((16, 512)), "b": jnp.ones(16), "s": jnp.ones(())}
SPECS = {"w": P("data", "model"), "b": P("model"), "s": P()}
BYTES = mo.storage.int8(min_size=16)
HALF, END = 4, 8


def averaged(storage):
    return optax.chain(optax.sgd(0.5, 0.5), mo.average_params(0.75, every=2, storage=storage))


# Rates and decays are powers of two, so that sums round alike however XLA joins them. Reading int8 has a product that
# is rounded and may be joined with the sum after it: a rule that reads it once in three steps has no such sum here.
OPTIMIZERS = {
    "outer Nesterov": lambda: mo.with_momentum(optax.sgd(0.5, 0.5), mo.outer_nesterov(3, 0.75, 0.5), storage=BYTES),
    "Lookahead": lambda: mo.with_momentum(optax.sgd(0.5, 0.5), mo.lookahead(3, 0.5)),
    "EMA-Nesterov": lambda: mo.with_momentum(optax.sgd(0.5, 0.5), mo.ema_nesterov(0.75, 0.5), storage="bfloat16"),
    "primal averaging, shown z": lambda: mo.with_momentum(
        optax.sgd(0.5, 0.5), mo.primal_averaging(0.5, 0.5), storage="bfloat16", inner_params="fast"
    ),
    **{f"average in {storage}": functools.partial(averaged, storage) for storage in ("float32", "bfloat16")},
    "average in int8": functools.partial(averaged, BYTES),
}
# The shape of the mesh of data and model, its kind, and whether `zero1` spreads the state over the data.
MESHES = {
    "auto": ((4, 2), AxisType.Auto, False),
    "explicit": ((4, 2), AxisType.Explicit, False),
    "zero1": ((8, 1), AxisType.Auto, True),
    "zero1, explicit": ((8, 1), AxisType.Explicit, True),
}


def advance(tx, start, steps, shardings=None):
    """Parameters and state after some steps."""
    params, state = start

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for t in steps:
        g = gradients(PARAMS, t)
        params, state = step(params, state, g if shardings is None else jax.device_put(g, shardings))
    return params, state


def evaluated(name, params, state):
    """The parameters to evaluate."""
    return mo.averaged_params(state, params) if name.startswith("average") else mo.eval_params(state, params)


@functools.cache
def alone(name):
    """The run on one device, and what is to be evaluated after it."""
    tx = OPTIMIZERS[name]()
    params, state = advance(tx, (PARAMS, jax.jit(tx.init)(PARAMS)), range(END))
    return params, state, evaluated(name, params, state)


def build(name, kind):
    """An optimizer on a mesh, with the shardings of parameters and state."""
    shape, axis_type, spread = MESHES[kind]
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)
    # What zero1 spreads is whole along the data.
    specs = jax.tree.map(lambda _: P(), SPECS) if spread else SPECS
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    tx = OPTIMIZERS[name]()
    if spread:
        tx = mo.sharding.zero1(tx, mesh, "data")
        return mesh, tx, shardings, None
    return mesh, tx, shardings, mo.sharding.state_shardings(tx, PARAMS, shardings)


def largest_part(state):
    """The part of the state for the largest parameter with the most elements."""
    return max((x for x in jax.tree.leaves(state) if x.shape == PARAMS["w"].shape), key=lambda x: x.size)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_on_eight_devices_is_that_of_one_and_goes_on_on_another_mesh(name, kind, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    mesh, tx, shardings, states = build(name, kind)
    with jax.set_mesh(mesh):
        start = jax.device_put(PARAMS, shardings)
        run = advance(tx, (start, jax.jit(tx.init, out_shardings=states)(start)), range(HALF), shardings)
        assert not largest_part(run[1]).sharding.is_fully_replicated
        with ocp.StandardCheckpointer() as saver:
            saver.save(tmp_path / "run", run)
        end = advance(tx, run, range(HALF, END), shardings)
        found = evaluated(name, *end)
    assert_bit_equal(jax.device_get((*end, found)), jax.device_get(alone(name)))
    # The same checkpoint on two devices of a mesh of another shape.
    other = jax.make_mesh((1, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    places = jax.tree.map(lambda spec: NamedSharding(other, spec), SPECS)
    plain = OPTIMIZERS[name]()
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        (PARAMS, jax.eval_shape(plain.init, PARAMS)),
        (places, mo.sharding.state_shardings(plain, PARAMS, places)),
    )
    with ocp.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "run", target)
    params, state = advance(plain, restored, range(HALF, END), places)
    assert_bit_equal(jax.device_get((params, state, evaluated(name, params, state))), jax.device_get(alone(name)))


@pytest.mark.slow
def test_what_is_evaluated_is_not_what_is_stored():
    for name in ("outer Nesterov", "average in int8"):
        params, _, found = alone(name)
        assert np.abs(found["w"] - params["w"]).max() > 0.01, name
