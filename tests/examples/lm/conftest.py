"""A model and a text so small that runs of several steps take seconds."""

import numpy as np
import pytest

from examples.lm import config, data

TOY = config.Config(vocabulary=128, width=16, layers=2, heads=2, length=8)


@pytest.fixture
def toy(monkeypatch):
    """A size named "toy", and a short text in place of Python's; the size."""
    monkeypatch.setitem(config.CONFIGS, "toy", TOY)
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog " * 20, np.uint8)
    monkeypatch.setattr(data, "splits", lambda: data.Splits(text, text[5:210], text[11:180]))
    return TOY
