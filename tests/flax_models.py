"""Data and helpers of the tests with Flax."""

import functools

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

as_pure = getattr(nnx, "as_pure", None) or nnx.pure  # its name in Flax 0.12.0


@functools.cache
def digits():
    """600 digits: pixels in [0, 1] and one-hot labels, float32."""
    data = load_digits()
    return np.float32(data.data[:600] / 16), np.eye(10, dtype=np.float32)[data.target[:600]]


def loss(logits, y):
    return optax.softmax_cross_entropy(logits, y).mean()


# Shardings.


def mesh_of(devices, kind=jax.sharding.AxisType.Auto):
    assert jax.device_count() >= devices, "the tests need two devices, see conftest.py"
    return jax.make_mesh((devices,), ("x",), axis_types=(kind,), devices=jax.devices()[:devices])
