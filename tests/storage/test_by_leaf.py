"""Storages by leaf: each leaf as if all were in its storage, in every tool that reads a state."""

import dataclasses
import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import avals, gradients
from finished import OPTIMIZERS
from flax import nnx

import momentum_optax as mo
from momentum_optax.wrappers.fields import CompressedField, decompress_field

INT8 = mo.storage.int8(min_size=1)
NEAREST = mo.storage.bfloat16("nearest")
# The leaves of the parameters with the storage of each; in the order of their paths.
STORAGES = {"embed/table": NEAREST, "head": "float32", "layers/0/kernel": INT8, "layers/1/kernel": INT8}
PARAMS = {
    "embed": {"table": jnp.ones((4, 128))},
    "head": jnp.ones((4, 128)),
    "layers": [{"kernel": jnp.ones((2, 128))}, {"kernel": jnp.ones((2, 128))}],
}
GRADIENTS = [gradients(PARAMS, seed) for seed in range(3)]
PATTERNS = {"head": "float32", "embed/.*": NEAREST, ".*": INT8}


def function(path, leaf):
    return STORAGES[path] if leaf.shape[0] != 2 else INT8


CHOICES = {"patterns": PATTERNS, "a function": function, "an object": mo.storage.by_leaf(function)}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
# Cheap to trace: no leaf in bytes.
FLOATS = {"patterns": {"head": "float32", ".*": "bfloat16"}, "a function": lambda path, leaf: FLOATS_OF[path == "head"]}
FLOATS_OF = ["bfloat16", "float32"]
either = pytest.mark.parametrize("choice", FLOATS.values(), ids=FLOATS)


def run(tx, seen=(0, 1, 2)):
    """Updates and state after a few steps."""
    state, step = tx.init(PARAMS), jax.jit(tx.update)
    for i in seen:
        updates, state = step(GRADIENTS[i], state, PARAMS)
    return updates, state


@functools.cache
def patterned():
    """The heavy ball with the patterns."""
    return run(heavy_ball(PATTERNS))


@functools.cache
def uniform(make, storage):
    return run(make(storage))[0]


def heavy_ball(storage):
    return mo.scale_by_momentum(mo.heavy_ball(0.9), storage=storage)


def compressed(storage):
    return mo.compress(optax.adam(0.1), {"mu": storage})


def leaves_by_path(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("make", [heavy_ball, pytest.param(compressed, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "choice",
    [PATTERNS, *(pytest.param(c, marks=pytest.mark.slow) for c in list(CHOICES.values())[1:])],
    ids=CHOICES,
)
def test_each_leaf_is_kept_as_if_all_were_in_its_storage(make, choice):
    tx = make(choice)
    updates, state = patterned() if choice is PATTERNS and make is heavy_ball else run(tx)
    assert avals(state) == avals(tx.init(PARAMS))
    for path, u in leaves_by_path(updates).items():
        np.testing.assert_array_equal(u, leaves_by_path(uniform(make, STORAGES[path]))[path], strict=True)
    # Far from the truth, so that which storage a leaf is in shows; and the noise of equal leaves differs.
    exact = leaves_by_path(uniform(make, "float32"))
    assert [np.array_equal(u, exact[path]) for path, u in leaves_by_path(updates).items()] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.slow
def test_the_noise_of_two_leaves_with_equal_gradients_differs():
    tx = heavy_ball({"layers/0/.*": "bfloat16", "layers/1/.*": mo.storage.bfloat16(), ".*": "float32"})
    g = jax.tree.map(lambda p: jnp.broadcast_to(jnp.linspace(0.1, 1, 128) / 3, p.shape), PARAMS)
    _, state = jax.jit(tx.update)(g, tx.init(PARAMS))
    zero, one = (layer["kernel"] for layer in mo.velocity(state)[0]["layers"])
    assert 0.2 < np.mean(zero != one) < 0.8


def test_the_layout_depends_on_the_classes_alone():
    layouts = [
        jax.tree.structure(jax.eval_shape(heavy_ball(choice).init, PARAMS))
        for choice in (PATTERNS, function, dict(reversed(list(PATTERNS.items()))), {"layers/0/.*": NEAREST, **PATTERNS})
    ]
    assert len(set(layouts)) == 1
    # One class alone has the layout that it has without a choice.
    one = heavy_ball({"head": INT8, ".*": "int8"}), heavy_ball(lambda path, leaf: "int8"), heavy_ball("int8")
    assert len({jax.tree.structure(tx.init(PARAMS)) for tx in one}) == 1
    velocity = heavy_ball(PATTERNS).init(PARAMS).velocity
    assert [x.dtype.name for x in jax.tree.leaves(velocity.stored["Float32Velocity"])] == [
        "bool",
        "float32",
        "bool",
        "bool",
    ]
    assert velocity.stored["Int8Velocity"].codes[0]["embed"]["table"].shape == (1, 1)


# Paths.


class Pair(typing.NamedTuple):
    left: typing.Any
    right: typing.Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=[])
@dataclasses.dataclass
class Module:
    """As Equinox has them: a dataclass whose fields are attributes of paths."""

    weight: typing.Any


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("in", None))
        return nn.Dense(3, kernel_init=init, name="dense")(x)


W = jnp.ones((2, 3))
TREES = {
    "an array": (lambda: W, [""]),
    "dictionaries": (lambda: {"a": {"b": W}, "c": W}, ["a/b", "c"]),
    "sequences": (lambda: [(W, W), W], ["0/0", "0/1", "1"]),
    "NamedTuples": (lambda: Pair({"w": W}, W), ["left/w", "right"]),
    "dataclasses, as of Equinox": (lambda: {"m": Module([W])}, ["m/weight/0"]),
    "boxes of Linen": (
        lambda: jax.eval_shape(Linen().init, jax.random.key(0), W)["params"],
        ["dense/bias", "dense/kernel"],
    ),
    "nnx.State": (lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param), ["bias", "kernel"]),
    "None and masked leaves": (lambda: {"a": None, "b": W, "c": optax.MaskedNode()}, ["b"]),
}


@pytest.mark.parametrize(("make", "paths"), TREES.values(), ids=TREES)
def test_paths_are_written_alike_in_every_container(make, paths):
    seen = []
    tx = heavy_ball(lambda path, leaf: seen.append((path, leaf.shape)) or "float32")
    state = jax.eval_shape(tx.init, make())
    assert sorted({path for path, _ in seen}) == paths
    assert {shape for _, shape in seen} <= {(2, 3), (3, 3), (3,)}
    # As `reset` writes them, and as a pattern meets them whole.
    selected = []
    mo.reset(state, state, lambda path: selected.append(path) or True)
    assert sorted(set(selected)) == paths
    jax.eval_shape(heavy_ball({path: "float32" for path in paths}).init, make())


def test_a_key_with_a_line_break_matches_what_stands_for_all():
    params = {"a\nb": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.float32)}
    state = jax.eval_shape(heavy_ball({"b": "bfloat16", ".*": "float32"}).init, params)
    stored = {(x.shape, x.dtype.name) for x in jax.tree.leaves(state) if x.ndim and x.size > 1}
    assert stored == {((2, 3), "float32"), ((3,), "bfloat16")}


# Errors.

WRONG = {
    "no pattern": ({}, ValueError, "at least one pattern"),
    "no match": ({"head": "int8"}, ValueError, r"whole of the path 'embed/table'.*'head'.*'\.\*' as the last"),
    "a match of a part": ({"hea": "int8", "embed/.*": "int8", "layers.*": "int8"}, ValueError, "path 'head'"),
    "no expression": ({"(": "int8"}, ValueError, r"regular expressions, got '\('"),
    "no string": ({3: "int8"}, TypeError, "regular expressions as strings, got 3"),
    "no storage": ({".*": "int9"}, ValueError, "must be one of 'float32'"),
    "a mapping in a mapping": ({".*": {}}, TypeError, "must be a name or an object"),
    "for squares": ({"head": "uint8", ".*": "int8"}, ValueError, "either sign"),
    "a function to no storage": (lambda path, leaf: "int9", ValueError, "function for 'embed/table'"),
    "a function to squares": (lambda path, leaf: "uint8", ValueError, "either sign"),
}


@pytest.mark.parametrize(("choice", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_raises_before_the_first_step(choice, error, message):
    with pytest.raises(error, match=message) as caught:
        heavy_ball(choice).init(PARAMS)
    assert len(str(caught.value)) < 300
    with pytest.raises(error):
        mo.compress(optax.adam(0.1), {"mu": choice}).init(PARAMS)


@dataclasses.dataclass
class Unhashable:
    """A function with options: Python compares dataclasses by value, and does not hash those that can change."""

    least: int = 2

    def __call__(self, path, leaf):
        return "bfloat16" if leaf.ndim >= self.least else "float32"


def test_a_function_may_be_an_object_without_a_hash():
    got, like = (jax.eval_shape(heavy_ball(choice).init, PARAMS) for choice in (Unhashable(), Unhashable().__call__))
    assert avals(got) == avals(like)
    assert jax.tree.structure(got) == jax.tree.structure(like)


def test_a_leaf_in_another_storage_raises_with_its_path():
    for make in (heavy_ball, compressed):
        state = jax.eval_shape(make({"head": "bfloat16", ".*": "float32"}).init, PARAMS)
        for other in ({"embed/.*": "bfloat16", ".*": "float32"}, lambda path, leaf: FLOATS_OF[path != "embed/table"]):
            with pytest.raises(ValueError, match=r"params\['embed'\]\['table'\] in a Float32Velocity") as caught:
                jax.eval_shape(make(other).update, PARAMS, state, PARAMS)
            assert len(str(caught.value)) < 300 or make is compressed
        with pytest.raises(ValueError, match=r"Bfloat16Velocity and (a )?Float32Velocity"):
            jax.eval_shape(make("float32").update, PARAMS, state, PARAMS)


def test_squares_need_a_storage_for_squares_in_every_leaf():
    mo.compress(optax.adam(0.1), {"nu": {"head": "float32", ".*": "uint8"}}).init(PARAMS)
    for choice in ({"head": "int8", ".*": "uint8"}, lambda path, leaf: "int8" if path == "head" else "uint8"):
        with pytest.raises(ValueError, match="second moments"):
            mo.compress(optax.adam(0.1), {"nu": choice}).init(PARAMS)


# Routes.

WHOLE = {
    "a finished optimizer": lambda storage: mo.sgd(0.1, 0.9, storage=storage),
    "compress": lambda storage: mo.compress(optax.adam(0.1), {"mu": storage, "nu": FLOATS["patterns"]}),
    "a predicate": lambda storage: mo.compress(optax.adam(0.1), lambda path, leaf: "mu" in str(path), storage),
    "accumulated": lambda storage: mo.accumulated(mo.heavy_ball(0.9), 2, storage=storage),
    "guarded by leaf": lambda storage: mo.guarded(heavy_ball(storage), scope="leaf"),
    "a restart": lambda storage: mo.adaptive_restart(mo.nesterov(0.9), storage=storage),
    "monitor": lambda storage: mo.monitor(heavy_ball(storage)),
    "several velocities": lambda storage: mo.scale_by_momentum(mo.aggregated((0, 0.5, 0.9)), storage=storage),
    "a first step and debiasing": lambda storage: mo.scale_by_momentum(mo.ema(0.9), storage=storage, debias=True),
    "a mask": lambda storage: optax.masked(heavy_ball(storage), {"embed": False, "head": True, "layers": True}),
    "inject_hyperparams": lambda storage: optax.inject_hyperparams(mo.sgd)(
        0.1, 0.9, storage=mo.storage.by_leaf(storage)
    ),
    "no velocity": lambda storage: mo.scale_by_momentum(mo.heavy_ball(0.0), storage=storage),
}
every_route = pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)


@pytest.mark.one_in(2)
@every_route
@either
def test_states_are_placed_read_and_edited_on_every_route(make, choice):
    tx = make(choice)
    state = jax.eval_shape(tx.init, PARAMS)
    jax.eval_shape(tx.update, PARAMS, state, PARAMS)
    mesh = jax.make_mesh((2,), ("x",))
    split = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P(None, "x")), PARAMS)
    placed = mo.sharding.state_shardings(tx, PARAMS, split)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert any(sharding.spec) == (x.shape in {(2, 128), (4, 128)})
        assert sharding.spec in (jax.P(None, "x"), jax.P(*[None] * x.ndim), jax.P())
    mo.checkpoint.check(mo.checkpoint.describe(state), state)
    assert mo.state_bytes(tx, PARAMS).total == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    trees = jax.eval_shape(mo.velocity, state)
    select = (lambda path: path == "head") if trees or "Compressed" in str(state) else None
    assert avals(jax.eval_shape(lambda s: mo.reset(s, s, select), state)) == avals(state)
    for tree in trees:
        assert {x.dtype.name for x in jax.tree.leaves(tree)} == {"float32"}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"mars_adamw"}))
def test_every_finished_optimizer_and_dialect_takes_a_mapping(name):
    tx = OPTIMIZERS[name](storage=FLOATS["patterns"])
    state = jax.eval_shape(tx.init, PARAMS)
    assert "VelocityByLeaf" in str(jax.tree.structure(state))


@either
def test_map_params_finds_every_part_or_says_what_it_needs(choice):
    tx = heavy_ball(choice)
    state = tx.init(PARAMS)
    if callable(choice):
        with pytest.raises(ValueError, match=r"mapping of patterns for optax\.tree\.map_params"):
            optax.tree.map_params(tx, lambda x: x, state)
        return
    ranks = optax.tree.map_params(tx, lambda x, p: x.ndim == p.ndim, state, PARAMS, transform_non_params=lambda _: True)
    assert all(jax.tree.leaves(ranks))


def test_boxes_of_linen_get_specifications_for_every_part():
    tx = heavy_ball({".*bias": "float32", ".*": INT8})
    variables = jax.eval_shape(Linen().init, jax.random.key(0), W)
    state = jax.eval_shape(tx.init, variables["params"])
    specs = nn.get_partition_spec(state)
    bare = jax.eval_shape(tx.init, nn.unbox(variables["params"]))
    assert jax.tree.structure(nn.unbox(state)) == jax.tree.structure(bare)
    stored = specs.velocity.stored
    assert stored["Int8Velocity"].codes[0]["dense"]["kernel"] == jax.P("in", None)
    assert stored["Float32Velocity"].values[0]["dense"]["kernel"] in (jax.P(), jax.P(None, None))


# Tools on values.


def values_of(state):
    if hasattr(state, "velocity"):
        return mo.velocity(state)[0]
    (field,) = [x for x in jax.tree.leaves(state, is_leaf=is_field) if is_field(x)]
    return decompress_field(field)


def is_field(x):
    return isinstance(x, CompressedField)


@pytest.mark.slow
@pytest.mark.parametrize("make", [heavy_ball, compressed])
def test_a_state_is_converted_leaf_by_leaf_and_back(make):
    floats = {"head": "float32", ".*": NEAREST}
    tx, other = make("float32"), make(floats)
    state = jax.tree.map(lambda x: x + jnp.asarray(0.3).astype(x.dtype) if x.ndim else x, tx.init(PARAMS))
    name = "velocity" if make is heavy_ball else "mu"
    there = mo.convert(state, {name: floats}, like=other.init(PARAMS))
    assert avals(there) == avals(other.init(PARAMS))
    jax.eval_shape(other.update, PARAMS, there, PARAMS)
    if make is heavy_ball:
        assert jax.tree.all(jax.tree.map(np.array_equal, there, mo.convert(state, floats)))
    # What is in its storage already is not rounded again, and the rest is exact on the way back.
    again = mo.convert(there, {name: {"embed/.*": NEAREST, ".*": "float32"}})
    values = values_of(again)
    np.testing.assert_array_equal(values["embed"]["table"], values_of(there)["embed"]["table"])
    assert float(values["head"][0, 0]) == np.float32(0.3) != float(values["embed"]["table"][0, 0])
    with pytest.raises(ValueError, match="like must have the shapes of the new state"):
        mo.convert(state, {name: {"embed/.*": NEAREST, ".*": "float32"}}, like=other.init(PARAMS))


def test_bytes_in_other_storages_keep_their_bits_when_a_state_is_converted():
    _, state = patterned()
    new = mo.convert(state, {**PATTERNS, "head": "bfloat16"})
    old, now = (x.velocity.stored["Int8Velocity"] for x in (state, new))
    assert jax.tree.all(jax.tree.map(np.array_equal, old, now))
    assert new.velocity.stored["Bfloat16Velocity"].values[0]["head"].dtype == jnp.bfloat16


@pytest.mark.slow
def test_velocities_are_rescaled_in_every_storage():
    _, state = patterned()
    half = mo.rescale(state, 0.5, lambda path: path != "layers/1/kernel")
    old, new = mo.velocity(state)[0], mo.velocity(half)[0]
    old = {**old, "layers": [old["layers"][0], {"kernel": 2 * old["layers"][1]["kernel"]}]}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a / 2, b), old, new)


@pytest.mark.slow
def test_a_monitor_measures_every_storage():
    tx = mo.monitor(mo.scale_by_momentum(mo.heavy_ball(0.9), storage={"head": "float32", ".*": NEAREST}))
    _, state = run(tx, (0, 1))
    found = mo.telemetry(state)
    exact = run(heavy_ball("float32"), (0, 1))[0]
    norm = np.sqrt(sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(exact)))
    assert found["velocity_norm"] == pytest.approx(norm, rel=1e-2)
    assert 0 < found["quantization_error"] < 2**-8


@pytest.mark.slow
@every_choice
@pytest.mark.parametrize("make", [heavy_ball, compressed])
def test_the_state_on_two_devices_is_that_on_one(make, choice):
    tx = make(choice)
    _, state = run(tx)
    mesh = jax.make_mesh((2,), ("x",))
    split = jax.tree.map(lambda _: jax.NamedSharding(mesh, jax.P("x")), PARAMS)
    shardings = mo.sharding.state_shardings(tx, PARAMS, split)
    sharded, params = jax.device_put(tx.init(PARAMS), shardings), jax.device_put(PARAMS, split)
    step = jax.jit(tx.update, out_shardings=(split, shardings))
    for g in GRADIENTS:
        _, sharded = step(jax.device_put(g, split), sharded, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, sharded))
    spread = mo.sharding.zero1(tx, mesh, "x")
    _, last = run(spread)
    assert jax.tree.all(jax.tree.map(np.array_equal, state, last))


@pytest.mark.slow
@every_route
@every_choice
def test_every_route_steps_twice_with_bytes(make, choice):
    tx = make(choice)
    _, state = run(tx, (0, 1))
    assert avals(state) == avals(tx.init(PARAMS))
    assert all(np.isfinite(x).all() for tree in mo.velocity(state) for x in jax.tree.leaves(tree))
