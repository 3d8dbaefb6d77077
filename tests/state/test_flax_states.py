"""States of Flax: live ones of `nnx.Optimizer` and boxes of Linen are read and edited like arrays."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx.training import optimizer as optimizer_module
from flax_models import as_pure, digits, loss

import momentum_optax as mo

SMALL8 = mo.storage.int8(min_size=64)
HERE = {"kernel": 0, "bias": 1}
TORCH = {
    "state": {
        0: {"momentum_buffer": np.full((10, 64), 0.5, np.float32)},
        1: {"momentum_buffer": np.ones(10, np.float32)},
    },
    "param_groups": [{"params": [0, 1]}],
}
TO_LINEAR = {"layouts": {"kernel": "linear"}}
TRACE = optax.TraceState({"kernel": jnp.full((64, 10), 0.5), "bias": jnp.ones(10)})
# The optimizer, what is done to its state and the parameters, and the optimizer that goes on if it is another one.
EDITS = {
    "rescale": (lambda: mo.sgd(0.1, 0.9), lambda s, p: mo.rescale(s, 0.5), None),
    "rescale a layer in bytes": (
        lambda: mo.sgd(0.1, 0.9, storage=SMALL8),
        lambda s, p: mo.rescale(s, 0.5, lambda path: path == "kernel"),
        None,
    ),
    "rescale a field": (lambda: optax.sgd(0.1, 0.9), lambda s, p: mo.rescale(s, {"trace": 0.5}), None),
    "reset": (
        lambda: mo.sgd(0.1, 0.9, dampening=0.5),
        lambda s, p: mo.reset(s, mo.sgd(0.1, 0.9, dampening=0.5).init(p)),
        None,
    ),
    "reset a layer": (
        lambda: mo.compress(optax.adam(0.1), {"mu": SMALL8}),
        lambda s, p: mo.reset(s, mo.compress(optax.adam(0.1), {"mu": SMALL8}).init(p), lambda path: path == "bias"),
        None,
    ),
    "convert": (
        lambda: mo.sgd(0.1, mo.aggregated()),
        lambda s, p: mo.convert(s, SMALL8),
        lambda: mo.sgd(0.1, mo.aggregated(), storage=SMALL8),
    ),
    "convert back": (
        lambda: mo.sgd(0.1, 0.9, storage=SMALL8),
        lambda s, p: mo.convert(s, "float32", like=mo.sgd(0.1, 0.9).init(p)),
        lambda: mo.sgd(0.1, 0.9),
    ),
    "convert a field": (
        lambda: mo.compress(optax.adam(0.1), {"mu"}, SMALL8),
        lambda s, p: mo.convert(s, {"mu": "bfloat16"}),
        lambda: mo.compress(optax.adam(0.1), {"mu"}, "bfloat16"),
    ),
    "from PyTorch": (
        lambda: mo.interop.torch_sgd(lr=0.1, momentum=0.9),
        lambda s, p: mo.interop.from_torch(s, TORCH, HERE, **TO_LINEAR),
        None,
    ),
    "from Optax": (lambda: mo.sgd(0.1, 0.9), lambda s, p: mo.interop.from_optax(s, TRACE), None),
}


def linear(tx):
    """A model after one step of its optimizer, and the function that makes more."""
    x, y = map(jnp.asarray, digits())
    model = nnx.Linear(64, 10, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: loss(m(x), y))(model))

    step(model, optimizer)
    return model, optimizer, step


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_converted_state_has_the_boxes_of_a_new_one_around_what_is_masked_too():
    params = {"w": nnx.Param(jnp.ones((3, 4))), "b": nnx.Param(jnp.ones(4))}
    state = mo.muon(0.1).init(params)
    new = jax.eval_shape(mo.muon(0.1, storage="bfloat16").init, params)
    assert jax.tree.structure(mo.convert(state, "bfloat16")) == jax.tree.structure(new)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("reset", "from PyTorch") else pytest.mark.slow) for name in EDITS],
)
def test_a_live_state_is_changed_as_one_of_arrays_is_and_goes_on(name):
    make, edit, then = EDITS[name]
    model, optimizer, step = linear(make())
    params = nnx.state(model, nnx.Param)
    expected = edit(as_pure(optimizer.opt_state), as_pure(params))
    optimizer.opt_state = edit(optimizer.opt_state, params)
    if then is not None:
        optimizer.tx = then()
    variables = jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    assert all(isinstance(x, nnx.Variable) and not isinstance(x, nnx.Param) for x in variables)
    assert_same(as_pure(optimizer.opt_state), expected)
    # The step after it is that of the optimizer from the state of arrays.
    step(model, optimizer)
    new, (other, fresh, _) = as_pure(optimizer.opt_state), linear(make())
    fresh.tx = fresh.tx if then is None else then()
    fresh.opt_state = nnx.data(optimizer_module.to_opt_state(expected))
    step(other, fresh)
    assert_same(as_pure(fresh.opt_state), new)


READS = {
    "velocity": lambda s, p: mo.velocity(s),
    "telemetry": lambda s, p: mo.telemetry(s),
    "point of evaluation": lambda s, p: as_pure(mo.eval_params(s, p, 0.1)),
    "to PyTorch": lambda s, p: mo.interop.to_torch(s, TORCH, HERE, **TO_LINEAR)["state"],
    "to Optax": lambda s, p: mo.interop.to_optax(s, optax.TraceState(jax.tree.map(jnp.zeros_like, as_pure(p)))),
}


def test_a_live_state_is_read_as_one_of_arrays_is():
    rule = mo.nesterov(0.9)
    model, optimizer, _ = linear(mo.monitor(mo.sgd(0.1, rule), rule))
    state, params = optimizer.opt_state, nnx.state(model, nnx.Param)
    for read in READS.values():
        assert_same(*(jax.tree.map(np.asarray, read(s, p)) for s, p in ((state, params), (as_pure(state), params))))
    assert all(type(x) is float for x in mo.telemetry(state).values())
    assert set(mo.velocity(state)[0]) == set(HERE)
    layout = mo.checkpoint.describe(state)
    mo.checkpoint.check(layout, state)
    with pytest.raises(mo.checkpoint.CheckpointError, match=r"bias.*checksum"):
        mo.checkpoint.check(layout, mo.rescale(state, 2.0))


def nesterov():
    return mo.sgd(0.1, mo.nesterov(0.9))


CHANGES = {
    "velocity": lambda s, fresh: mo.velocity(s),
    "point of evaluation": lambda s, fresh: mo.eval_params(s, fresh, 0.1),
    "rescale": lambda s, fresh: mo.rescale(s, 0.5, lambda path: path == "w"),
    "reset": lambda s, fresh: mo.reset(s, nesterov().init(fresh), lambda path: path == "w"),
    "convert": lambda s, fresh: mo.convert(s, SMALL8),
    "convert back": lambda s, fresh: mo.convert(mo.convert(s, SMALL8), "float32", like=nesterov().init(fresh)),
    "from Optax": lambda s, fresh: mo.interop.from_optax(s, optax.TraceState(fresh)),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.slow if x == "convert" else ()) for x in CHANGES])
def test_a_state_in_boxes_of_linen_is_read_and_changed_as_one_without(name):
    whole = {"w": jnp.linspace(0.0, 1.0, 32 * 64).reshape(32, 64), "b": jnp.ones(64)}
    boxed = {"w": nn.Partitioned(whole["w"], ("x", None)), "b": nn.LogicallyPartitioned(whole["b"], ("mlp",))}
    tx, change = nesterov(), CHANGES[name]
    got, expected = (change(tx.update(p, tx.init(p))[1], p) for p in (boxed, whole))
    assert_same(nn.unbox(got), expected)
    boxes = [x for x in jax.tree.leaves(got, is_leaf=lambda x: isinstance(x, nn.Partitioned)) if hasattr(x, "names")]
    assert {x.names for x in boxes} >= {("x", None), ("mlp",)}
    assert all(len(x.names) == x.value.ndim for x in boxes)
