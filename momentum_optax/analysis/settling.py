r"""Settling time, peak and sums of squares of a linear system $x_{t+1} = M x_t$, $y_t = c \cdot x_t$.

With $P = \sum_j M^{\top j} c\,c^\top M^j$, $x_t^\top P x_t = \sum_{s \ge t} y_s^2$ bounds every later y, so that a
finite number of steps decides about all of them.
"""

import numpy as np

# The most numbers to hold in memory: all states of a run are.
_LARGEST = 2**24


def squares(M: np.ndarray, G: np.ndarray) -> np.ndarray:
    r"""$P = \sum_j M^j G G^\top M^{\top j}$: the `lyapunov` solution for G of shape (..., d)."""
    return lyapunov(M, G[..., :, None] * G[..., None, :])


def lyapunov(M: np.ndarray, Q: np.ndarray) -> np.ndarray:
    r"""$P = \sum_j M^j Q M^{\top j}$, which solves $P = M P M^\top + Q$: a state's covariance.

    By Smith's doubling: after k rounds the sum has $2^k$ terms, all of them positive semidefinite, so nothing cancels.

    Args:
      M: Shape (..., d, d).
      Q: Shape (..., d, d), symmetric.

    Returns:
      Shape (..., d, d); infinite where the spectral radius of M is 1 or more.
    """
    contracts = is_contraction(M)[..., None, None]
    power, P = np.where(contracts, M, 0.0), Q
    while abs(power).max(initial=0.0) > 1e-20:
        P = P + power @ P @ np.swapaxes(power, -1, -2)
        power = power @ power
    return np.where(contracts, P, np.inf)


def largest(M: np.ndarray) -> np.ndarray:
    """The largest modulus of the eigenvalues; infinite where an entry is not finite; shape (...,)."""
    finite = np.all(np.isfinite(M), (-2, -1))
    radius = abs(np.linalg.eigvals(np.where(finite[..., None, None], M, 0.0))).max(-1, initial=0.0)
    return np.where(finite, radius, np.inf)


def is_contraction(M: np.ndarray) -> np.ndarray:
    """Whether the spectral radius of M is below 1, by more than the rounding of its eigenvalues; shape (...,)."""
    return np.asarray(largest(M) < 1 - 1e-13)


def settling_time(M: np.ndarray, x: np.ndarray, c: np.ndarray, level: float) -> float:
    """The least n with |y_t| <= level for every t >= n; infinite if the spectral radius of M is not below 1.

    Args:
      M: Shape (d, d).
      x: Shape (d,), the state at t = 0.
      c: Shape (d,), the readout.
      level: Above 0.

    Raises:
      ValueError: If that takes more than 2^24/d steps.
    """
    y = _until_below(M, x, c, level)
    if y is None:
        return np.inf
    above = np.flatnonzero(y > level)
    return float(above[-1] + 1) if len(above) else 0.0


def peak(M: np.ndarray, x: np.ndarray, c: np.ndarray, level: float) -> float:
    """The largest |y_t| over t >= 0 if that is above `level`, else some |y_t|; infinite as in `settling_time`."""
    y = _until_below(M, x, c, level)
    return np.inf if y is None else float(y.max())


def _until_below(M: np.ndarray, x: np.ndarray, c: np.ndarray, level: float) -> np.ndarray | None:
    """|y_0|, |y_1|, ... until all later ones are at most `level`; None if M does not contract."""
    if not is_contraction(M):
        return None
    P = squares(M.T, c)
    powers, later = [M], M @ x  # later is the state after as many steps as the last power has
    while later @ P @ later > level**2:
        if len(x) << len(powers) > _LARGEST:
            raise ValueError(f"rule must settle within {_LARGEST // len(x)} steps here, it takes longer")
        later = powers[-1] @ later
        powers.append(powers[-1] @ powers[-1])
    states = x[None, :]
    for power in powers:
        states = np.concatenate([states, states @ power.T])
    return np.asarray(abs(states @ c))
