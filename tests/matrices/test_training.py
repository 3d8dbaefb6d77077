"""Transformers of Flax train with Muon, split over eight devices, as they do on one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import momentum_optax as mo

VOCABULARY, LENGTH, WIDTH = 16, 12, 32
P = PartitionSpec


def tokens(seed):
    """Sequences that count up by 1, 2 or 3: the third token follows from the first two."""
    rng = np.random.default_rng(seed)
    start, step = rng.integers(VOCABULARY, size=(32, 1)), rng.integers(1, 4, size=(32, 1))
    return jnp.asarray((start + step * np.arange(LENGTH)) % VOCABULARY)


def loss_of(logits, batch):
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, 1:-1], batch[:, 2:]).mean()


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x), mask=mask)
        y = nn.Dense(4 * WIDTH, name="up")(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH, name="down")(nn.gelu(y)), None


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, batch):
        x = nn.Embed(VOCABULARY, WIDTH, name="embed")(batch)
        x, _ = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=2)(name="blocks")(x, None)
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm()(x))


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(4, WIDTH, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norms[0](x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, VOCABULARY, rngs=rngs)

    def __call__(self, batch):
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def linen():
    model = LinenModel()
    params = jax.jit(model.init)(jax.random.key(0), tokens(0))["params"]
    numbers = mo.matrices.of_model(model, tokens(0), exclude=("head",))
    return params, numbers, lambda params, batch: loss_of(model.apply({"params": params}, batch), batch)


def of_nnx():
    model = NnxModel(nnx.Rngs(0))
    numbers = mo.matrices.of_model(model, exclude=("head",))
    graph, params = nnx.split(model)
    return params, numbers, lambda params, batch: loss_of(nnx.merge(graph, params)(batch), batch)


def split(x, mesh):
    """Over the first axis that eight divides."""
    axes = [n % 8 == 0 for n in x.shape]
    return P(*[None] * axes.index(True), "x") if any(axes) else P()


@pytest.mark.slow
@pytest.mark.parametrize("make", [linen, of_nnx], ids=["linen", "nnx"])
def test_a_transformer_learns_on_eight_devices_as_on_one(make):
    params, numbers, loss = make()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = jax.tree.map(lambda x: split(x, mesh), params)

    def train(params, batches, **where):
        tx = mo.muon(0.02, weight_dimension_numbers=numbers, others=optax.adam(3e-3), **where)

        @jax.jit
        def step(params, state, batch):
            value, g = jax.value_and_grad(loss)(params, batch)
            updates, state = tx.update(g, state, params)
            return optax.apply_updates(params, updates), state, value

        state, values = jax.jit(tx.init)(params), []
        for batch in batches:
            params, state, value = step(params, state, batch)
            values.append(float(value))
        return values

    batches = [tokens(seed) for seed in range(60)]
    alone = train(params, batches)
    placed = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs)
    there = [jax.device_put(batch, NamedSharding(mesh, P("x"))) for batch in batches]
    many = train(placed, there, mesh=mesh, specs=specs)
    assert alone[0] > 2
    assert max(alone[-5:]) < 0.5
    assert max(many[-5:]) < 0.5
    np.testing.assert_allclose(many[:10], alone[:10], rtol=1e-3)
