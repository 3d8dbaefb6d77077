"""Paired differences and Holm's correction, by hand."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks._paired import difference, holm


def test_holm_multiplies_the_smallest_by_most_and_keeps_the_order():
    """Four hypotheses at 5 %: the two smallest are rejected, as 0.005 < 0.05/4 and 0.01 < 0.05/3 but 0.03 > 0.05/2."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_rejects_what_the_steps_of_his_procedure_reject():
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = rng.random(7) ** 4
        rejected = set()
        for k, i in enumerate(np.argsort(p)):
            if p[i] > 0.05 / (7 - k):
                break
            rejected.add(int(i))
        assert {i for i, x in enumerate(holm(p)) if x <= 0.05} == rejected


def test_a_difference_is_that_of_students_pairs():
    """Three pairs with gaps 1, 2, 3: t = 2 sqrt(3), and with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)."""
    found = difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t, quantile = 2 * math.sqrt(3), 4.302653
    assert found.mean == pytest.approx(2)
    assert found.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert (found.low, found.high) == pytest.approx((2 - quantile / math.sqrt(3), 2 + quantile / math.sqrt(3)))


def test_equal_pairs_differ_by_nothing():
    assert difference([1.0, 2.0], [1.0, 2.0]) == (0, 0, 0, 1)
    assert difference([2.0, 3.0], [1.0, 2.0]).p == 0
