r"""The response of a rule to a signal: gains, delays and memory, without a loss in the loop.

For constant coefficients the impulse response is $h_0 = D$, $h_k = C A^{k-1} B$, and the transfer function
$H(z) = \sum_k h_k z^{-k} = C (zI - A)^{-1} B + D$.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from ..filters import Filter
from .arguments import Floats, constant, known, phases, reals
from .periods import covariances, steady
from .settling import settling_time

# Frequencies to search for the bandwidth, before it is refined.
_SEARCHED = 8192


def impulse_response(rule: Filter, n: int, *, start: int = 0) -> np.ndarray:
    r"""The impulse response: the `n` updates from step `start` on for a gradient that is 1 at that step, else 0.

    Exact for schedules and first-step coefficients too, for which the result depends on `start`.

    Args:
      rule: Any rule.
      n: Number of steps, at least 0.
      start: The step of the gradient, from 0.

    Returns:
      Shape (n,), float64.

    Raises:
      TypeError: If `rule` is not a `Filter`, or a number is not whole.
      ValueError: If a number is negative.
    """
    return known(rule).impulse_response(n, start)


def step_response(rule: Filter, n: int) -> np.ndarray:
    r"""The first `n` updates for a gradient that is 1 from the first step on; they tend to `dc_gain`.

    Args:
      rule: Any rule.
      n: Number of steps, at least 0.

    Returns:
      Shape (n,), float64.

    Raises:
      TypeError: If `rule` is not a `Filter`, or `n` is not whole.
      ValueError: If `n` is negative.
    """
    _checks.integer("n", n, 0)
    return known(rule).response(np.ones(int(n)))


def frequency_response(rule: Filter, omega: ArrayLike, *, step: int | None = None) -> Floats:
    r"""$H(e^{i\omega})$: gain and phase of the update for an oscillating gradient.

    For `ema` the magnitude is $(1-\beta)/\sqrt{1 - 2\beta\cos\omega + \beta^2}$.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      omega: Radians per step; any shape.
      step: The step whose coefficients are used; None for constant coefficients, with the limit of those that depend
        on a leaf's age (special first steps, debiasing weights).

    Returns:
      complex128 of the shape of `omega`; infinite, or as large as rounding leaves it, at a pole on the unit circle.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If `omega` is not finite, or a coefficient depends on the step and `step` is None.
    """
    A, B, C, D = constant(rule, step).matrices()
    z = np.exp(1j * reals("omega", omega, "(-inf, inf)"))
    eye = np.eye(len(B))
    # A pole of several velocities is not found to rounding, but leaves the matrix singular.
    at_pole = np.any(abs(z[..., None] - np.linalg.eigvals(A)) < 1e-14, axis=-1)
    at_pole |= np.linalg.slogdet(z[..., None, None] * eye - A)[0] == 0
    resolvent = np.where(at_pole, 2 + abs(A).sum(), z)[..., None, None] * eye - A
    inner = np.linalg.solve(resolvent, B[:, None])[..., 0]
    return np.where(at_pole, np.inf, inner @ C + D)[()]


def dc_gain(rule: Filter, *, step: int | None = None) -> float:
    r"""The limit of the update for a constant gradient of 1: $H(1) = \sum_k h_k = C (I - A)^{-1} B + D$.

    1/(1-beta) for `heavy_ball` and `nesterov`, 1 for averages. For a rule with a period, the mean update over one: the
    step size for `lookahead`, the outer learning rate over 1 - decay for `outer_nesterov`.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      step: See `frequency_response`.

    Returns:
      A float; infinite for a pole at 1 or outside the unit circle. With other poles on the circle it is what the update
      swings about.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a coefficient depends on the step and `step` is None.
    """
    repeated = phases(rule, step)
    if len(repeated) == 1:
        return repeated[0].dc_gain()
    return float(np.mean(_steady_updates(repeated)))


def _steady_updates(repeated: Sequence[Filter]) -> np.ndarray:
    """The updates of one period, shape (k,), for a gradient that has always been 1; infinite if they never settle."""
    A, B, C, D = (list(x) for x in zip(*(rule.matrices() for rule in repeated), strict=True))
    try:
        return np.asarray(np.einsum("ti,ti->t", C, steady(A, B)) + D)
    except np.linalg.LinAlgError:
        return np.full(len(repeated), np.inf)


def effective_learning_rate(rule: Filter, learning_rate: ArrayLike, *, step: int | None = None) -> Floats:
    """The learning rate of plain descent with the same steps under a constant gradient: learning rate times `dc_gain`.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      learning_rate: In [0, inf); any shape.
      step: See `frequency_response`.

    Returns:
      float64 of the shape of `learning_rate`.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a learning rate is out of range, or a coefficient depends on the step and `step` is None.
    """
    return (reals("learning_rate", learning_rate, "[0, inf)") * dc_gain(rule, step=step))[()]


def poles(rule: Filter, *, step: int | None = None) -> np.ndarray:
    """The eigenvalues of A; every velocity is a mixture of their powers.

    Velocities that are never read or always zero are left out. For a rule with a period, the eigenvalues of the product
    of A over one: the factors per period.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      step: See `frequency_response`.

    Returns:
      Shape (K,), complex128, the slowest first.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a coefficient depends on the step and `step` is None.
    """
    matrices = [now.matrices()[0] for now in phases(rule, step)]
    eigenvalues = np.linalg.eigvals(functools.reduce(lambda before, A: A @ before, matrices)).astype(np.complex128)
    return eigenvalues[np.argsort(-abs(eigenvalues), kind="stable")]


def half_life(rule: Filter, *, step: int | None = None) -> float:
    r"""Steps in which the slowest memory falls to half: $\ln 2 / (-\ln|p|)$ for the pole p of largest modulus.

    6.58 for a decay of 0.9, 68.97 for 0.99. `memory` measures the rule as a whole. For a rule with a period it is
    k times the half-life in periods.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      step: See `frequency_response`.

    Returns:
      A float: 0 for a rule of finite response, infinite if it never forgets.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a coefficient depends on the step and `step` is None.
    """
    k = len(phases(rule, step))
    slowest = float(max(abs(poles(rule, step=step)), default=0.0))
    if slowest == 0:
        return 0.0
    return k * math.log(2) / -math.log(slowest) if slowest < 1 else math.inf


def memory(rule: Filter, fraction: float = 0.5, *, step: int | None = None) -> float:
    r"""The number of latest gradients that make up a fraction of the update under a constant gradient.

    The least n for which $|\sum_{k \ge m} h_k| \le (1 - f)\,|H(1)|$ for every $m \ge n$. For `ema` it is
    $\lceil \ln(1-f)/\ln\beta \rceil$.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      fraction: f, in (0, 1).
      step: See `frequency_response`.

    Returns:
      A whole number as a float; infinite for a rule that never forgets or whose gain is 0.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If `fraction` is out of range, a coefficient depends on the step and `step` is None, or the number is
        above 2^24/K.
    """
    _checks.number("fraction", fraction, "(0, 1)")
    rule = constant(rule, step)
    A, B, C, _ = rule.matrices()
    gain = rule.dc_gain()
    if max(abs(np.linalg.eigvals(A)), default=0.0) >= 1 or gain == 0:
        return math.inf
    # The gradients older than k steps contribute the readout of A^(k-1) B through `rest`.
    rest = np.linalg.solve(np.eye(len(B)) - A.T, C)
    allowed = (1 - fraction) * abs(gain) * (1 + 1e-12)  # a fraction met exactly counts as met
    return 1.0 + settling_time(A, B, rest, allowed)


def mean_lag(rule: Filter, *, step: int | None = None) -> float:
    r"""The mean age of the gradients in an update, $\sum_k k h_k / \sum_k h_k = C (I-A)^{-2} B / H(1)$.

    The group delay at zero frequency: the steps by which the update lags behind a drifting gradient.
    beta/(1-beta) for `heavy_ball` and `ema`. Negative weights can make it negative: a prediction. For a rule with a
    period both sums are over the updates of one.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      step: See `frequency_response`.

    Returns:
      A float, in steps; infinite where the gain is, NaN where it is 0.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a coefficient depends on the step and `step` is None.
    """
    repeated = phases(rule, step)
    updates = _steady_updates(repeated).sum()
    if math.isinf(updates) or updates == 0:
        return math.inf if updates else math.nan
    A, B, C, _ = (list(x) for x in zip(*(rule.matrices() for rule in repeated), strict=True))
    # Velocities whose gradients count with their age at the next step: each step makes them older by one.
    v = steady(A, B)
    aged = steady(A, [A[t] @ v[t] + B[t] for t in range(len(A))])
    return float(np.einsum("ti,ti->", C, aged) / updates)


def noise_gain(rule: Filter, *, step: int | None = None) -> float:
    r"""The variance of the update for independent gradient noise of variance 1: $\sum_k h_k^2$.

    (1-beta)/(1+beta) for `ema`, 1/(1-beta^2) for `heavy_ball`. Divided by the square of `dc_gain` it compares
    rules at equal effective learning rate. For a rule with a period, the mean over one.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      step: See `frequency_response`.

    Returns:
      A float; infinite for a rule that never forgets.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a coefficient depends on the step and `step` is None.
    """
    A, B, C, D = (list(x) for x in zip(*(now.matrices() for now in phases(rule, step)), strict=True))
    of_velocities = np.einsum("ti,tij,tj->t", C, covariances(A, B), C) if len(B[0]) else 0.0
    return float(np.mean(np.square(D) + of_velocities))


def bandwidth(rule: Filter, *, step: int | None = None) -> float:
    r"""The lowest frequency, in radians per step, at which half the power passes: $|H|$ is $|H(0)|/\sqrt2$, -3 dB.

    For `ema` it is $\cos\omega = 1 - (1-\beta)^2/(2\beta)$. Searched among 8192 frequencies between 1e-9 and pi,
    evenly spaced in the logarithm, then refined by bisection.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      step: See `frequency_response`.

    Returns:
      A float in (0, pi]; infinite if every frequency passes.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If the gain at zero frequency is 0 or infinite, or a coefficient depends on the step and `step` is
        None.
    """
    rule = constant(rule, step)
    gain = abs(rule.dc_gain())
    if gain == 0 or math.isinf(gain):
        raise ValueError(f"rule must have a finite gain other than 0 at zero frequency, got {gain}")

    def passes(omega: ArrayLike) -> Floats:
        return abs(frequency_response(rule, omega)) > gain / math.sqrt(2)

    omega = np.geomspace(1e-9, math.pi, _SEARCHED)
    stopped = np.flatnonzero(~passes(omega))
    if not len(stopped):
        return math.inf
    low, high = omega[max(stopped[0] - 1, 0)], omega[stopped[0]]
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if passes(middle) else (low, middle)
    return float(high)
