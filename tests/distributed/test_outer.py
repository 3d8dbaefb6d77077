"""Outer momentum: against NumPy loops from the papers' forms, with workers under `vmap` and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

import momentum_optax as mo
from momentum_optax.distributed import outer

WORKERS = 4
RATE = 0.05


def problem(seed=0):
    """A quadratic of its own for each worker: curvatures and minima, of shape (workers, 3, 5)."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2, 2, size=(WORKERS, 3, 5)), rng.normal(size=(WORKERS, 3, 5))


def local_steps(x, curvature, minimum, count):
    for _ in range(count):
        x = x - RATE * curvature * (x - minimum)
    return x


def rounds(kind, *, count=12, inner=5, weights=None, extra=(), dtype=np.float64):
    """The anchor after each exchange, workers under `vmap`; and the last state, parameters of every worker."""
    curvature, minimum = (jnp.asarray(a, dtype) for a in problem())
    start = {"w": jnp.ones((3, 5), dtype)}
    # What all share is whole; residuals are each worker's own.
    state = jax.vmap(kind.init, axis_size=WORKERS)(jax.tree.map(lambda a: jnp.stack([a] * WORKERS), start))

    @functools.partial(jax.vmap, axis_name="workers")
    def go(params, state, problem, weight, arguments):
        params = {"w": local_steps(params["w"], *problem, inner)}
        return kind.sync(params, state, axis_name="workers", weight=weight, **arguments)

    params = jax.tree.map(lambda a: jnp.stack([a] * WORKERS), start)
    anchors = []
    for t in range(count):
        weight = jnp.ones(WORKERS) if weights is None else jnp.asarray(weights[t])
        arguments = {k: jnp.full(WORKERS, v[t]) for k, v in dict(extra).items()}
        params, state = jax.jit(go)(params, state, (curvature, minimum), weight, arguments)
        for leaf in jax.tree.leaves((state.anchor, state.momentum)):
            np.testing.assert_array_equal(leaf[0], leaf[-1], err_msg="all workers hold the same")
        anchors.append(np.asarray(state.anchor["w"][0], np.float64))
    return anchors, state, params


def loop(move, count=12, inner=5, weights=None):
    """The same in NumPy: `move(x, mean of what the workers reached, t)` gives the next common point."""
    curvature, minimum = problem()
    x, found = np.ones((3, 5)), []
    for t in range(count):
        weight = np.ones(WORKERS) if weights is None else np.asarray(weights[t], float)
        ends = local_steps(np.stack([x] * WORKERS), curvature, minimum, inner)
        if weight.sum():
            x = move(x, np.tensordot(weight, ends, 1) / weight.sum(), t)
        found.append(x)
    return found


def assert_follows(kind, move, **arguments):
    found = rounds(kind, **arguments)[0]
    expected = loop(move, weights=arguments.get("weights"))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


class Velocity:
    """Something to keep between rounds."""

    value = 0.0


def test_averaging_is_the_mean_and_with_one_step_each_the_synchronous_gradient_step(x64):
    assert_follows(outer.averaging(), lambda x, mean, t: mean)
    curvature, minimum = problem()
    found = rounds(outer.averaging(), inner=1)[0]
    x = np.ones((3, 5))
    for anchor in found:
        x = x - RATE * (curvature * (x - minimum)).mean(0)
        np.testing.assert_allclose(anchor, x, rtol=1e-12)


def test_diloco_is_nesterov_on_pseudo_gradients(x64):
    v = Velocity()

    def move(x, mean, t):
        gone = x - mean
        v.value = 0.9 * v.value + gone
        return x - 0.7 * (gone + 0.9 * v.value)

    assert_follows(outer.diloco(), move)


def test_slowmo_divides_by_the_inner_rate_of_each_round(x64):
    v, rates = Velocity(), 0.1 / np.arange(1.0, 13)

    def move(x, mean, t):
        v.value = 0.5 * v.value + (x - mean) / rates[t]
        return x - 0.8 * rates[t] * v.value

    found = rounds(outer.slowmo(0.5, 0.8), extra={"inner_learning_rate": rates})[0]
    np.testing.assert_allclose(found, loop(move), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(None, False), (None, True), (0.6, False), (0.6, True), (0.0, False)]
)
def test_bmuf_filters_blocks(momentum, nesterov, x64):
    v, decay = Velocity(), 1 - 1 / WORKERS if momentum is None else momentum
    point = Velocity()

    def move(x, mean, t):
        # The paper's form: v is the change of the global model; Nesterov's workers set out from one change further.
        at = x - decay * v.value if nesterov else x
        v.value = decay * v.value + 0.9 * (mean - x)
        point.value = at + v.value
        return point.value + decay * v.value if nesterov else point.value

    assert_follows(outer.bmuf(WORKERS, 0.9, momentum=momentum, nesterov=nesterov), move)


def test_workers_join_leave_and_count_for_what_they_say(x64):
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 3, size=(12, WORKERS)).astype(float)
    weights[4] = 0  # nobody is there
    v = Velocity()

    def move(x, mean, t):
        v.value = 0.9 * v.value + (x - mean)
        return x - 0.7 * ((x - mean) + 0.9 * v.value)

    assert_follows(outer.diloco(), move, weights=weights)


@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_what_a_missing_worker_holds_does_not_matter(exchange):
    kind = outer.averaging(exchange=exchange)
    start = {"w": jnp.ones((3, 5))}
    state = jax.vmap(kind.init)(jax.tree.map(lambda a: jnp.stack([a] * 2), start))
    params = {"w": jnp.stack([jnp.full((3, 5), 2.0), jnp.full((3, 5), jnp.nan)])}
    go = jax.vmap(functools.partial(kind.sync, axis_name="workers"), axis_name="workers")
    new, state = jax.vmap(lambda p, s, w: kind.sync(p, s, axis_name="workers", weight=w), axis_name="workers")(
        params, state, jnp.asarray([1.0, 0.0])
    )
    np.testing.assert_allclose(new["w"], 2.0, rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert not np.isfinite(np.asarray(go(params, state)[0]["w"])).all()


def test_bytes_say_everything_in_the_end():
    kind = outer.averaging(exchange="int8")
    found, state, _ = rounds(kind, count=40, dtype=np.float32)
    exact = rounds(outer.averaging(), count=40, dtype=np.float32)[0]
    assert 1e-5 < np.abs(np.asarray(found) - exact).max() < 0.01
    # The anchor moved by the mean of what was said; what was not said is in the residuals, half a code at most.
    left = float(np.abs(state.residual["w"]).max())
    assert 0 < left < 0.01
    np.testing.assert_allclose(found[-1], exact[-1], rtol=0, atol=2 * left)


def test_rounding_errors_are_carried_over_and_not_lost():
    kind = outer.averaging(exchange="int8")
    # Beside 1 the small numbers are below half a code: only the residual can bring them through.
    step = jnp.concatenate([jnp.ones((1, 1)), jnp.full((1, 7), 1e-3)], 1)
    params, state = {"w": jnp.zeros((1, 1, 8))}, jax.vmap(kind.init)({"w": jnp.zeros((1, 1, 8))})
    go = jax.jit(jax.vmap(lambda p, s: kind.sync(p, s, axis_name="workers"), axis_name="workers"))
    for _ in range(100):
        params, state = go({"w": params["w"] - step}, state)
    np.testing.assert_allclose(state.anchor["w"][0, 0, 1:], -0.1, atol=0.006)


def test_a_worker_that_was_missing_has_still_to_say_what_it_had_not_said():
    kind = outer.averaging(exchange="int8")
    start = {"w": jnp.zeros((2, 1, 8))}
    # Two workers; beside 1 the small numbers are below half a code, so that all of them stay behind.
    step = jnp.asarray([1.0] + [1e-3] * 7).reshape(1, 1, 8)
    go = jax.jit(jax.vmap(lambda p, s, w: kind.sync(p, s, axis_name="workers", weight=w), axis_name="workers"))
    params, state = go({"w": start["w"] - step}, jax.vmap(kind.init)(start), jnp.ones(2))
    left = np.asarray(state.residual["w"])
    np.testing.assert_allclose(left[:, 0, 1:], 1e-3, rtol=1e-5)
    for weight in ([1.0, 0.0], [2.0, 0.0]):
        params, state = go(params, state, jnp.asarray(weight))
        np.testing.assert_array_equal(state.residual["w"][1], left[1])


@pytest.mark.parametrize(
    "keep", [0.0, 0.25, np.float64(0.25), jnp.float32(0.25)], ids=lambda x: f"{type(x).__name__}-{x}"
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_adopted_parameters_keep_their_dtype(dtype, keep):
    kind = outer.averaging()
    state = kind.init({"w": jnp.ones(3, dtype)})
    new = kind.adopt({"w": jnp.full(3, 5, dtype)}, state, keep=keep)["w"]
    assert new.dtype == dtype
    np.testing.assert_array_equal(new.astype(jnp.float32), 1 + 4 * float(keep))


def exchanged(kind, params, weight=None, **arguments):
    """The state after one exchange of workers that all set out from zero, compiled."""
    state = jax.vmap(kind.init)(jax.tree.map(jnp.zeros_like, params))
    weight = jnp.ones(WORKERS) if weight is None else weight
    go = jax.vmap(lambda p, s, w: kind.exchange(p, s, axis_name="workers", weight=w, **arguments), axis_name="workers")
    return jax.jit(go)(params, state, weight)


@pytest.mark.parametrize("exchange", ["exact", "int8"])
def test_nothing_is_divided_by_zero_where_nobody_is_there_or_nobody_moved(exchange):
    kind = outer.outer_momentum(optax.sgd(0.7, 0.9), exchange=exchange)
    params = {"w": jnp.zeros((WORKERS, 2, 3)).at[:, 0].set(1.0)}
    # What a selection would hide is seen here: every operation is looked at by itself.
    with jax.debug_nans(True), jax.disable_jit():
        for weight in (jnp.zeros(WORKERS), jnp.ones(WORKERS)):
            exchanged(kind, params, weight)


def test_slowmo_of_workers_whose_rate_is_zero_decays():
    kind = outer.slowmo(0.5, 0.8)
    state = exchanged(kind, {"w": jnp.ones((WORKERS, 3))}, inner_learning_rate=0.1)
    v = mo.velocity(state.momentum)[0]["w"]
    np.testing.assert_allclose(v, -10, rtol=1e-6)
    go = jax.vmap(lambda p, s: kind.exchange(p, s, axis_name="workers", inner_learning_rate=0.0), axis_name="workers")
    after = go(state.anchor, state)
    np.testing.assert_array_equal(after.anchor["w"], state.anchor["w"])
    np.testing.assert_allclose(mo.velocity(after.momentum)[0]["w"], 0.5 * v, rtol=1e-6)


def test_the_outer_optimizer_sees_the_anchor_as_its_parameters():
    kind = outer.outer_momentum(optax.chain(optax.add_decayed_weights(0.5), optax.sgd(1.0)))
    state = jax.vmap(kind.init)({"w": jnp.full((WORKERS, 3), 2.0)})
    go = jax.vmap(lambda p, s: kind.exchange(p, s, axis_name="workers"), axis_name="workers")
    # x - (x - mean) - 0.5 x, all workers being at 3.
    np.testing.assert_allclose(go({"w": jnp.full((WORKERS, 3), 3.0)}, state).anchor["w"], 3 - 0.5 * 2, rtol=1e-6)


def test_every_row_of_an_exchange_in_bytes_has_its_own_scale():
    rows = np.array([1e-6, 1.0, 1e6])[:, None] * np.random.default_rng(0).normal(size=(3, 40))
    params = {"w": jnp.asarray(np.broadcast_to(rows, (WORKERS, 3, 40)), jnp.float32)}
    state = exchanged(outer.averaging(exchange="int8"), params)
    # Half a code of 127, at most.
    error = np.abs(state.anchor["w"][0] - rows).max(1)
    assert np.all(error <= np.abs(rows).max(1) / 254 * (1 + 1e-5))
    assert np.all(error > 0)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8", "int4"])
def test_the_outer_velocity_in_any_storage(storage):
    keep = storage if storage in ("float32", "bfloat16") else getattr(mo.storage, storage)(min_size=1)
    found = rounds(outer.diloco(0.5, 0.5, storage=keep), dtype=np.float32)[0]
    exact = rounds(outer.diloco(0.5, 0.5), dtype=np.float32)[0]
    most = {"float32": 1e-6, "bfloat16": 0.01, "int8": 0.1, "int4": 0.6}[storage]
    assert np.linalg.norm(found[-1] - exact[-1]) <= most * np.linalg.norm(exact[-1] - 1)
    assert (np.asarray(found) != exact).any() == (storage != "float32")


@pytest.mark.parametrize("fragments", [1, 2, 3])
@pytest.mark.parametrize("delay", [0, 2])
def test_fragments_that_arrive_late(fragments, delay, x64):
    """One fragment is exchanged in each round and adopted `delay` rounds later, half of it the worker's own."""
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
        exchange = functools.partial(kind.exchange, axis_name="workers", only=chosen[now])
        state = jax.vmap(exchange, axis_name="workers")(params, state)
        if t >= delay:
            params = kind.adopt(params, state, keep=0.5, only=chosen[then])
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


@pytest.mark.parametrize("exchange", ["exact", "int8"])
@pytest.mark.parametrize("only", [None, {"a": True, "b": False}])
def test_one_worker_needs_no_axis(exchange, only):
    kind = outer.outer_momentum(mo.sgd(0.7, 0.9, nesterov=True), exchange=exchange)
    rng = np.random.default_rng(4)
    alone = {"a": jnp.ones((3, 5)), "b": jnp.ones(4)}
    among, add = jax.tree.map(lambda x: x[None], alone), lambda x, d: x - d.reshape(x.shape)
    state, states = kind.init(alone), jax.vmap(kind.init)(among)
    single = jax.jit(lambda p, s, w: kind.sync(p, s, axis_name=None, weight=w, only=only))
    many = jax.jit(
        jax.vmap(lambda p, s, w: kind.sync(p, s, axis_name="workers", weight=w, only=only), axis_name="workers")
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
        outer.averaging(exchange="int4")
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        outer.bmuf(0)
    with pytest.raises(ValueError, match=r"block_rate must be in \(0, inf\), got 0"):
        outer.bmuf(2, 0)
    with pytest.raises(ValueError, match=r"slow_rate must be in \(0, inf\), got -1"):
        outer.slowmo(0.5, -1)
    kind = outer.averaging()
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\], got 2"):
        kind.adopt({"w": jnp.ones(2)}, kind.init({"w": jnp.ones(2)}), keep=2)


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
