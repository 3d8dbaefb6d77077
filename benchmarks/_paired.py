"""Paired comparisons: differences over seeds with Student's interval, and Holm's correction for many of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Difference(NamedTuple):
    """A mean difference of pairs, first minus second.

    Attributes:
      mean: The mean.
      low: The lower end of its 95 % interval, of Student's t.
      high: The upper end.
      p: The two-sided p-value of the paired t-test; 1 where all pairs are equal.
    """

    mean: float
    low: float
    high: float
    p: float


def difference(first: ArrayLike, second: ArrayLike) -> Difference:
    """The difference of paired numbers, both of shape (n,), n at least 2."""
    from scipy import stats  # noqa: PLC0415

    gaps = np.subtract(first, second, dtype=np.float64)
    mean = float(gaps.mean())
    if not gaps.std():
        return Difference(mean, mean, mean, float(mean == 0))
    found = stats.ttest_1samp(gaps, 0)
    low, high = found.confidence_interval(0.95)
    return Difference(mean, float(low), float(high), float(found.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: below alpha where his procedure rejects at the level alpha.

    The k-th smallest of n, counted from 0, is multiplied by n - k, and made no smaller than those before it.

    Reference:
      Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics, 1979.
    """
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return [float(x) for x in adjusted]
