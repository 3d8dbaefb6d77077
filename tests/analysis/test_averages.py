"""Averages of any width after the run, against averages that were kept during it."""

import numpy as np
import pytest

import momentum_optax as mo

KEPT = [(gamma, n) for n in range(250, 2001, 250) for gamma in (16.97, 6.94)]


def profile(gamma, n, grid):
    return np.where(grid < n, (gamma + 1) * grid**gamma / n ** (gamma + 1), 0.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("wanted", [(10.0, 2000), (7.5, 1750), (12.0, 1900)])
def test_the_weights_are_the_least_squares_fit_of_profiles(wanted):
    grid = (np.arange(200_000) + 0.5) / 100
    columns = np.stack([profile(gamma, n, grid) for gamma, n in KEPT], 1)
    target = profile(*wanted, grid)
    expected = np.linalg.lstsq(columns / np.linalg.norm(columns, axis=0), target, rcond=None)[0]
    found = mo.analysis.post_hoc_weights(*zip(*KEPT, strict=True), *wanted)
    np.testing.assert_allclose(
        found.weights * np.linalg.norm(columns, axis=0), expected, atol=2e-3 * np.linalg.norm(target)
    )
    error = np.linalg.norm(columns @ found.weights - target) / np.linalg.norm(target)
    assert found.error == pytest.approx(error, rel=0.02)


def test_a_kept_average_is_itself():
    found = mo.analysis.post_hoc_weights([2.0, 5.0], [100, 100], 5.0)
    np.testing.assert_allclose(found.weights, [0, 1], atol=1e-9)
    assert found.error < 1e-6


def test_two_kept_averages_give_a_third_of_a_random_walk_and_of_noise():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(2000, 400))
    for weights, bound in ((np.cumsum(noise, 0), 0.01), (noise, None)):
        kept, averages = [], {gamma: 0.0 for gamma in (16.97, 6.94, 10.0)}
        for t, theta in enumerate(weights):
            for gamma, average in averages.items():
                c = mo.schedules.power_average(gamma)(t)
                averages[gamma] = c * average + (1 - c) * theta
            kept += [averages[gamma] for gamma, n in KEPT if n == t + 1]
        found = mo.analysis.post_hoc_weights(*zip(*KEPT, strict=True), 10.0)
        error = np.linalg.norm(found.weights @ np.array(kept) - averages[10.0]) / np.linalg.norm(averages[10.0])
        # For noise it is the stated one, to the scatter of 400 columns.
        assert error < bound if bound else error == pytest.approx(found.error, rel=0.2)


@pytest.mark.parametrize(("count", "stated"), [(1, (0.04, 0.24)), (8, (0.012, 0.04)), (32, (0.001, 0.003))])
def test_the_stated_errors(count, stated):
    kept = [(gamma, n) for n in np.linspace(0, 2000, count + 1)[1:] for gamma in (16.97, 6.94)]
    for exponent, error in zip((10.0, 3.0), stated, strict=True):
        assert mo.analysis.post_hoc_weights(*zip(*kept, strict=True), exponent).error == pytest.approx(error, rel=0.2)


def test_wrong_arguments_are_named():
    for arguments, message in (
        (([1.0], [1, 2], 1.0), "one length"),
        (([1.0, 1.0], [5, 5], 1.0), "one pair twice"),
        (([-1.0], [5], 1.0), r"exponents must be in \[0, inf\), got -1.0"),
        (([1.0], [0], 1.0), r"steps must be in \(0, inf\), got 0.0"),
        (([1.0], [1], -1.0), r"exponent must be in \[0, inf\), got -1.0"),
        (([1.0], [1], 1.0, 0), r"step must be in \(0, inf\), got 0"),
        (([], [], 1.0), "one length, at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            mo.analysis.post_hoc_weights(*arguments)
    for arguments, message in (
        (([1.0, 2.0], [None, 3], 1.0), r"steps must be a real number or an array of them, got \[None, 3\]"),
        (([1.0], [1], "a"), "exponent must be a number, got 'a'"),
    ):
        with pytest.raises(TypeError, match=message):
            mo.analysis.post_hoc_weights(*arguments)
