"""`by_path` against one optimizer for each leaf alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import gradients
from flax import nnx
from flax_models import mesh_of
from jax.sharding import NamedSharding, PartitionSpec

import momentum_optax as mo

PARAMS = {
    "embed": {"table": jnp.ones((4, 3))},
    "layers": [{"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}, {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}],
}
PATTERNS = {"embed/.*": {"learning_rate": 10.0}, r".*/bias": {"weight_decay": 0.0, "momentum": 0.5}, ".*": {}}
RATE = optax.linear_schedule(0.1, 0.0, 10)
SIGNAL = [gradients(PARAMS, seed) for seed in range(3)]


def follow(tx, params=PARAMS):
    state, step = tx.init(params), jax.jit(tx.update)
    for g in SIGNAL:
        u, state = step(jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(g)), state, params)
        params = optax.apply_updates(params, u)
    assert step._cache_size() == 1
    return params


def heavy_ball(p, leaf_of, rate=1.0, decay=0.9, weight_decay=0.01):
    """SGD with momentum and coupled weight decay, in float64."""
    p, v = np.float64(p), 0.0
    for t, g in enumerate(SIGNAL):
        v = decay * v + np.float64(leaf_of(g)) + weight_decay * p
        p = p - rate * 0.1 * (1 - t / 10) * v
    return p


EXPECTED = {
    "embed": {"table": heavy_ball(jnp.ones((4, 3)), lambda g: g["embed"]["table"], rate=10.0)},
    "layers": [
        {
            "kernel": heavy_ball(PARAMS["layers"][i]["kernel"], lambda g, i=i: g["layers"][i]["kernel"]),
            "bias": heavy_ball(jnp.zeros(2), lambda g, i=i: g["layers"][i]["bias"], decay=0.45, weight_decay=0.0),
        }
        for i in range(2)
    ],
}


def assert_expected(params):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.tree.leaves(params),
        jax.tree.leaves(EXPECTED),
    )


def multiplied(learning_rate=RATE):
    return mo.by_path(PATTERNS, mo.sgd, learning_rate=learning_rate, momentum=0.9, weight_decay=0.01)


def separate():
    return mo.by_path(
        {
            "embed/table": mo.sgd(lambda t: 10 * RATE(t), 0.9, weight_decay=0.01),
            r"layers/\d/bias": mo.sgd(RATE, 0.45),
            "layers/.*": mo.sgd(RATE, 0.9, weight_decay=0.01),
        }
    )


@pytest.mark.parametrize("make", [multiplied, separate])
def test_each_parameter_has_the_optimizer_of_the_first_pattern_that_matches_its_whole_path(make):
    assert_expected(follow(make()))


def test_hyperparameters_are_injected_around_it():
    tx = optax.inject_hyperparams(multiplied)(learning_rate=RATE)
    assert_expected(follow(tx))
    np.testing.assert_allclose(tx.init(PARAMS).hyperparams["learning_rate"], 0.1)


def test_boxes_of_linen_and_nnx_have_the_paths_of_their_parameters():
    boxed = jax.tree.map(lambda p: nn.Partitioned(p, (None,) * p.ndim), PARAMS)
    assert_expected(nn.unbox(follow(multiplied(), boxed)))

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = mo.by_path({"kernel": mo.sgd(0.1, 0.9), "bias": optax.set_to_zero()})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    np.testing.assert_allclose(after["kernel"], before["kernel"] - 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], before["bias"])
    assert len(mo.velocity(optimizer.opt_state)) == 1


def test_states_are_split_as_parameters_are_described_and_averaged():
    mesh = mesh_of(2)
    tx = optax.chain(multiplied(0.1), mo.average_params(0.9))
    params = jax.tree.map(lambda p: jax.ShapeDtypeStruct((*p.shape, 4), p.dtype), PARAMS)
    shardings = jax.tree.map(
        lambda p: NamedSharding(mesh, PartitionSpec(*[None] * (len(p.shape) - 1), mesh.axis_names[0])), params
    )
    placed = mo.sharding.state_shardings(tx, params, shardings)
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(placed) == jax.tree.structure(state)
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        assert sharding.is_fully_replicated == (x.shape[-1:] != (4,))
    state = tx.init(PARAMS)
    mo.checkpoint.check(mo.checkpoint.describe(state), state)
    # Keys that a file system takes.
    assert list(state[0].inner_states) == ["0_embed", "1_bias", "2_"]


def test_a_gradient_of_none_keeps_its_leaf():
    tx = mo.by_path({"a": mo.sgd(0.1, 0.9), ".*": mo.sgd(0.2)})
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    u, _ = tx.update({"a": None, "b": jnp.ones(2)}, tx.init(params), params)
    assert u["a"] is None
    np.testing.assert_allclose(u["b"], -0.2)


SOME = mo.by_path({"layers/.*": mo.sgd(0.1)})


@pytest.mark.parametrize(
    ("kind", "message", "call"),
    [
        (ValueError, r"path 'embed/table', got \['layers.*add '\.\*'", lambda: SOME.init(PARAMS)),
        (ValueError, r"path 'embed/table'", lambda: mo.by_path({"embed": mo.sgd(0.1)}).init(PARAMS)),
        (ValueError, r"at least one entry", lambda: mo.by_path({})),
        (ValueError, r"regular expressions, got '\('", lambda: mo.by_path({"(": mo.sgd(0.1)})),
        (TypeError, r"regular expressions as strings", lambda: mo.by_path({1: mo.sgd(0.1)})),
        (TypeError, r"patterns must map", lambda: mo.by_path(mo.sgd(0.1))),
        (TypeError, r"make must be a function such as mo.sgd.*got None", lambda: mo.by_path({".*": {}})),
        (TypeError, r"got None", lambda: mo.by_path({".*": mo.sgd(0.1)}, learning_rate=0.1)),
        (TypeError, r"must map hyperparameters to multiples", lambda: mo.by_path({".*": mo.sgd(0.1)}, mo.sgd)),
        (ValueError, r"hyperparameters that are given, got decay", lambda: mo.by_path({".*": {"decay": 2.0}}, mo.sgd)),
        (ValueError, r"that are given, got 1, a", lambda: mo.by_path({".*": {1: 2.0, "a": 2.0}}, mo.sgd)),
        (TypeError, r"transformation with init", lambda: mo.by_path({".*": 0.1})),
        (TypeError, r"multiple of momentum", lambda: mo.by_path({".*": {"momentum": "2"}}, mo.sgd, momentum=0.9)),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(kind, message, call):
    with pytest.raises(kind, match=message) as caught:
        call()
    assert len(str(caught.value)) < 300
