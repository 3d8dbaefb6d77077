"""Dimension numbers from the kinds of Flax's layers, and by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import momentum_optax as mo

D = optax.contrib.MuonDimensionNumbers
LINEAR = D((-2,), (-1,))
QUERY, OUT, CONV = D((-3,), (-2, -1)), D((-3, -2), (-1,)), D((-4, -3, -2), (-1,))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(8, name="mlp")(y), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8, name="embed")(tokens)
        x, _ = LinenBlock(name="block")(x)
        x, _ = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=3)(name="blocks")(x, None)
        x = nn.Conv(4, (3, 3), name="conv")(x[..., None, :])
        return nn.remat(nn.Dense)(16, name="head")(x)  # of a class that derives from Dense


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.mlp = nnx.Linear(8, 8, rngs=rngs)


class Head(nnx.Linear):
    pass


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.block = Block(rngs)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block))(rngs)
        self.conv = nnx.Conv(8, 4, (3, 3), rngs=rngs)
        self.head = Head(4, 16, rngs=rngs)


@jax.tree_util.register_pytree_with_keys_class
class Pair:
    """A node whose keys are of no class of JAX."""

    def __init__(self, kernel, embedding):
        self.children = kernel, embedding

    def tree_flatten_with_keys(self):
        return tuple(zip(("kernel", "embedding"), self.children, strict=True)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def found(numbers):
    """The entries that are no None, by path."""
    entries = jax.tree_util.tree_leaves_with_path(numbers, is_leaf=lambda x: isinstance(x, D))
    keys = lambda path: "/".join(str(getattr(k, "key", getattr(k, "name", None))) for k in path)  # noqa: E731
    return {keys(path): x for path, x in entries}


EXPECTED = {
    **{f"{b}/attention/{p}/kernel": QUERY for b in ("block", "blocks") for p in ("query", "key", "value")},
    **{f"{b}/attention/out/kernel": OUT for b in ("block", "blocks")},
    **{f"{b}/mlp/kernel": LINEAR for b in ("block", "blocks")},
    "conv/kernel": CONV,
    "head/kernel": LINEAR,
}


def linen():
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    params = jax.eval_shape(lambda t: LinenModel().init(jax.random.key(0), t), tokens)["params"]
    return params, lambda **options: mo.matrices.of_model(LinenModel(), tokens, **options)


def nnx_model():
    model = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    return nnx.state(model, nnx.Param), lambda **options: mo.matrices.of_model(model, **options)


def test_a_model_without_parameters_has_no_dimension_numbers():
    assert mo.matrices.of_model(nn.Sequential([nn.relu]), jnp.ones(2)) == {}


@pytest.mark.parametrize("make", [linen, nnx_model])
def test_layers_of_a_model_say_their_axes_and_stacks_count_matrices(make):
    params, numbers_of = make()
    assert found(numbers_of()) == EXPECTED
    without = found(numbers_of(exclude=("Head", "conv")))
    assert without == {k: v for k, v in EXPECTED.items() if k not in ("head/kernel", "conv/kernel")}
    tx = mo.muon(0.1, weight_dimension_numbers=numbers_of())
    state = jax.eval_shape(tx.init, params)
    assert jax.tree.leaves(state)
    updates, after = jax.eval_shape(tx.update, params, state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_parameters_are_left_out_by_name():
    params = {"Embed_0": {"embedding": np.ones((4, 2))}, "layer": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}
    numbers = mo.matrices.excluding("embed", "head")(params)
    assert numbers == {"Embed_0": {"embedding": None}, "layer": {"kernel": D(), "bias": None}}
    # Keys of any kind.
    tree = Pair(np.ones((2, 2)), np.ones((2, 2)))
    assert jax.tree.leaves(mo.matrices.excluding("embed")(tree), is_leaf=lambda x: isinstance(x, D) or x is None) == [
        D(),
        None,
    ]
    with pytest.raises(TypeError, match="names must be strings such as 'embed', got"):
        mo.matrices.excluding(3)
    injected = optax.inject_hyperparams(mo.muon)(0.1, weight_dimension_numbers=mo.matrices.excluding("embed"))
    with pytest.raises(TypeError, match="static_args='weight_dimension_numbers'"):
        jax.eval_shape(injected.init, params)
    with pytest.raises(TypeError, match="model must be a module of Flax, NNX or Linen, got"):
        mo.matrices.of_model(params)
