"""Linear algebra behind `Filter`: transfer functions, minimality and the normal form; NumPy float64."""

from typing import NamedTuple

import numpy as np


class NormalForm(NamedTuple):
    """`scale` times the quasi-hyperbolic rule with `decay` and `nu` (see `quasi_hyperbolic`)."""

    scale: float
    decay: float
    nu: float


def transfer_function(A: np.ndarray, impulse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of H(z) in powers of 1/z, from A and the first K + 1 impulse coefficients."""
    denominator = characteristic_polynomial(A)
    return np.convolve(denominator, impulse)[: len(A) + 1], denominator


def is_minimal(impulse: np.ndarray, order: int) -> bool:
    """Whether the Hankel matrix of 2K + 1 impulse coefficients has rank K: then no shorter rule has this response."""
    hankel = np.array([impulse[i + 1 : i + 1 + order] for i in range(order)]).reshape(order, order)
    return bool(np.linalg.matrix_rank(hankel, rtol=1e-10) == order) if order else True


def grows(A: np.ndarray) -> bool:
    """Whether an eigenvalue is outside the unit circle, by more than its rounding."""
    return bool(np.abs(np.linalg.eigvals(A)).max(initial=0.0) > 1 + 1e-9)


def characteristic_polynomial(A: np.ndarray) -> np.ndarray:
    """Coefficients of det(zI - A), highest power first, by Faddeev and LeVerrier.

    `numpy.poly` goes through eigenvalues, which are inaccurate for the shift matrices of moving averages.
    """
    size = len(A)
    coefficients, M = [1.0], np.eye(size)
    for k in range(1, size + 1):
        AM = A @ M
        coefficients.append(-np.trace(AM) / k)
        M = AM + coefficients[-1] * np.eye(size)
    return np.array(coefficients)
