"""The transformer: its size, its loss as NumPy computes it, and the same training with the same model in Linen."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("flax")

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import momentum_optax as mo
from examples.lm import model
from examples.lm.model import CONFIGS, Config

TOY = Config(vocabulary=11, width=8, layers=2, heads=2, length=6)
TOKENS = np.random.default_rng(0).integers(0, 11, (3, 7), np.uint8)


@pytest.fixture(scope="module")
def params():
    """Parameters of which none is zero or one."""
    shapes = jax.eval_shape(partial(model.init, TOY), 0)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0.3, 0.5, x.shape).astype(np.float32), shapes)


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def logits_of(params, tokens):
    """GPT-2 of one sequence in float64, a head and a position at a time."""
    table, blocks = params["tokens"]["embedding"], params["blocks"]
    x = table[tokens] + params["positions"]["embedding"][: len(tokens)]
    for layer in range(len(blocks["out"]["bias"])):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        y = norm(x, p["attention_norm"])
        attended = np.zeros_like(x) + p["attended"]["bias"]
        for head in range(p["query"]["bias"].shape[0]):
            q, k, v = (y @ p[n]["kernel"][:, head] + p[n]["bias"][head] for n in ("query", "key", "value"))
            for t in range(len(tokens)):
                weights = np.exp(k[: t + 1] @ q[t] / np.sqrt(q.shape[-1]))
                attended[t] += weights @ v[: t + 1] / weights.sum() @ p["attended"]["kernel"][head]
        x = x + attended
        h = norm(x, p["hidden_norm"]) @ p["hidden"]["kernel"] + p["hidden"]["bias"]
        h = h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))) / 2
        x = x + h @ p["out"]["kernel"] + p["out"]["bias"]
    return norm(x, params["norm"]) @ table.T


def test_the_loss_is_that_of_numpy(params):
    exact = jax.tree.map(np.float64, params)
    nats = []
    for row in TOKENS:
        logits = logits_of(exact, row[:-1])
        nats += list(np.log(np.exp(logits).sum(-1)) - logits[np.arange(6), row[1:]])
    found = jax.jit(model.loss)(params, TOKENS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.mean(nats), rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_models_have_the_stated_sizes(name):
    config = CONFIGS[name]
    shapes = jax.eval_shape(partial(model.init, config), 0)
    w, tables = config.width, config.vocabulary + config.length
    count = tables * w + config.layers * (12 * w**2 + 13 * w) + 2 * w
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    # That of the smallest GPT-2, as its authors' weights have it.
    assert count == {"tiny": 112_384, "small": 826_112, "gpt2-small": 124_439_808}[name]
    assert model.config_of(shapes) == config


def test_a_width_that_heads_do_not_divide_is_an_error():
    with pytest.raises(ValueError, match="width must be a multiple of heads, 3, got 8"):
        Config(11, width=8, layers=1, heads=3, length=4)


def test_muon_has_the_matrices_and_not_the_embeddings():
    numbers = jax.tree.map(
        lambda x: x and (x.reduction_axis, x.output_axis),
        model.matrices(TOY),
        is_leaf=lambda x: x is None or hasattr(x, "output_axis"),
    )
    linear, split, joined = ((-2,), (-1,)), ((-3,), (-2, -1)), ((-3, -2), (-1,))
    assert {name: numbers["blocks"][name].get("kernel") for name in numbers["blocks"]} == {
        **{"query": split, "key": split, "value": split, "attended": joined, "hidden": linear, "out": linear},
        **{"attention_norm": None, "hidden_norm": None},
    }
    assert numbers["tokens"] == numbers["positions"] == {"embedding": None}
    assert numbers["blocks"]["out"]["bias"] is None


@pytest.mark.slow
def test_seeds_can_be_mapped_over_and_draw_with_the_stated_deviation():
    config = Config(500, width=64, layers=3, heads=2, length=8)
    several = jax.vmap(partial(model.init, config))(jnp.arange(2))
    for seed in range(2):
        one = model.init(config, seed)
        jax.tree.map(lambda a, b, seed=seed: np.testing.assert_array_equal(a[seed], b), several, one)
    blocks, deviation = several["blocks"], 0.02 * np.sqrt(768 / 64)
    for kernel, expected in [
        (several["tokens"]["embedding"], deviation),
        (blocks["hidden"]["kernel"], deviation),
        (blocks["query"]["kernel"], deviation),
        (blocks["out"]["kernel"], deviation / np.sqrt(6)),
        (blocks["attended"]["kernel"], deviation / np.sqrt(6)),
    ]:
        assert np.std(kernel) == pytest.approx(expected, rel=0.03)
    assert np.std(blocks["hidden"]["kernel"] - blocks["hidden"]["kernel"][:, :1]) > 0, "layers differ"
    losses = jax.jit(jax.vmap(model.loss, (0, None)))(several, TOKENS)
    assert losses.shape == (2,)
    assert losses[0] != losses[1]


class LinenBlock(nn.Module):
    """`model.Block` in Linen."""

    heads: int

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(epsilon=1e-5, name="attention_norm")(x)
        split = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (nn.DenseGeneral(split, name=name)(y) for name in ("query", "key", "value"))
        y = nn.dot_product_attention(q, k, v, mask=nn.make_causal_mask(x[..., 0]))
        x = x + nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="attended")(y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="hidden")(nn.LayerNorm(epsilon=1e-5, name="hidden_norm")(x)))
        return x + nn.Dense(x.shape[-1], name="out")(y), None


class LinenModel(nn.Module):
    """`model.LanguageModel` in Linen."""

    config: Config

    @nn.compact
    def __call__(self, tokens):
        c = self.config
        table = nn.Embed(c.vocabulary, c.width, name="tokens")
        x = table(tokens) + nn.Embed(c.length, c.width, name="positions")(jnp.arange(tokens.shape[1]))
        scanned = nn.scan(LinenBlock, {"params": 0}, split_rngs={"params": True}, length=c.layers)
        blocks = scanned(c.heads, name="blocks")
        return table.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(blocks(x, None)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_the_same_model_in_linen_takes_the_same_steps(params, storage):
    tx = mo.sgd(0.01, mo.nesterov(0.9), storage=storage)
    twin = LinenModel(TOY)
    shapes = jax.eval_shape(twin.init, jax.random.key(0), jnp.int32(TOKENS[:, :-1]))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)

    def linen_loss(params, tokens):
        logits = twin.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def trained(loss):
        @jax.jit
        def step(params, state):
            value, gradients = jax.value_and_grad(loss)(params, jnp.int32(TOKENS))
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        at, state = params, tx.init(params)
        losses = []
        for _ in range(5):
            at, state, value = step(at, state)
            losses.append(value)
        return losses

    ours, theirs = trained(model.loss), trained(linen_loss)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert ours[-1] < 0.99 * ours[0]


@pytest.mark.slow
def test_the_same_model_in_nnx_takes_the_same_steps(params):
    tx = mo.sgd(0.01, mo.nesterov(0.9))
    module = model.LanguageModel(TOY, nnx.Rngs(0))
    nnx.update(module, nnx.state(jax.tree.map(jnp.asarray, params)))
    optimizer = nnx.Optimizer(module, tx, wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer):
        value, gradients = nnx.value_and_grad(lambda m: m.loss(jnp.asarray(TOKENS)))(module)
        optimizer.update(module, gradients)
        return value

    losses = [step(module, optimizer) for _ in range(3)]
    state, slope = tx.init(params), jax.jit(jax.value_and_grad(model.loss))
    for value in losses:
        expected, gradients = slope(params, TOKENS)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
