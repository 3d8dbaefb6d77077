"""Short runs that Orbax saves and restores, for several optimizers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conformance import STORAGES
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo
from momentum_optax.state.checkpoint import check, describe

P = PartitionSpec
PARAMS = {"w": jnp.ones((16, 64)), "b": jnp.ones((64,)), "s": jnp.ones(())}
BYTES = STORAGES["int8"]()
SQUARES = mo.storage.uint8(min_size=1)
OPTIMIZERS = {
    **{name: lambda name=name: mo.sgd(0.1, mo.nesterov(0.9), storage=STORAGES[name]()) for name in STORAGES},
    "debiased": lambda: mo.scale_by_momentum(mo.aggregated((0.0, 0.9, 0.99)), storage=BYTES, debias=True),
    "guarded": lambda: mo.guarded(mo.sgd(0.1, mo.nesterov(0.9), storage=BYTES), "leaf"),
    "adaptive_restart": lambda: mo.adaptive_restart(mo.nesterov(mo.schedules.fista()), storage=BYTES),
    "scheduled_restart": lambda: mo.scheduled_restart(mo.sgd(0.1, 0.9, storage=BYTES), 3),
    "cautious": lambda: mo.cautious(mo.scale_by_momentum(mo.lion_mix(), storage="bfloat16"), "mean"),
    "compress": lambda: mo.compress(optax.adamw(1e-3), {"mu": BYTES, "nu": SQUARES}),
}
# Seconds each; the others are slow tests.
FAST = {"int8"}
every_optimizer = pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)


def abstract(tx, params=PARAMS):
    return jax.eval_shape(tx.init, params)


def gradients(t):
    rng = np.random.default_rng(t)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def placed(shape):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": P("data", "model"), "b": P("model"), "s": P()}
    return mesh, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def saved(path, state, layout=None):
    """A checkpoint with its description."""
    with ocp.CheckpointManager(path) as manager:
        layout = ocp.args.JsonSave(describe(state) if layout is None else layout)
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(state), layout=layout))
    return path


def restored(path, target):
    """As documented: the description is checked against what is wanted, and what came against the description."""
    with ocp.CheckpointManager(path) as manager:
        layout = manager.restore(0, args=ocp.args.Composite(layout=ocp.args.JsonRestore())).layout
        check(layout, target)
        state = manager.restore(0, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))).state
    check(layout, state)
    return state


def with_shardings(target, shardings):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, shardings)


def go_on(tx, state, begin, end, shardings):
    """Updates from step to step, and the last state."""
    params, update, out = jax.device_put(PARAMS, shardings), jax.jit(tx.update), []
    for t in range(begin, end):
        u, state = update(jax.device_put(gradients(t), shardings), state, params)
        out.append(u)
    return out, state


@functools.cache
def small_run():
    tx = mo.sgd(0.1, 0.9, storage=BYTES)
    state = {"params": PARAMS, "opt_state": tx.init(PARAMS)}
    _, opt_state = jax.jit(tx.update)(gradients(0), state["opt_state"], PARAMS)
    return {"params": PARAMS, "opt_state": opt_state}
