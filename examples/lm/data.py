"""English text that Python carries, the same bytes in every version: tokens, splits, batches.

The text is that of `help()`, the topics of `pydoc_data`. Versions of Python differ in it, so that only those paragraphs
count which 3.11.2, 3.11.7, 3.12.1, 3.13.0 and 3.14 have in common: `paragraphs.txt` lists their checksums, in order.
"""

import functools
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Tokens are the bytes of ASCII.
VOCABULARY = 128
# CRC-32 of the whole text. With another one losses cannot be compared with those of the documentation.
CHECKSUM = 0x79B942ED
# Quotation marks and dashes; any other character beyond ASCII becomes a question mark.
_ASCII = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
# Paragraphs in a row that stay together, and the numbers of these rows, modulo ten, that are held out.
_TOGETHER = 20
_VALIDATION, _TEST = 4, 9


class Splits(NamedTuple):
    """Three texts without a paragraph in common, uint8 arrays of ASCII: to train on, to choose by, to report."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@functools.cache
def splits() -> Splits:
    """The text in three parts, eight, one and one tenth of it: twenty paragraphs in a row are in the same part.

    Warns where this version of Python lacks paragraphs of the text.
    """
    kept = paragraphs(_topics())
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, paragraph in enumerate(kept):
        remainder = number // _TOGETHER % 10
        parts[1 if remainder == _VALIDATION else 2 if remainder == _TEST else 0].append(paragraph)
    if zlib.crc32(_tokens(kept).tobytes()) != CHECKSUM:
        warnings.warn(
            f"This Python's pydoc_data has {len(kept)} of the {len(_digests())} paragraphs of the text: losses are not "
            "those of the documentation. Python 3.11 to 3.14 have them all",
            stacklevel=2,
        )
    return Splits(*map(_tokens, parts))


def paragraphs(topics: Mapping[str, str]) -> list[str]:
    """Those paragraphs of the topics that `paragraphs.txt` lists, each once and in its order, as lines of text."""
    found = {zlib.crc32(paragraph.encode()): paragraph for paragraph in _all_paragraphs(topics)}
    return [found[digest] for digest in _digests() if digest in found]


def batch_at(tokens: np.ndarray, batch: int, length: int, step: int, seed: int) -> np.ndarray:
    """The batch of one step, windows of the text at places that are a function of seed and step.

    Args:
      tokens: Shape (n,), n > `length`.
      batch: Windows in a batch.
      length: Predictions in a window, which has one token more.
      step: Counted from 0.
      seed: Not negative.

    Returns:
      An array of the dtype of `tokens`, shape (batch, length + 1).
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - length, batch)
    return np.take(tokens, starts[:, None] + np.arange(length + 1))


def batches(tokens: np.ndarray, batch: int, length: int, steps: int, seed: int) -> np.ndarray:
    """The batches of the first steps, see `batch_at`: shape (steps, batch, length + 1)."""
    return np.stack([batch_at(tokens, batch, length, step, seed) for step in range(steps)])


def windows(tokens: np.ndarray, length: int) -> np.ndarray:
    """The whole text in windows that follow each other, to measure a loss on: shape (count, length + 1).

    The last token of a window is the first of the next one, so that each is predicted once; less than a window is left
    out at the end.
    """
    count = (len(tokens) - 1) // length
    return np.take(tokens, np.arange(count)[:, None] * length + np.arange(length + 1))


def _topics() -> Mapping[str, str]:
    from pydoc_data.topics import topics  # noqa: PLC0415  # a large module

    return topics


def _all_paragraphs(topics: Mapping[str, str]) -> Iterator[str]:
    """Paragraphs on one line each, whatever the width that the topics were wrapped to."""
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            yield " ".join(re.sub(r"(?<=\w)-\n\s*(?=\w)", "-", paragraph).split())


@functools.cache
def _digests() -> tuple[int, ...]:
    listed = Path(__file__).with_name("paragraphs.txt").read_text(encoding="ascii")
    return tuple(int(digest, 16) for digest in listed.split())


def _tokens(texts: list[str]) -> np.ndarray:
    """The bytes of paragraphs, a line for each."""
    text = "".join(paragraph + "\n" for paragraph in texts).translate(_ASCII)
    return np.frombuffer(text.encode("ascii", "replace"), np.uint8)
