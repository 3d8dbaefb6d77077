"""`outer_momentum`: fragments, meshes, a single worker, donation, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distributed.outer.workers import WORKERS, local_steps, problem, rounds
from jax.sharding import AxisType, PartitionSpec

import momentum_optax as mo
from momentum_optax.distributed import outer
from momentum_optax.state.mismatch import StateMismatchError


@pytest.mark.parametrize(
    "retain", [0.0, 0.25, np.float64(0.25), jnp.float32(0.25)], ids=lambda x: f"{type(x).__name__}-{x}"
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_pulled_parameters_keep_their_dtype(dtype, retain):
    kind = outer.local_sgd()
    state = kind.init({"w": jnp.ones(3, dtype)})
    new = kind.pull({"w": jnp.full(3, 5, dtype)}, state, retain=retain)["w"]
    assert new.dtype == dtype
    np.testing.assert_array_equal(new.astype(jnp.float32), 1 + 4 * float(retain))


def test_the_outer_optimizer_sees_the_anchor_as_its_parameters():
    kind = outer.outer_momentum(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)))
    state = jax.vmap(kind.init)({"w": jnp.full((WORKERS, 3), 2.0)})
    go = jax.vmap(lambda p, s: kind.exchange(p, s, axis_name="workers"), axis_name="workers")
    # x - (x - mean) - 0.5 x, all workers being at 3.
    np.testing.assert_allclose(go({"w": jnp.full((WORKERS, 3), 3.0)}, state).anchor["w"], 3 - 0.5 * 2, rtol=1e-6)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("fragments", [1, 2, 3])
@pytest.mark.parametrize("delay", [0, 2])
def test_fragments_that_arrive_late(fragments, delay, x64):
    """One fragment is exchanged in each round and pulled `delay` rounds later, half of it the worker's own."""
    rng = np.random.default_rng(2)
    targets = rng.normal(size=(WORKERS, 3))
    kind = outer.diloco(0.7, 0.9)
    names = ["a", "b", "c"]
    parts = [[n for i, n in enumerate(names) if i % fragments == k] for k in range(fragments)]

    params = {n: jnp.zeros((WORKERS, 1)) for n in names}
    state = jax.vmap(kind.init)(params)

    chosen = [{n: n in part for n in names} for part in parts]
    x = {n: np.zeros((WORKERS, 1)) for n in names}
    anchor, v = {n: 0.0 for n in names}, {n: 0.0 for n in names}
    for t in range(9):
        params = {n: p - 0.3 * (p - targets[:, i : i + 1]) for i, (n, p) in enumerate(params.items())}
        x = {n: p - 0.3 * (p - targets[:, i : i + 1]) for i, (n, p) in enumerate(x.items())}
        now, then = t % fragments, (t - delay) % fragments
        exchange = functools.partial(kind.exchange, axis_name="workers", mask=chosen[now])
        state = jax.vmap(exchange, axis_name="workers")(params, state)
        if t >= delay:
            params = kind.pull(params, state, retain=0.5, mask=chosen[then])
        for n in parts[now]:
            gone = anchor[n] - x[n].mean()
            v[n] = 0.9 * v[n] + gone
            anchor[n] = anchor[n] - 0.7 * (gone + 0.9 * v[n])
        for n in parts[then] if t >= delay else ():
            x[n] = 0.5 * anchor[n] + 0.5 * x[n]
        for n in names:
            np.testing.assert_allclose(params[n], x[n], rtol=1e-12, atol=1e-14)


def test_workers_on_a_mesh_are_those_under_vmap():
    mesh = jax.make_mesh((WORKERS,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:WORKERS])
    kind = outer.diloco(storage=mo.storage.int8(min_size=1))
    curvature, minimum = (jnp.asarray(a, jnp.float32) for a in problem())
    split, whole = PartitionSpec("workers"), PartitionSpec()
    params = jnp.ones((WORKERS, 3, 5))
    state = kind.init(params[0])

    def go(params, state, curvature, minimum):
        x, state = kind.sync(local_steps(params[0], curvature[0], minimum[0], 5), state, axis_name="workers")
        return x[None], state

    step = jax.jit(
        jax.shard_map(go, mesh=mesh, in_specs=(split, whole, split, split), out_specs=(split, whole), check_vma=False)
    )
    for _ in range(12):
        params, state = step(params, state, curvature, minimum)
    found = rounds(kind, dtype=np.float32)[0]
    np.testing.assert_allclose(state.anchor, found[-1], rtol=2e-6, atol=1e-6)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("exchange", ["exact", "int8"])
@pytest.mark.parametrize("mask", [None, {"a": True, "b": False}])
def test_one_worker_needs_no_axis(exchange, mask):
    kind = outer.outer_momentum(mo.sgd(0.7, 0.9, nesterov=True), exchange=exchange)
    rng = np.random.default_rng(4)
    alone = {"a": jnp.ones((3, 5)), "b": jnp.ones(4)}
    among, add = jax.tree.map(lambda x: x[None], alone), lambda x, d: x - d.reshape(x.shape)
    state, states = kind.init(alone), jax.vmap(kind.init)(among)
    single = jax.jit(lambda p, s, w: kind.sync(p, s, axis_name=None, weight=w, mask=mask))
    many = jax.jit(
        jax.vmap(lambda p, s, w: kind.sync(p, s, axis_name="workers", weight=w, mask=mask), axis_name="workers")
    )
    for weight in (1.0, 2.0, 0.0, 1.0):
        step = {"a": rng.normal(size=(3, 5)), "b": rng.normal(size=4)}
        alone, among = (jax.tree.map(add, x, step) for x in (alone, among))
        alone, state = single(alone, state, weight)
        among, states = many(among, states, jnp.full(1, weight))
    for x, y in zip(jax.tree.leaves((alone, state)), jax.tree.leaves((among, states)), strict=True):
        np.testing.assert_allclose(x, y[0], rtol=1e-6, atol=1e-7)
    assert not np.allclose(alone["a"], 1)


def test_errors_say_what_is_allowed():
    with pytest.raises(TypeError, match="tx must be a transformation with init and update, got 3"):
        outer.outer_momentum(3)
    with pytest.raises(ValueError, match="exchange must be one of 'exact', 'int8', got 'int4'"):
        outer.local_sgd(exchange="int4")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        outer.bmuf(0)
    with pytest.raises(ValueError, match=r"block_rate must be in \(0, inf\), got 0"):
        outer.bmuf(2, 0)
    with pytest.raises(ValueError, match=r"slow_rate must be in \(0, inf\), got -1"):
        outer.slowmo(0.5, -1)
    kind = outer.local_sgd()
    with pytest.raises(ValueError, match=r"retain must be in \[0, 1\], got 2"):
        kind.pull({"w": jnp.ones(2)}, kind.init({"w": jnp.ones(2)}), retain=2)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"weight": -1.0}, ValueError, r"weight must be in \[0, inf\), got -1"),
        ({"weight": lambda t: 1.0}, TypeError, "weight must be a number or a scalar array, got <function"),
        ({"mask": True}, ValueError, "mask must be a tree of True and False like the parameters, got a single one"),
        ({"mask": {"w": True}}, ValueError, r"mask must be a tree of True and False .*, got one without params\['b'\]"),
        (
            {"mask": {"w": True, "b": 1}},
            TypeError,
            r"mask must be a tree of True and False .*, got 1 for params\['b'\]",
        ),
        ({"mask": {"w": True, "b": None}}, TypeError, r"mask must be .*, got None for params\['b'\]"),
        ({"params": {"w": 1.0}}, ValueError, r"params must be the tree .* they lack params\['b'\]"),
        (
            {"params": {"w": jnp.ones(1), "b": jnp.ones(2)}},
            ValueError,
            r"of init, \(2,\) for params\['w'\], got \(1,\)",
        ),
        ({"state": (3,)}, StateMismatchError, "must be an OuterState, got a tuple of 1: begin with init"),
        ({"kind": outer.slowmo()}, TypeError, "inner_learning_rate must be a number or a scalar array, got None"),
    ],
)
def test_an_exchange_names_the_argument_that_does_not_fit(arguments, error, match):
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    kind = arguments.pop("kind", outer.local_sgd())
    call = {"params": params, "state": kind.init(params), "axis_name": None} | arguments
    with pytest.raises(error, match=match):
        kind.exchange(**call)
    if "mask" in call:
        with pytest.raises(error, match=match):
            kind.pull(params, call["state"], mask=call["mask"])


def test_a_mask_goes_with_boxes_or_without():
    kind = outer.local_sgd()
    bare = {"w": jnp.ones(2), "b": jnp.ones(2)}
    params = jax.tree.map(lambda x: nn.Partitioned(x, ("x",)), bare)
    moved, mask = jax.tree.map(lambda x: 2 * x, params), {"w": True, "b": False}
    for tree in (mask, jax.tree.map(lambda m: nn.Partitioned(m, ("x",)), mask)):
        new, state = kind.sync(moved, kind.init(params), axis_name=None, mask=tree)
        assert jax.tree.structure(new) == jax.tree.structure(state.anchor) == jax.tree.structure(params)
        np.testing.assert_array_equal(state.anchor["w"].value, 2)
        np.testing.assert_array_equal(state.anchor["b"].value, 1)
        np.testing.assert_array_equal(new["b"].value, 2)


def test_state_and_parameters_can_be_donated_together():
    kind = outer.outer_momentum(optax.sgd(0.7, 0.9))
    params = {"w": jnp.ones((1, 4))}
    state = jax.vmap(kind.init)(params)
    go = jax.jit(
        jax.vmap(lambda p, s: kind.sync(p, s, axis_name="workers"), axis_name="workers"), donate_argnums=(0, 1)
    )
    for _ in range(2):
        params, state = go(params, state)
    np.testing.assert_array_equal(params["w"], 1)
