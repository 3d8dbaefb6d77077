"""The networks that train: their weights, and training with an optimizer that is compared with its exact self."""

import math
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.demo.autoencoder import LAYERS, cross_entropy, problem, squared_error, stacked
from examples.demo.cnn import build_cnn
from examples.demo.data import flat_digits, load_mnist

from .tracked import Figures, States, Tracked

# Units of the wider autoencoder, whose matrices all have 4096 elements or more.
WIDE = (64, 256, 128, 32, 128, 256, 64)
HIDDEN, EMBEDDING, LENGTH = 96, 32, 64

Array: TypeAlias = "np.ndarray | jax.Array"
# Of one seed: what a task needs, arrays and trees of them.
Setting: TypeAlias = tuple[optax.Params, ...]
Carry: TypeAlias = tuple[optax.Params, States]
# From weights and a batch.
Loss: TypeAlias = Callable[[optax.Params, jax.Array], jax.Array]
# A function from an optimizer to the final losses, an entry for each seed, and to the figures of all steps.
Train = Callable[[Tracked], tuple[np.ndarray, Figures]]


def autoencoder(seeds: int, quick: bool) -> tuple[optax.Params, Train]:
    """The deep autoencoder of the demo on 8x8 digits, batches of 32: its weights, and how to train it."""
    return _autoencoder(LAYERS, seeds, 2 if quick else 120)


def wide(seeds: int, quick: bool) -> tuple[optax.Params, Train]:
    """A wider and less deep one, of layers that int8 compresses by default."""
    return _autoencoder(WIDE, seeds, 1 if quick else 30)


def _autoencoder(layers: Sequence[int], seeds: int, epochs: int) -> tuple[optax.Params, Train]:
    images, _ = flat_digits()
    each = [problem(images, epochs, (0, seed), layers) for seed in range(seeds)]
    settings = stacked(each)

    def train(optimizer: Tracked) -> tuple[np.ndarray, Figures]:
        def run(setting: Setting) -> tuple[jax.Array, Figures]:
            weights, images, order, _, test = setting

            def loss_of(weights: optax.Params, rows: jax.Array) -> jax.Array:
                return cross_entropy(weights, images[rows])

            weights, figures = _scan(optimizer, loss_of, weights, order.reshape(-1, order.shape[-1]))
            return squared_error(weights, test), figures

        losses, figures = jax.device_get(jax.jit(jax.vmap(run))(settings))
        return losses, figures

    return each[0][0], train


def _scan(optimizer: Tracked, loss_of: Loss, weights: optax.Params, batches: jax.Array) -> tuple[optax.Params, Figures]:
    """Train on the batches in turn, all in one program: final weights and the figures of each step."""

    def step(carry: Carry, batch: jax.Array) -> tuple[Carry, Figures]:
        weights, state = carry
        weights, state, figures = optimizer.step(weights, state, jax.grad(loss_of)(weights, batch))
        return (weights, state), figures

    (weights, _), figures = jax.lax.scan(step, (weights, optimizer.init(weights)), batches)
    return weights, figures


def gru(seeds: int, quick: bool) -> tuple[optax.Params, Train]:
    """A character-level GRU on the help texts of the standard library; the last tenth is held out."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    symbols, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    data, held_out = (jnp.asarray(part, jnp.int32) for part in np.split(codes, [9 * len(codes) // 10]))
    rngs = [np.random.default_rng((1, seed)) for seed in range(seeds)]
    each = [_gru_weights(rng, len(symbols)) for rng in rngs]
    starts = [rng.integers(len(data) - LENGTH, size=(6 if quick else 300, 32)) for rng in rngs]
    settings = stacked(list(zip(each, starts, strict=True)))

    def train(optimizer: Tracked) -> tuple[np.ndarray, Figures]:
        def run(setting: Setting) -> tuple[jax.Array, Figures]:
            weights, figures = _scan(optimizer, lambda w, s: _gru_loss(w, _windows(data, s)), *setting)
            test = _windows(held_out, jnp.arange(0, len(held_out) - LENGTH, LENGTH))
            return _gru_loss(weights, test), figures

        losses, figures = jax.device_get(jax.jit(jax.vmap(run))(settings))
        return losses, figures

    return each[0], train


def _windows(text: jax.Array, starts: jax.Array) -> jax.Array:
    """Stretches of one character more than the network reads; one row each."""
    return text[starts[:, None] + jnp.arange(LENGTH + 1)]


def _gru_weights(rng: np.random.Generator, symbols: int) -> dict[str, np.ndarray]:
    """Initial weights: each unit's inputs add up to variance 1; update gate, reset gate and candidate in one matrix."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / math.sqrt(rows)).astype(np.float32)

    return {
        "embedding": rng.standard_normal((symbols, EMBEDDING)).astype(np.float32),
        "input": matrix(EMBEDDING, 3 * HIDDEN),
        "hidden": matrix(HIDDEN, 3 * HIDDEN),
        "bias": np.zeros(3 * HIDDEN, np.float32),
        "output": matrix(HIDDEN, symbols),
        "output_bias": np.zeros(symbols, np.float32),
    }


def _gru_loss(weights: optax.Params, windows: jax.Array) -> jax.Array:
    """Mean nats per character, each predicted from those before it in its window (Cho et al., 2014)."""
    inputs = weights["embedding"][windows[:, :-1].T] @ weights["input"] + weights["bias"]

    def cell(h: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (x_gates, x_new), (h_gates, h_new) = (jnp.split(y, [2 * HIDDEN], -1) for y in (x, h @ weights["hidden"]))
        update, reset = jnp.split(jax.nn.sigmoid(x_gates + h_gates), 2, -1)
        h = update * h + (1 - update) * jnp.tanh(x_new + reset * h_new)
        return h, h

    _, states = jax.lax.scan(cell, jnp.zeros((len(windows), HIDDEN)), inputs)
    logits = states @ weights["output"] + weights["output_bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].T))


def cnn(seeds: int, quick: bool) -> tuple[optax.Params, Train]:
    """The CNN of the demo on 4000 MNIST images, four epochs of batches of 64; 1000 images are held out."""
    from flax import nnx  # noqa: PLC0415

    data = load_mnist()
    steps = len(data.images) // 64
    models = [nnx.split(build_cnn(28, seed), nnx.Param) for seed in range(seeds)]
    rows = np.tile(np.arange(len(data.images)), (4, 1))
    orders = [np.random.default_rng((2, seed)).permuted(rows, axis=1)[:, : steps * 64] for seed in range(seeds)]
    batches = [order.reshape(-1, 64)[: 6 if quick else None] for order in orders]
    graph = models[0][0]

    def loss_of(weights: optax.Params, images: Array, labels: Array) -> jax.Array:
        logits = nnx.merge(graph, weights)(images)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def train(optimizer: Tracked) -> tuple[np.ndarray, Figures]:
        # One call per step: XLA's CPU backend runs convolutions inside a compiled loop several times slower.
        @jax.jit
        def step(
            weights: optax.Params, state: States, images: jax.Array, labels: jax.Array
        ) -> tuple[optax.Params, States, Figures]:
            return optimizer.step(weights, state, jax.grad(loss_of)(weights, images, labels))

        @jax.jit
        def test(weights: optax.Params) -> jax.Array:
            return loss_of(weights, data.test_images, data.test_labels)

        def run(weights: optax.Params, batches: np.ndarray) -> tuple[float, Figures]:
            state, steps = optimizer.init(weights), []
            for rows in batches:
                weights, state, figures = step(weights, state, data.images[rows], data.labels[rows])
                steps.append(figures)
            return float(test(weights)), _stacked(jax.device_get(steps))

        runs = [run(weights, of_seed) for (_, weights), of_seed in zip(models, batches, strict=True)]
        return np.array([loss for loss, _ in runs]), _stacked([figures for _, figures in runs])

    return models[0][1], train


def lm(seeds: int, quick: bool) -> tuple[optax.Params, Train]:
    """A transformer of 0.1 million parameters on English text, 200 batches of 16 windows; the test text is held out."""
    from examples.lm import data, model  # noqa: PLC0415

    config, text = model.CONFIGS["tiny"], data.splits()
    each = [jax.device_get(model.init(config, seed)) for seed in range(seeds)]
    batches = [data.batches(text.train, 16, config.length, 6 if quick else 200, seed) for seed in range(seeds)]
    settings = stacked(list(zip(each, batches, strict=True)))
    held_out = jnp.asarray(data.windows(text.test, config.length)[:512])

    def train(optimizer: Tracked) -> tuple[np.ndarray, Figures]:
        def run(setting: Setting) -> tuple[jax.Array, Figures]:
            weights, figures = _scan(optimizer, model.loss, *setting)
            return model.loss(weights, held_out), figures

        losses, figures = jax.device_get(jax.jit(jax.vmap(run))(settings))
        return losses, figures

    return each[0], train


def _stacked(several: Sequence[optax.Params]) -> optax.Params:
    """Trees of equal shapes as one, with an axis in front."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *several)


TASKS = {"wide": wide, "lm": lm, "autoencoder": autoencoder, "gru": gru, "cnn": cnn}
