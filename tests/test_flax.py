"""Training with Flax, NNX and Linen, against NumPy; shardings of the optimizer state on two devices."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import NOT_DEBIASABLE, STORAGES, every_rule, every_storage, runner
from flax import nnx
from flax.nnx.training import optimizer as optimizer_module
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import momentum_optax as mo

STEPS = 40
as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # its name in older versions of Flax


@functools.cache
def digits():
    """600 digits: pixels in [0, 1] and one-hot labels, float32."""
    data = load_digits()
    return np.float32(data.data[:600] / 16), np.eye(10, dtype=np.float32)[data.target[:600]]


def torch_nesterov(v, g):
    v = 0.9 * v + g
    return v, g + 0.9 * v


def damped_heavy_ball(v, g, first):
    v = g if first else 0.9 * v + 0.7 * g
    return v, v


def debiased_ema(v, g, t):
    v = 0.8 * v + 0.2 * g
    return v, v / (1 - 0.8 ** (t + 1))


OPTIMIZERS = {
    "sgd": (lambda: mo.sgd(0.1, 0.9, nesterov=True), lambda v, g, t: torch_nesterov(v, g)),
    "damped": (lambda: mo.sgd(0.1, 0.9, dampening=0.3), lambda v, g, t: damped_heavy_ball(v, g, t == 0)),
    "debiased": (
        lambda: optax.chain(mo.scale_by_momentum(mo.ema(0.8), debias=True), optax.scale_by_learning_rate(0.1)),
        debiased_ema,
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@functools.cache
def numpy_training(name):
    """Losses before each step of softmax regression from zero, and the last parameters, in float64."""
    x, y = map(np.float64, digits())
    x = np.hstack([x, np.ones((len(x), 1))])
    w = v = np.zeros((65, 10))
    losses = []
    for t in range(STEPS):
        logits = x @ w
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        losses.append(-(y * log_p).sum(1).mean())
        v, u = OPTIMIZERS[name][1](v, x.T @ (np.exp(log_p) - y) / len(x), t)
        w = w - 0.1 * u
    return np.array(losses), w


def loss(logits, y):
    return optax.softmax_cross_entropy(logits, y).mean()


def check_training(name, losses, kernel, bias):
    expected, w = numpy_training(name)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    # A sum of 40 float32 steps of at most 1 in size.
    np.testing.assert_allclose(np.vstack([kernel, bias]), w, rtol=0, atol=STEPS * 2.0**-24)
    assert losses[-1] < 0.75 * losses[0]


@every_optimizer
def test_an_nnx_optimizer_trains_as_numpy_does(name):
    x, y = map(jnp.asarray, digits())
    model = nnx.Linear(64, 10, kernel_init=nnx.initializers.zeros_init(), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[name][0](), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda m: loss(m(x), y))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    check_training(name, losses, model.kernel[...], model.bias[...])
    (velocity,) = mo.velocity(as_pure(optimizer.opt_state))
    assert velocity["kernel"].shape == (64, 10)


@every_optimizer
def test_a_linen_train_state_trains_as_numpy_does(name):
    x, y = map(jnp.asarray, digits())
    model = nn.Dense(10, kernel_init=nn.initializers.zeros_init())
    params = model.init(jax.random.key(0), x)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=OPTIMIZERS[name][0]())

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        value, grads = jax.value_and_grad(lambda p: loss(state.apply_fn(p, x), y))(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(STEPS):
        state, value = step(state)
        losses.append(float(value))
    check_training(name, losses, state.params["params"]["kernel"], state.params["params"]["bias"])


def test_an_nnx_model_can_freeze_a_part_and_keep_bf16_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.frozen = nnx.Linear(4, 4, rngs=rngs)
            self.trained = nnx.Linear(4, 1, param_dtype=jnp.bfloat16, rngs=rngs)

        def __call__(self, x):
            return self.trained(self.frozen(x))

    model = Model(nnx.Rngs(0))
    only = nnx.All(nnx.Param, nnx.PathContains("trained"))
    optimizer = nnx.Optimizer(model, mo.sgd(0.1, 0.9), wrt=only)
    before = as_pure(nnx.state(model, nnx.Param))
    grads = nnx.grad(lambda m: (m(jnp.ones((2, 4))) ** 2).mean(), argnums=nnx.DiffState(0, only))(model)
    optimizer.update(model, grads)
    after = as_pure(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, before["frozen"], after["frozen"])
    assert (np.float32(before["trained"]["kernel"]) != np.float32(after["trained"]["kernel"])).all()
    assert after["trained"]["kernel"].dtype == jnp.bfloat16
    (velocity,) = mo.velocity(as_pure(optimizer.opt_state))
    assert set(velocity) == {"trained"}
    assert velocity["trained"]["kernel"].dtype == jnp.float32


# The live state of an optimizer, whose arrays are in variables.

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
    "point of evaluation": lambda s, p: as_pure(mo.eval_params(mo.nesterov(0.9), s, p, 0.1)),
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


# Shardings.


def mesh_of(devices, kind=jax.sharding.AxisType.Auto):
    assert jax.device_count() >= devices, "the tests need two devices, see conftest.py"
    return jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])


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


@pytest.mark.one_in(2)
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


# States in boxes of Linen.


def nesterov():
    return mo.sgd(0.1, mo.nesterov(0.9))


CHANGES = {
    "velocity": lambda s, fresh: mo.velocity(s),
    "point of evaluation": lambda s, fresh: mo.eval_params(mo.nesterov(0.9), s, fresh, 0.1),
    "rescale": lambda s, fresh: mo.rescale(s, 0.5, lambda path: path == "w"),
    "reset": lambda s, fresh: mo.reset(s, nesterov().init(fresh), lambda path: path == "w"),
    "convert": lambda s, fresh: mo.convert(s, SMALL8),
    "convert back": lambda s, fresh: mo.convert(mo.convert(s, SMALL8), "float32", like=nesterov().init(fresh)),
    "from Optax": lambda s, fresh: mo.interop.from_optax(s, optax.TraceState(fresh)),
}


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
