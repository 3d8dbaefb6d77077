"""The text of the language model: the same bytes everywhere, cut into parts and batches."""

import textwrap
import warnings
import zlib

import numpy as np
import pytest

from examples.lm import data


def test_the_text_of_this_python_is_that_of_every_other():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = data.splits.__wrapped__()
    assert [len(part) for part in parts] == [165_838, 20_787, 17_363]
    assert max(part.max() for part in parts) < data.VOCABULARY
    # Recorded with Python 3.13; this may be another one.
    assert [zlib.crc32(part.tobytes()) for part in parts] == CHECKSUMS


CHECKSUMS = [0xFE93975F, 0xF5A2EF62, 0x6DC02CE9]


def test_no_paragraph_is_in_two_parts():
    lines = [set(bytes(part).decode().splitlines()) for part in data.splits()]
    assert sum(map(len, lines)) == len(set.union(*lines)) == 1141


def test_lines_of_another_width_are_the_same_text():
    text = data.paragraphs(data._topics())
    narrow = "\n\n".join(textwrap.fill(paragraph, 50, break_long_words=False) for paragraph in text)
    assert len(narrow.splitlines()) > 5000
    assert data.paragraphs({"all": narrow}) == text


def test_a_python_that_lacks_paragraphs_is_told(monkeypatch):
    topics = dict(data._topics())
    del topics["assert"]
    monkeypatch.setattr(data, "_topics", lambda: topics)
    with pytest.warns(UserWarning, match=r"pydoc_data has 1\d\d\d of the 1141 paragraphs"):
        parts = data.splits.__wrapped__()
    assert sum(map(len, parts)) < 203_988


def test_batches_are_windows_of_the_text_and_a_function_of_seed_and_step():
    tokens = np.arange(100, dtype=np.uint8)
    batches = data.batches(tokens, 3, 8, 50, seed=1)
    assert batches.shape == (50, 3, 9)
    assert batches.dtype == np.uint8
    assert (np.diff(batches.astype(int), axis=-1) == 1).all()
    assert (batches.min(), batches.max()) == (0, 99), "the first and the last token are drawn too"
    np.testing.assert_array_equal(batches[7], data.batch_at(tokens, 3, 8, 7, seed=1))
    np.testing.assert_array_equal(batches[:20], data.batches(tokens, 3, 8, 20, seed=1))
    assert (batches != data.batches(tokens, 3, 8, 50, seed=2)).any(-1).mean() > 0.9


def test_windows_predict_every_token_but_the_first_once():
    windows = data.windows(np.arange(21), 5)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), np.arange(1, 21))
    np.testing.assert_array_equal(windows[:, 0], [0, 5, 10, 15])
    assert data.windows(np.arange(20), 5).shape == (3, 6)
