"""Models of Flax on small meshes: velocities are split as the parameters are."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import NOT_DEBIASABLE, STORAGES, every_rule, every_storage, runner
from flax import nnx
from flax_models import as_pure, mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import momentum_optax as mo


class Sharded(nnx.Module):
    """Two layers, split by columns and by rows over the axis x."""

    def __init__(self, rngs):
        def split(init, *axes):
            return nnx.with_partitioning(init, axes)

        kernel, zeros = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()
        self.up = nnx.Linear(4, 6, kernel_init=split(kernel, None, "x"), bias_init=split(zeros, "x"), rngs=rngs)
        self.down = nnx.Linear(6, 1, kernel_init=split(kernel, "x", None), rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def train_sharded(tx, steps=3):
    """The model and its optimizer, built inside jit; a few steps on constant data."""

    @nnx.jit
    def make():
        model = Sharded(nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: ((m(jnp.ones((8, 4))) - 1) ** 2).mean())(model))

    model, optimizer = make()
    created = as_pure(optimizer.opt_state)
    for _ in range(steps):
        step(model, optimizer)
    return as_pure(nnx.state(model, nnx.Param)), created, as_pure(optimizer.opt_state)


def same_split(a, b):
    """Whether two arrays of one shape lie on the devices in the same way."""
    return a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [
        *(mo.sgd(0.1, 0.9, storage=storage) for storage in STORAGES),
        mo.sgd(0.1, 0.9, dampening=0.5),
        optax.chain(runner("ema", debias=True), optax.scale_by_learning_rate(0.1)),
        optax.chain(runner("grokfast_average", debias=True), optax.scale_by_learning_rate(0.1)),
    ],
    ids=[*STORAGES, "dampened with an age", "debiased with a gain", "many velocities, age and gain"],
)
def test_velocities_of_an_nnx_model_are_split_as_its_parameters_are(tx):
    with jax.set_mesh(mesh_of(1)):
        single, _, _ = train_sharded(tx)
    with jax.set_mesh(mesh_of(2)):
        params, created, trained = train_sharded(tx)
    assert params["up"]["kernel"].sharding.spec == PartitionSpec(None, "x")
    for state in (created, trained):
        assert mo.velocity(state)
        for velocity in mo.velocity(state):
            assert jax.tree.all(jax.tree.map(same_split, velocity, params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, single)


def split_evenly(leaf, spec):
    """The specification of a parameter for a part of the state, of the same rank but perhaps with axes of size 1."""
    axes = [*spec, *[None] * (len(leaf.shape) - len(spec))]
    return PartitionSpec(*(a if n % 2 == 0 else None for n, a in zip(leaf.shape, axes, strict=True)))


@pytest.mark.one_in(2)
@pytest.mark.rare_storages
@every_rule
@every_storage
def test_map_params_gives_every_part_of_the_state_the_specification_of_its_parameter(rule, storage):
    tx = optax.chain(runner(rule, storage, debias=rule not in NOT_DEBIASABLE), optax.scale_by_learning_rate(0.1))
    params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32), "b": jax.ShapeDtypeStruct((6,), jnp.bfloat16)}
    specs = {"w": PartitionSpec(None, "x"), "b": PartitionSpec("x")}
    state = jax.eval_shape(tx.init, params)
    got = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: PartitionSpec())
    assert jax.tree.structure(got) == jax.tree.structure(state)
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(got), strict=True):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        assert spec == (specs[names[0]] if names else PartitionSpec())
        assert len(spec) <= len(leaf.shape)


def test_out_shardings_from_map_params_place_the_state():
    mesh = mesh_of(2)
    tx = optax.chain(runner("ema", debias=True), optax.scale_by_learning_rate(0.1))
    params = {"w": jnp.ones((4, 6)), "b": jnp.ones((6,))}
    specs = {"w": PartitionSpec(None, "x"), "b": PartitionSpec("x")}
    shardings = optax.tree.map_params(
        tx,
        lambda leaf, spec: NamedSharding(mesh, split_evenly(leaf, spec)),
        jax.eval_shape(tx.init, params),
        specs,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    params = jax.tree.map(lambda p, s: jax.device_put(p, NamedSharding(mesh, s)), params, specs)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    _, state = jax.jit(tx.update, out_shardings=(None, shardings))(params, state)
    (velocity,) = mo.velocity(state)
    for name, p in params.items():
        assert same_split(velocity[name], p)
        np.testing.assert_allclose(velocity[name], 0.1, rtol=1e-6)


@pytest.mark.one_in(2)
@every_storage
def test_types_with_explicit_shardings_do_not_drift(storage):
    mesh = mesh_of(2, jax.sharding.AxisType.Explicit)
    tx = runner("grokfast_average", storage, debias=True)
    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.ones((4, 6), jnp.bfloat16), NamedSharding(mesh, PartitionSpec(None, "x")))
        state = tx.init(w)
        updates, after = jax.jit(tx.update)(w, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        assert jax.typeof(updates) == jax.typeof(w)
        assert {jax.typeof(v).sharding.spec for v in mo.velocity(after)} == {jax.typeof(w).sharding.spec}


class Partitioned(nnx.Module):
    """Split in the metadata of its parameters; velocities are not, as they follow from the types of the arrays."""

    def __init__(self, rngs):
        def split(*axes):
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), axes, optimizer_sharding=None)

        self.up = nnx.Linear(8, 64, kernel_init=split(None, "x"), rngs=rngs)
        self.down = nnx.Linear(64, 2, kernel_init=split("x", None), rngs=rngs)


@pytest.mark.skipif(not hasattr(nnx, "use_eager_sharding"), reason="this Flax cannot partition over explicit axes")
@pytest.mark.parametrize(
    "storage", [mo.storage.int8(min_size=512), pytest.param("float32", marks=pytest.mark.slow)], ids=["int8", "float32"]
)
def test_a_partitioned_nnx_model_on_explicit_axes_gives_the_bits_of_one_device(storage):
    tx = mo.sgd(0.1, 0.9, storage=storage)

    def train(mesh):
        @nnx.jit
        def make():
            model = Partitioned(nnx.Rngs(0))
            return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            optimizer.update(model, jax.tree.map(lambda p: 3 * p, nnx.state(model, nnx.Param)))

        with jax.set_mesh(mesh):
            model, optimizer = make()
            before = jax.tree.map(jax.typeof, as_pure(optimizer.opt_state))
            for _ in range(3):
                step(model, optimizer)
        state = as_pure(optimizer.opt_state)
        assert jax.tree.map(jax.typeof, state) == before
        return as_pure(nnx.state(model, nnx.Param)), state

    one, split = train(mesh_of(1)), train(mesh_of(4, jax.sharding.AxisType.Explicit))
    jax.tree.map(np.testing.assert_array_equal, split, one)
    (velocity,) = mo.velocity(split[1])
    assert velocity["up"]["kernel"].sharding.spec == PartitionSpec(None, "x")
