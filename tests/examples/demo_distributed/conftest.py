"""Checkpoints that several tests of the distributed demo write."""

import numpy as np
import pytest

from examples.demo_distributed import checkpoint

TREE = {
    "codes": np.arange(-6, 6, dtype=np.int8).reshape(3, 4),
    "count": np.asarray(7, np.int32),
    "odd": np.asarray([np.nan, -0.0, np.inf], np.float32),
    "stamp": np.asarray([2**32 - 1], np.uint32),
}


@pytest.fixture(scope="session")
def tree():
    """Arrays of every kind that a checkpoint must hold."""
    return TREE


@pytest.fixture(scope="session")
def write_round():
    """A function that writes the checkpoint of a round."""

    def write(root, round_, workers=2):
        for name in (checkpoint.COMMON, *map(checkpoint.file_of, range(workers))):
            checkpoint.save(checkpoint.folder_of(root, round_) / name, TREE)

    return write
