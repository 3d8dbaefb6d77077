"""Flax's ways to split a model over eight devices: boxes of Linen, and NNX over automatic and explicit mesh axes.

Whatever a state holds, it is made split as the parameters are, a step compiles once and changes no type, and the
numbers are those of one device without boxes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax_models import as_pure
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo

P = PartitionSpec


def matrix_momentum(path, x):
    return x.ndim > 1 and any(getattr(key, "name", None) == "mu" for key in path)


INT8, INT4, UINT8 = (f(min_size=512) for f in (mo.storage.int8, mo.storage.int4, mo.storage.uint8))
BALL = mo.heavy_ball(0.9)
# Everything with parts that are shorter than the parameter, and how each storage lays them out.
OPTIMIZERS = {
    "float32": lambda: mo.sgd(0.1, 0.9),
    "bfloat16": lambda: mo.sgd(0.1, 0.9, storage="bfloat16"),
    "int8": lambda: mo.sgd(0.1, 0.9, storage=INT8),
    "int4": lambda: mo.sgd(0.1, 0.9, storage=INT4),
    "several velocities": lambda: mo.sgd(0.1, mo.aggregated(), storage=INT8),
    "first steps": lambda: mo.sgd(0.1, 0.9, dampening=0.5, storage=INT8),
    "debiased": lambda: optax.chain(mo.scale_by_momentum(mo.ema(0.9), debias=True), optax.scale(-0.1)),
    "compressed": lambda: mo.compress(optax.adamw(1e-3), {"mu": INT8, "nu": UINT8}),
    "compressed in part": lambda: mo.compress(optax.adam(1e-3), matrix_momentum, INT8),
    "guarded": lambda: mo.guarded(mo.sgd(0.1, 0.9, storage=INT8), "leaf"),
    "guarded against spikes": lambda: mo.guarded(mo.sgd(0.1, 0.9), "leaf", max_ratio=4.0),
    "restarted": lambda: optax.chain(mo.adaptive_restart(BALL, scope="leaf", storage=INT8), optax.scale(-0.1)),
    "restarted by schedule": lambda: mo.scheduled_restart(mo.sgd(0.1, 0.9, storage=INT8), 2),
    "accumulated": lambda: mo.accumulated(BALL, 2, optax.scale(-0.1), storage=INT8),
    "monitored": lambda: mo.monitor(mo.sgd(0.1, BALL, storage=INT8), BALL),
    "monitored and compressed": lambda: mo.monitor(mo.compress(optax.adam(1e-3), {"mu": INT8})),
    "yellowfin": lambda: mo.contrib.yellowfin(storage=INT8),
    "lion": lambda: mo.lion(1e-3, weight_decay=0.01, storage=INT8),
    "cautious": lambda: optax.chain(mo.cautious(mo.scale_by_momentum(BALL, storage=INT8), "mean"), optax.scale(-0.1)),
    "muon": lambda: optax.partition(
        {"muon": mo.muon(0.02, storage="bfloat16"), "adam": mo.compress(optax.adam(1e-3), {"mu": INT8})},
        lambda params: jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adam", params),
    ),
    "masked": lambda: optax.masked(
        mo.sgd(0.1, 0.9, storage=INT8), lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    ),
}
every_optimizer = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "int8" else pytest.mark.slow) for name in OPTIMIZERS]
)
STEPS = 4
RULES = (("vocab", "model"), ("embed", "data"), ("mlp", "model"), ("heads", "model"), ("kv", None))


def split(init, *names):
    return nn.with_logical_partitioning(init, names)


class Block(nn.Module):
    """A pre-norm transformer block after Flax's lm1b example."""

    @nn.compact
    def __call__(self, x):
        kernel, zeros, ones = nn.initializers.constant(0.01), nn.initializers.zeros, nn.initializers.ones
        y = nn.LayerNorm(scale_init=split(ones, "embed"), bias_init=split(zeros, "embed"))(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=2,
            qkv_features=16,
            kernel_init=split(kernel, "embed", "heads", "kv"),
            out_kernel_init=split(kernel, "heads", "kv", "embed"),
            use_bias=False,
        )(y)
        y = nn.Dense(64, kernel_init=split(kernel, "embed", "mlp"), bias_init=split(zeros, "mlp"))(x)
        return x + nn.Dense(512, kernel_init=split(kernel, "mlp", "embed"), use_bias=False)(nn.relu(y))


class LanguageModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(16, 512, embedding_init=split(nn.initializers.ones, "vocab", "embed"))
        return embed.attend(Block()(embed(tokens)))


TOKENS = np.arange(16).reshape(2, 8)


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)


def gradients(params):
    """The same on every mesh: one tree of normal numbers for each step, in the structure of `params`."""
    rng = np.random.default_rng(0)
    leaves, treedef = jax.tree.flatten(params)
    for _ in range(STEPS):
        yield treedef.unflatten([jax.device_put(np.float32(rng.normal(size=p.shape)), p.sharding) for p in leaves])


def bare(tree):
    """`tree` without boxes, as Flax takes them away."""
    return as_pure(nn.unbox(tree))


def along(shape, like, spec):
    """The split of a part of a state beside a parameter that is split by `spec`."""
    if len(shape) != len(like):
        return P()
    names = [*spec, *[None] * (len(like) - len(spec))]
    return P(*(name if n == m else None for n, m, name in zip(shape, like, names, strict=True)))


def keys(path):
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def check_split(state, params, mesh):
    """Every part of a parameter is split as it is, along each axis that has its length."""
    known = {keys(path): p for path, p in jax.tree_util.tree_leaves_with_path(bare(params))}
    seen = rows = 0
    for path, x in jax.tree_util.tree_leaves_with_path(bare(state)):
        names = keys(path)
        # The labels of partitions come first, Muon's own too.
        p = next((known[names[i:]] for i in range(3) if names[i:] in known), None)
        if p is None:
            continue
        expected = NamedSharding(mesh, along(x.shape, p.shape, p.sharding.spec))
        assert x.sharding.is_equivalent_to(expected, x.ndim), (jax.tree_util.keystr(path), x.sharding, expected)
        seen += x.shape == p.shape and not x.sharding.is_fully_replicated
        rows += x.shape != p.shape and not x.sharding.is_fully_replicated
    assert seen >= 3
    # In bytes the scales are split too, where a row is not the whole array.
    assert bool(rows) == any(x.dtype in (jnp.int8, jnp.int4) for x in jax.tree.leaves(state))


def types(tree):
    """Structure, shapes and dtypes; shardings too, since another one would be another program."""
    return jax.tree.structure(tree), [(jax.typeof(x), x.sharding) for x in jax.tree.leaves(tree)]


def check_equal(split, alone):
    """Whole numbers, and so codes, to the bit; floats to the rounding of sums in another order."""
    split, alone = bare(split), bare(alone)
    assert len(jax.tree.leaves(split)) == len(jax.tree.leaves(alone))
    for x, y in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jnp.floating):
            np.testing.assert_allclose(np.float32(x), np.float32(y), rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


# Linen.


MODEL = LanguageModel()


def make_state(tx):
    return TrainState.create(apply_fn=MODEL.apply, params=MODEL.init(jax.random.key(0), TOKENS)["params"], tx=tx)


@pytest.mark.parametrize(
    "boxed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["boxed", "unboxed after init"]
)
@every_optimizer
def test_a_linen_state_is_split_by_the_names_in_its_boxes(name, boxed):
    tx, mesh = OPTIMIZERS[name](), mesh_of()
    abstract = jax.eval_shape(lambda: make_state(tx))
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract), mesh, RULES)
    state = jax.jit(lambda: make_state(tx), out_shardings=shardings)()
    check_split(state.opt_state, state.params, mesh)
    state = state if boxed else nn.unbox(state)
    alone = jax.device_put(bare(state), jax.devices()[0])
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads), out_shardings=shardings)
    single_step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    before = types(state)
    for grads, single in zip(gradients(state.params), gradients(alone.params), strict=True):
        state, alone = step(state, grads), single_step(alone, single)
        check_split(state.opt_state, state.params, mesh)
        assert types(state) == before
    assert step._cache_size() == 1
    check_equal(state.opt_state, alone.opt_state)


# What Optax computes itself needs gradients that are boxed as its state is.
OPTAX_INSIDE = {"compressed", "compressed in part", "monitored and compressed", "muon", "masked"}


@every_optimizer
def test_gradients_may_come_boxed_or_unboxed_and_no_type_changes(name):
    tx = OPTIMIZERS[name]()
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    state = jax.eval_shape(tx.init, boxed)
    assert jax.tree.structure(nn.unbox(state)) == jax.tree.structure(jax.eval_shape(tx.init, nn.unbox(boxed)))
    for old, grads in ((s, g) for s in (state, nn.unbox(state)) for g in (boxed, nn.unbox(boxed))):
        if (old is state) != (grads is boxed) and name in OPTAX_INSIDE:
            continue
        updates, new = jax.eval_shape(tx.update, grads, old, grads)
        for a, b in ((updates, grads), (new, old)):
            assert jax.tree.structure(a) == jax.tree.structure(b)
            assert [(x.shape, x.dtype) for x in jax.tree.leaves(a)] == [(x.shape, x.dtype) for x in jax.tree.leaves(b)]


@every_optimizer
def test_state_shardings_takes_boxes(name):
    tx, mesh = OPTIMIZERS[name](), mesh_of()
    boxed = jax.eval_shape(MODEL.init, jax.random.key(0), TOKENS)["params"]
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    states = mo.sharding.state_shardings(tx, boxed, shardings)
    assert jax.tree.structure(states) == jax.tree.structure(jax.eval_shape(tx.init, boxed))
    params = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), boxed), out_shardings=shardings)()
    check_split(jax.jit(tx.init, out_shardings=states)(params), params, mesh)


# NNX.


class Partitioned(nnx.Module):
    """An embedding and two layers, with the names of mesh axes in the metadata of their variables."""

    def __init__(self, rngs):
        def named(init, *names):
            return nnx.with_partitioning(init, names)

        ones, kernel, zeros = (nnx.initializers.constant(x) for x in (1.0, 0.01, 0.0))
        self.embed = nnx.Embed(16, 512, embedding_init=named(ones, "model", "data"), rngs=rngs)
        self.up = nnx.Linear(
            512, 64, kernel_init=named(kernel, "data", "model"), bias_init=named(zeros, "model"), rngs=rngs
        )
        self.down = nnx.Linear(64, 512, kernel_init=named(kernel, "model", "data"), use_bias=False, rngs=rngs)


class Whole(nnx.Module):
    """The same without names."""

    def __init__(self, rngs):
        ones, kernel = nnx.initializers.constant(1.0), nnx.initializers.constant(0.01)
        self.embed = nnx.Embed(16, 512, embedding_init=ones, rngs=rngs)
        self.up = nnx.Linear(512, 64, kernel_init=kernel, rngs=rngs)
        self.down = nnx.Linear(64, 512, kernel_init=kernel, use_bias=False, rngs=rngs)


def train_nnx(model_class, tx, check=lambda state, params: None):
    """The optimizer's state after some steps; made inside `nnx.jit`, looked at after each."""

    @nnx.jit
    def make():
        model = model_class(nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, grads):
        optimizer.update(model, grads)

    model, optimizer = make()
    params = nnx.state(model, nnx.Param)
    before = types(as_pure(optimizer.opt_state))
    check(optimizer.opt_state, params)
    for grads in gradients(params):
        step(model, optimizer, grads)
        check(optimizer.opt_state, params)
        assert types(as_pure(optimizer.opt_state))[0] == before[0]
        assert [x for x, _ in types(as_pure(optimizer.opt_state))[1]] == [x for x, _ in before[1]]
    return as_pure(optimizer.opt_state)


eager_sharding = pytest.mark.skipif(
    not hasattr(nnx, "use_eager_sharding"), reason="this Flax does not place variables when it makes them"
)


@eager_sharding
@pytest.mark.parametrize(
    "kind",
    [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit],
    ids=["auto", "explicit"],
)
@every_optimizer
def test_an_nnx_state_is_split_by_the_names_of_its_variables(name, kind):
    tx, mesh = OPTIMIZERS[name](), mesh_of(kind)
    with jax.set_mesh(mesh):
        split = train_nnx(Partitioned, tx, lambda state, params: check_split(state, params, mesh))
    check_equal(split, train_nnx(Whole, tx))


@pytest.mark.one_in(3)
@eager_sharding
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@every_optimizer
def test_an_nnx_state_that_is_made_outside_jit_is_split_too(name, kind):
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        model = Partitioned(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name](), wrt=nnx.Param)
    check_split(optimizer.opt_state, nnx.state(model, nnx.Param), mesh)
