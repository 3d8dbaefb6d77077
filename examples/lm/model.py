"""A decoder-only transformer in Flax NNX: layers in one scan, tied embeddings; and the same as pure functions.

`LanguageModel` is for code that has modules. `init` and `loss` are pure functions of nested dictionaries of arrays, to
be mapped over seeds and over learning rates:

    config = CONFIGS["small"]
    params = jax.vmap(partial(init, config))(jnp.arange(8))
    losses = jax.vmap(loss, (0, None))(params, tokens)
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import momentum_optax as mo

from .data import VOCABULARY


@dataclasses.dataclass(frozen=True)
class Config:
    """The size of a model.

    Attributes:
      vocabulary: Number of tokens.
      width: Features of a token, a multiple of `heads`.
      layers: Blocks of attention and a hidden layer of four times the width.
      heads: Of the attention.
      length: The most tokens that the model sees.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, {self.heads}, got {self.width}")


CONFIGS = {
    # 0.1 million parameters, for tests and sweeps.
    "tiny": Config(VOCABULARY, width=64, layers=2, heads=2, length=64),
    # 0.8 million.
    "small": Config(VOCABULARY, width=128, layers=4, heads=4, length=128),
    # 124 million, the smallest model of Radford et al., "Language models are unsupervised multitask learners", 2019.
    "gpt2-small": Config(50257, width=768, layers=12, heads=12, length=1024),
}


class LanguageModel(nnx.Module):
    """The architecture of GPT-2: learned positions, normalisation before each part, GELU, biases, no dropout.

    The same weights stand for a token at the input and at the output. Blocks are stacked: their parameters have an axis
    of layers in front. Weights are drawn with GPT-2's standard deviation at its width, and one in inverse proportion to
    the root of the width at others; those that end a block over the root of twice the number of layers in addition.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap
        def blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        draw = nnx.initializers.normal(_deviation(config))
        self.tokens = nnx.Embed(config.vocabulary, config.width, embedding_init=draw, rngs=rngs)
        self.positions = nnx.Embed(config.length, config.width, embedding_init=draw, rngs=rngs)
        self.blocks = blocks(rngs)
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits of the token after each of these: integers (batch, length) to float32 (batch, length, vocabulary)."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x: jax.Array, block: Block) -> jax.Array:
            return block(x)

        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        return self.tokens.attend(self.norm(through(x, self.blocks)))

    def loss(self, tokens: jax.Array) -> jax.Array:
        """Mean nats per token of all tokens but the first of each row, integers of shape (batch, length + 1)."""
        tokens = tokens.astype(jnp.int32)
        logits = self(tokens[:, :-1])
        nats: jax.Array = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
        return nats


class Block(nnx.Module):
    """Attention to the tokens before, then a hidden layer; both are added to their input."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, heads = config.width, (config.heads, config.width // config.heads)
        draw = nnx.initializers.normal(_deviation(config))
        draw_last = nnx.initializers.normal(_deviation(config) / math.sqrt(2 * config.layers))
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.query = nnx.LinearGeneral(width, heads, kernel_init=draw, rngs=rngs)
        self.key = nnx.LinearGeneral(width, heads, kernel_init=draw, rngs=rngs)
        self.value = nnx.LinearGeneral(width, heads, kernel_init=draw, rngs=rngs)
        self.attended = nnx.LinearGeneral(heads, width, axis=(-2, -1), kernel_init=draw_last, rngs=rngs)
        self.hidden_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, kernel_init=draw, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, kernel_init=draw_last, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Features of shape (batch, length, width) to new ones."""
        y = self.attention_norm(x)
        x = x + self.attended(jax.nn.dot_product_attention(self.query(y), self.key(y), self.value(y), is_causal=True))
        return x + self.out(nnx.gelu(self.hidden(self.hidden_norm(x))))


@functools.partial(jax.jit, static_argnums=0)
def init(config: Config, seed: int | jax.Array) -> optax.Params:
    """Parameters, nested dictionaries of float32 arrays; the seed may be traced."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(config, nnx.Rngs(jax.random.key(seed))), nnx.Param))


def loss(params: optax.Params, tokens: jax.Array) -> jax.Array:
    """Mean nats per token, as `LanguageModel.loss`, a pure function of parameters as from `init`."""
    graph, state = _abstract(config_of(params))
    state = jax.tree.map(lambda x: x, state)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state).loss(tokens)


def matrices(config: Config) -> optax.Params:
    """Dimension numbers for `mo.muon`, a tree like the parameters: attention and hidden layers, not the embeddings."""
    numbers: optax.Params = nnx.to_pure_dict(mo.matrices.of_model(nnx.merge(*_abstract(config))))
    return numbers


def config_of(params: optax.Params) -> Config:
    """The size of a model, read from the shapes of its parameters."""
    vocabulary, width = params["tokens"]["embedding"].shape
    layers, _, heads, _ = params["blocks"]["query"]["kernel"].shape
    return Config(vocabulary, width, layers, heads, params["positions"]["embedding"].shape[0])


@functools.cache
def _abstract(config: Config) -> tuple[nnx.GraphDef[LanguageModel], "nnx.State[str, nnx.Variable[jax.Array]]"]:
    """The model apart from its parameters, and their shapes."""
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(config, nnx.Rngs(0))), nnx.Param)


def _deviation(config: Config) -> float:
    return 0.02 * math.sqrt(768 / config.width)
