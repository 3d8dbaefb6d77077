"""Sums of squares, settling times and peaks of linear systems, against SciPy and long simulations."""

import numpy as np
import pytest
import scipy.linalg

from momentum_optax.analysis.settling import is_contraction, peak, settling_time, squares


def system(seed, order, radius):
    """A random matrix of this spectral radius, a state and a readout."""
    rng = np.random.default_rng(seed)
    M = rng.normal(size=(order, order))
    return M * radius / abs(np.linalg.eigvals(M)).max(), rng.normal(size=order), rng.normal(size=order)


@pytest.mark.parametrize("radius", [0.1, 0.9, 0.999])
@pytest.mark.parametrize("order", [1, 2, 5])
def test_squares_solve_the_lyapunov_equation(order, radius):
    M, G, _ = system(order, order, radius)
    expected = scipy.linalg.solve_discrete_lyapunov(M, np.outer(G, G))
    np.testing.assert_allclose(squares(M, G), expected, rtol=1e-8, atol=1e-10 * abs(expected).max())


def test_squares_of_several_systems_are_those_of_each():
    systems = [system(seed, 3, radius) for seed, radius in enumerate((0.5, 0.9, 1.1))]
    M, G, _ = map(np.stack, zip(*systems, strict=True))
    together = squares(M, G)
    for got, (one, drive, _) in zip(together, systems, strict=True):
        np.testing.assert_allclose(got, squares(one, drive))
    assert list(is_contraction(M)) == [True, True, False]
    assert np.all(np.isinf(together[2]))


@pytest.mark.parametrize("level", [1.0, 1e-2, 1e-6])
@pytest.mark.parametrize("order", [1, 2, 4])
def test_settling_time_and_peak_are_those_of_a_long_run(order, level):
    M, x, c = system(10 + order, order, 0.95)
    outputs, state = [], x
    for _ in range(2000):
        outputs.append(abs(c @ state))
        state = M @ state
    above = np.flatnonzero(np.array(outputs) > level)
    assert settling_time(M, x, c, level) == (above[-1] + 1 if len(above) else 0)
    assert peak(M, x, c, abs(c @ x)) == pytest.approx(max(outputs), rel=1e-12)


def test_a_system_that_does_not_settle():
    M, x, c = system(0, 2, 1.0)
    assert settling_time(M, x, c, 1e-3) == np.inf
    assert peak(M, x, c, 1e-3) == np.inf
    with pytest.raises(ValueError, match="rule must settle within 16777216 steps here"):
        settling_time(np.array([[1 - 1e-9]]), np.ones(1), np.ones(1), 1e-6)
