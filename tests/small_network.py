"""A linear network of 72 parameters and settings for it, on which the programs of the distributed demo are checked."""

import jax.numpy as jnp
import numpy as np

from examples.demo_distributed.training import Settings

SETTINGS = Settings(4, 3, 5, 8, 0.1, 0, "digits")
# A matrix of 7 rows and a vector, 7 x 9 + 9 = 72 numbers.
PARAMS = {"b": jnp.zeros(9), "w": jnp.zeros((7, 9))}


def apply(params, images):
    return images.reshape(len(images), -1) @ params["w"] + params["b"]


def average(weights):
    """The average of weights after each step that the demo keeps: the n-th has a share in proportion to about n^6."""
    mean = weights[0]
    for t, theta in enumerate(weights):
        kept = (1 - 1 / (t + 1)) ** 7
        mean = {k: kept * mean[k] + (1 - kept) * np.float64(theta[k]) for k in theta}
    return mean
