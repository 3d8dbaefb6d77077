"""A deep autoencoder of 8x8 digits, an ill-conditioned network on which momentum pays (Martens, ICML 2010)."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Units of each layer.
LAYERS = (64, 48, 32, 16, 8, 16, 32, 48, 64)
BATCH = 32
# Images for validation, and as many for the test.
HELD_OUT = 300

Array: TypeAlias = np.ndarray | jax.Array
# A matrix and a bias for each layer.
Weights: TypeAlias = "Sequence[tuple[Array, Array]]"


class Problem(NamedTuple):
    """A training problem; arrays of NumPy, or of JAX with an axis of seeds in front.

    Attributes:
      weights: Initial weights.
      train: Images to train on, shape (n, 64).
      order: Indices of the images in each batch, int32, shape (epochs, steps, `BATCH`).
      validation: Images by which settings are chosen, shape (`HELD_OUT`, 64).
      test: Images that neither training nor choice has seen, shape (`HELD_OUT`, 64).
    """

    weights: Weights
    train: Array
    order: Array
    validation: Array
    test: Array


def problem(images: np.ndarray, epochs: int, seed: Sequence[int], layers: Sequence[int] = LAYERS) -> Problem:
    """Initial weights, split and order of one seed, for images of shape (n, 64)."""
    rng = np.random.default_rng(seed)
    weights = []
    for rows, columns in itertools.pairwise(layers):
        # Sparse initialisation (Martens, 2010): sigmoids saturate in a unit with more than some 15 inputs.
        connected = rng.random((rows, columns)).argsort(axis=0) < 15
        matrix = np.where(connected, rng.standard_normal((rows, columns)), 0).astype(np.float32)
        weights.append((matrix, np.zeros(columns, np.float32)))
    train, validation, test = np.split(rng.permutation(images), [-2 * HELD_OUT, -HELD_OUT])
    steps = len(train) // BATCH
    order = rng.permuted(np.tile(np.arange(len(train), dtype=np.int32), (epochs, 1)), axis=1)
    return Problem(weights, train, order[:, : steps * BATCH].reshape(epochs, steps, BATCH), validation, test)


def stacked(problems: Sequence[optax.Params]) -> optax.Params:
    """Trees of equal shapes as one tree of JAX arrays, with an axis in front that counts them."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *problems)


def cross_entropy(weights: Weights, images: Array) -> jax.Array:
    """Nats per image, mean over images; the loss that training lowers."""
    return jnp.mean(optax.sigmoid_binary_cross_entropy(_logits(weights, images), images).sum(-1))


def squared_error(weights: Weights, images: Array) -> jax.Array:
    """Squared error per image, mean over images; the error that is reported."""
    return jnp.square(jax.nn.sigmoid(_logits(weights, images)) - images).sum(-1).mean()


def _logits(weights: Weights, images: Array) -> Array:
    y = images
    for layer, (matrix, bias) in enumerate(weights):
        y = y @ matrix + bias
        if layer not in (len(weights) // 2 - 1, len(weights) - 1):  # the code is linear, the output a logit
            y = jax.nn.sigmoid(y)
    return y
