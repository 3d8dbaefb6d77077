"""States on eight devices: the numbers of one device, no traffic but the stated one, shares that add up."""

import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo
from momentum_optax.distributed.sharding import offloaded, state_shardings, zero1

P = PartitionSpec
PARAMS = {"w": jnp.ones((64, 512)), "b": jnp.ones((512,)), "s": jnp.ones(())}
BYTES = mo.storage.int8(min_size=512)
OPTIMIZERS = {
    "float32": lambda: mo.sgd(0.1, mo.aggregated(), weight_decay=0.01),
    "bfloat16": lambda: mo.sgd(0.1, mo.nesterov(0.9), storage="bfloat16"),
    "int8": lambda: mo.sgd(0.1, mo.nesterov(0.9), weight_decay=0.01, storage=BYTES),
    "int4": lambda: mo.sgd(0.1, 0.9, storage=mo.storage.int4(min_size=512)),
    "debiased": lambda: optax.chain(mo.scale_by_momentum(mo.ema(0.9), debias=True), optax.scale(-0.1)),
    "adamw": lambda: mo.compress(
        optax.adamw(1e-3), {"mu": BYTES, "nu": mo.storage.uint8(min_size=512)}, second_moments={"nu"}
    ),
}
LAYOUTS = {
    "data": ((8,), ("data",), {"w": P("data"), "b": P(), "s": P()}),
    "data and model": ((4, 2), ("data", "model"), {"w": P("data", "model"), "b": P("model"), "s": P()}),
    "full": ((4, 2), ("data", "model"), {"w": P(("data", "model")), "b": P(("data", "model")), "s": P()}),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def placed(layout, kind=AxisType.Auto):
    """A mesh, and the shardings of `PARAMS` on it."""
    shape, names, specs = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(names))
    return mesh, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def gradients(count):
    rng = np.random.default_rng(0)
    return [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS) for _ in range(count)]


def step_of(tx, out=None):
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, out_shardings=out)


def train(tx, shardings=None, states=None):
    params, out = PARAMS, None
    if shardings is not None:
        params, out = jax.device_put(params, shardings), (shardings, states)
    state = jax.jit(tx.init, out_shardings=states)(params)
    step = step_of(tx, out)
    for g in gradients(4):
        params, state = step(params, state, g if shardings is None else jax.device_put(g, shardings))
    return params, state


@functools.cache
def alone(name):
    """Parameters and state after training on one device."""
    return train(OPTIMIZERS[name]())


def assert_close(a, b):
    """To a few units in the last place of numbers about 1: how XLA joins operations differs between programs."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=4 * 2.0**-23)


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.one_in(32)
@every_layout
@every_optimizer
def test_a_split_state_is_that_of_one_device_bit_for_bit(name, layout):
    tx = OPTIMIZERS[name]()
    _, shardings = placed(layout)
    states = state_shardings(tx, PARAMS, shardings)
    split = train(tx, shardings, states)
    assert_bit_equal(split, alone(name))
    for x, s in zip(jax.tree.leaves(split[1]), jax.tree.leaves(states), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


def test_parts_follow_their_parameter_where_they_have_its_length():
    tx = optax.chain(mo.scale_by_momentum(mo.nesterov(0.9), storage=BYTES), optax.scale_by_schedule(lambda t: t))
    mesh, shardings = placed("data and model")
    found = jax.tree.map(lambda s: s.spec, state_shardings(tx, PARAMS, shardings))
    codes, scale, noise = (part[0]["w"] for part in (found[0].velocity[k] for k in (0, 1, 3)))
    assert type(found[0].velocity)._fields[0] == "codes"
    assert codes == P("data", "model")
    assert scale == noise == P("data", None)
    assert found[0].step == found[1].count == P()
    assert {s.mesh for s in jax.tree.leaves(state_shardings(tx, PARAMS, shardings))} == {mesh}


def labels(params):
    return jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adam", params)


PARTIAL = {
    "masked": lambda: optax.masked(mo.sgd(0.1, 0.9, storage=BYTES), {"w": True, "b": False, "s": False}),
    "masked by a function": lambda: optax.masked(
        mo.sgd(0.1, 0.9, dampening=0.5), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
    "partitioned": lambda: optax.partition(
        {"muon": mo.muon(0.02, storage="bfloat16"), "adam": mo.compress(optax.adam(1e-3), {"mu": BYTES})}, labels
    ),
    "frozen": lambda: optax.partition(
        {"train": mo.sgd(0.1, 0.9, storage=BYTES), "freeze": optax.set_to_zero()},
        {"w": "train", "b": "freeze", "s": "train"},
    ),
    "Optax's Muon": lambda: optax.contrib.muon(0.02),
}


def follows(state, specs, params):
    """Whether each part under a parameter's name is split as that is along the axes that have its length."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in specs]
        expected = P()
        if names and x.ndim == params[names[-1]].ndim:
            spec, shape = [*specs[names[-1]], None, None], params[names[-1]].shape
            expected = P(*(a if n == m else None for n, m, a in zip(x.shape, shape, spec, strict=False)))
        assert x.sharding.is_equivalent_to(NamedSharding(x.sharding.mesh, expected), x.ndim), (path, x.sharding)


@pytest.mark.parametrize("name", PARTIAL)
def test_a_state_without_some_parameters_is_split_as_the_others_are(name):
    tx = PARTIAL[name]()
    _, shardings = placed("data and model")
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, PARAMS, shardings))(PARAMS)
    assert any(x.shape == (64, 512) for x in jax.tree.leaves(state))
    follows(state, LAYOUTS["data and model"][2], PARAMS)


@pytest.mark.parametrize("name", PARTIAL)
def test_zero1_spreads_a_state_without_some_parameters(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = zero1(PARTIAL[name](), mesh, "data")
    state = jax.jit(tx.init)(PARAMS)
    assert any(x.shape == (64, 512) for x in jax.tree.leaves(state))
    follows(state, {"w": P("data"), "b": P("data"), "s": P()}, PARAMS)


def test_zero1_within_a_mask_skips_what_is_masked_and_what_has_no_gradient():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = optax.masked(zero1(mo.sgd(0.1, 0.9), mesh, "data"), {"w": True, "b": True, "s": False})
    updates, state = jax.jit(tx.update)({**PARAMS, "b": None}, jax.jit(tx.init)(PARAMS), PARAMS)
    assert updates["b"] is None
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    (velocity,) = mo.velocity(state)
    assert velocity["w"].sharding.spec == P("data")
    np.testing.assert_array_equal(velocity["b"], 0)


def collectives(program):
    """The kind and the largest array, in elements, of every collective of a compiled program."""
    found = []
    for result, kind in COLLECTIVE.findall(program.as_text()):
        dims = [d for d in re.findall(r"\w+\[([\d,]*)\]", result)]
        found.append((kind, max(math.prod(int(n) for n in d.split(",") if n) for d in dims)))
    return found


@pytest.mark.one_in(6)
@every_layout
@every_optimizer
def test_a_step_sends_nothing_but_the_scales_of_its_bytes(name, layout):
    tx = OPTIMIZERS[name]()
    _, shardings = placed(layout)
    states = state_shardings(tx, PARAMS, shardings)
    state = jax.eval_shape(tx.init, PARAMS)
    found = collectives(step_of(tx, (shardings, states)).lower(*described(shardings, states, state)).compile())
    if name in ("float32", "bfloat16", "debiased"):
        assert not found
    else:
        assert {kind for kind, _ in found} <= {"all-reduce"}
        assert max((size for _, size in found), default=0) <= 64, "one number a row at most"


def described(shardings, states, state):
    """The arguments of a step, as shapes on their devices."""

    def place(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    params = jax.tree.map(place, PARAMS, shardings)
    return params, jax.tree.map(place, state, states), params


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["float32", "int8"])
def test_a_step_on_sixteen_tpus_sends_no_more(name, monkeypatch):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPU, is not made for this platform")
    for key, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
    ):
        monkeypatch.setenv(key, value)
    devices = np.asarray(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices).reshape(8, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    params = {"w": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}
    shardings = {"w": NamedSharding(mesh, P("data", "model"))}
    tx = mo.sgd(0.1, mo.nesterov(0.9), storage=name)
    states = state_shardings(tx, params, shardings)

    def place(x, s):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    p = jax.tree.map(place, params, shardings)
    state = jax.tree.map(place, jax.eval_shape(tx.init, params), states)
    found = collectives(step_of(tx, (shardings, states)).lower(p, state, p).compile())
    if name == "float32":
        assert not found
    else:
        assert {kind for kind, _ in found} <= {"all-reduce"}
        assert max(size for _, size in found) <= 2048 // 8


def held(tree):
    """Bytes on one device, and in all."""
    leaves = jax.tree.leaves(tree)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves), sum(x.nbytes for x in leaves)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "most"), [("float32", 1.001), ("bfloat16", 1.001), ("int8", 1.05), ("adamw", 1.05)])
def test_zero1_divides_the_state_and_changes_no_number(name, most):
    plain = OPTIMIZERS[name]()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole = jax.tree.map(lambda _: NamedSharding(mesh, P()), PARAMS)
    tx = zero1(plain, mesh, "data")
    params, state = train(tx, whole)
    (assert_close if name == "float32" else assert_bit_equal)((params, state), alone(name))
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(params))
    here, everywhere = held(state)
    assert everywhere / 8 <= here <= everywhere / 8 * most + 64


def updates_of(tx, shardings=None, states=None):
    """The updates of three steps and the state; compiled without the parameters' step, so that XLA fuses it alike."""
    params = PARAMS if shardings is None else jax.device_put(PARAMS, shardings)
    state, update, out = jax.jit(tx.init, out_shardings=states)(params), jax.jit(tx.update), []
    for g in gradients(3):
        u, state = update(g if shardings is None else jax.device_put(g, shardings), state, params)
        out.append(u)
    return out, state


EXPLICIT = {
    "float32": lambda: mo.sgd(0.1, 0.9),
    "int8": lambda: mo.sgd(0.1, 0.9, storage=BYTES),
    "adamw": OPTIMIZERS["adamw"],
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["float32", "int8", pytest.param("adamw", marks=pytest.mark.slow)])
def test_explicit_axes_give_the_bits_of_one_device_and_types_that_stay(name):
    tx = EXPLICIT[name]()
    one = updates_of(tx)
    mesh, shardings = placed("data and model", AxisType.Explicit)
    with jax.set_mesh(mesh):
        params = jax.device_put(PARAMS, shardings)
        # Types follow the parameters without a word about shardings, and do not drift.
        state = jax.jit(tx.init)(params)
        _, after = jax.jit(tx.update)(params, state, params)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        states = state_shardings(tx, PARAMS, shardings)
        split = updates_of(tx, shardings, states)
        assert_bit_equal(split, one)
        for x, s in zip(jax.tree.leaves(split[1]), jax.tree.leaves(states), strict=True):
            assert x.sharding.is_equivalent_to(s, x.ndim)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("float32", (AxisType.Explicit, AxisType.Auto)),
        ("float32", (AxisType.Explicit, AxisType.Explicit)),
        pytest.param("int8", (AxisType.Explicit, AxisType.Explicit), marks=pytest.mark.slow),
        pytest.param("int8", (AxisType.Explicit, AxisType.Auto), marks=pytest.mark.slow),
    ],
)
def test_zero1_over_explicit_axes_gives_the_bits_of_one_device(name, kinds):
    plain = EXPLICIT[name]()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    specs = {"w": P(None, "model"), "b": P("model"), "s": P()}
    with jax.set_mesh(mesh):
        tx = zero1(plain, mesh, "data", specs)
        out, state = updates_of(tx, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    assert_bit_equal((out, state), updates_of(plain))
    (velocity,) = mo.velocity(state)
    assert velocity["w"].sharding.spec == P("data", "model")
    assert {u["w"].sharding.is_equivalent_to(NamedSharding(mesh, specs["w"]), 2) for u in out} == {True}


def test_zero1_adds_to_how_parameters_are_split():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {"w": P(None, "model"), "b": P("model"), "s": P()}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    tx = zero1(OPTIMIZERS["float32"](), mesh, "data", specs)
    params, state = train(tx, shardings)
    (velocity, *_) = mo.velocity(state)
    assert velocity["w"].sharding.spec == P("data", "model")
    assert velocity["b"].sharding.spec == P(("model", "data"))
    for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert p.sharding.is_equivalent_to(s, p.ndim)
    assert_close(params, alone("float32")[0])


def test_zero1_cuts_along_the_first_axis_that_its_devices_divide():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params = {"w": jnp.ones((12, 8)), "b": jnp.ones((6,))}
    tx = zero1(optax.trace(0.9), mesh, "data", {"w": P("model"), "b": P()})
    trace = jax.jit(tx.init)(params).trace
    # Twelve rows go into two, not into eight.
    assert trace["w"].sharding.spec == P("model", "data")
    assert trace["b"].sharding.is_fully_replicated


def test_a_state_in_the_hosts_memory_and_back():
    tx = OPTIMIZERS["int8"]()
    _, shardings = placed("data")
    states = state_shardings(tx, PARAMS, shardings)
    _, state = train(tx, shardings, states)
    away = jax.device_put(state, offloaded(states))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away)} == {"pinned_host"}
    assert_bit_equal(jax.device_put(away, states), state)


@pytest.mark.parametrize(
    ("specs", "error", "match"),
    [
        (None, TypeError, "specs must be a PartitionSpec or a tree of them like the parameters, got None"),
        ({"w": P(), "b": None, "s": P()}, TypeError, "specs must be a PartitionSpec or a tree of them .*, got None"),
        ({"w": ("model",), "b": P(), "s": P()}, TypeError, "specs must be a PartitionSpec .*, got 'model'"),
        (P("tensor"), ValueError, r"specs must name axes of the mesh, \('data', 'model'\), got \['tensor'\]"),
        (P("model"), ValueError, r"no more entries than a parameter has axes, got P.* for params\['s'\] of shape \(\)"),
        (
            {"w": P(), "b": P()},
            ValueError,
            r"a tree of PartitionSpecs like the parameters, got one without params\['s'\]",
        ),
    ],
)
def test_specs_that_do_not_fit_are_named(specs, error, match):
    mesh, _ = placed("data and model")
    with pytest.raises(error, match=match):
        mo.sharding.zero1_specs(PARAMS, mesh, "data", specs)
    with pytest.raises(error, match=match):
        zero1(mo.sgd(0.1, 0.9), mesh, "data", specs).init(PARAMS)


def test_zero1_needs_the_parameters_where_a_gradient_is_none():
    mesh, _ = placed("data")
    params = {"w": jnp.ones((8, 2)), "b": jnp.ones(3), "none": None}
    tx = zero1(mo.sgd(0.1, 0.9), mesh, "data")
    state = tx.init(params)
    missing = params | {"b": None}
    with pytest.raises(
        ValueError, match=r"update of zero1 needs params where a gradient is None, as for params\['b'\]"
    ):
        tx.update(missing, state)
    updates, _ = tx.update(missing, state, params)
    assert updates["b"] is None
    # What was None at init has nothing in the state.
    assert tx.update(params, state)[0]["none"] is None


def test_errors_say_what_is_allowed():
    mesh, shardings = placed("data")
    other, _ = placed("data and model")
    tx = mo.sgd(0.1, 0.9)
    with pytest.raises(TypeError, match=r"NamedShardings, got P.*\['w'\]"):
        state_shardings(tx, PARAMS, {**shardings, "w": P()})
    with pytest.raises(ValueError, match="on one mesh, got 2"):
        state_shardings(tx, PARAMS, {**shardings, "w": NamedSharding(other, P())})
    with pytest.raises(ValueError, match="at least one NamedSharding"):
        state_shardings(tx, {}, {})
    with pytest.raises(ValueError, match="axis must be one of 'data', got 'model'"):
        zero1(tx, mesh, "model")
    with pytest.raises(TypeError, match=r"mesh must be a jax.sharding.Mesh, got 'data'"):
        zero1(tx, "data", "data")
    with pytest.raises(ValueError, match="leave axis 'data' free"):
        zero1(tx, mesh, "data", {"w": P("data"), "b": P(), "s": P()})
    for changed, got in (
        ({"w": shardings["w"], "b": shardings["b"]}, r"one without params\['s'\]"),
        (shardings | {"t": shardings["s"]}, r"one with params\['t'\] too"),
        (shardings["s"], "a single one"),
    ):
        with pytest.raises(
            ValueError, match=f"shardings must be a tree of NamedShardings like the parameters, got {got}"
        ):
            state_shardings(tx, PARAMS, changed)
    with pytest.raises(TypeError, match=r"NamedShardings like the parameters, got None for params\['s'\]"):
        state_shardings(tx, PARAMS, shardings | {"s": None})
    with pytest.raises(ValueError, match=r"shardings must have no more entries .* for params\['s'\] of shape \(\)"):
        state_shardings(tx, PARAMS, shardings | {"s": NamedSharding(mesh, P("data"))})
    with pytest.raises(ValueError, match=r"memory_kind must be one of .*'pinned_host'.*, got 'hbm'"):
        offloaded(shardings, "hbm")
