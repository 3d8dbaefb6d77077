r"""Convergence of a rule on a spectrum of curvatures: contraction, iterations, transients and the stability limit.

All of it concerns the loop of `loop.py`. With $H = N/\chi$ the rule's transfer function, N and $\chi$ polynomials
in z, the loop's characteristic polynomial is $(z - 1)\,\chi(z) + \eta\lambda\,N(z)$.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from ..filters import Filter
from . import periods
from .arguments import Floats, curvatures, phases, reals
from .loop import readout, spectral_radius
from .periods import loop_matrix, over_a_period
from .settling import largest, peak, settling_time

# Curvatures of an interval that are tried before the worst one is refined, and rounds of refinement.
_GRID, _ROUNDS = 256, 8


def stability_limit(rule: Filter, curvature: ArrayLike, *, step: int | None = None) -> Floats:
    r"""The learning rate below which the loop converges, and above which it diverges; exact for any order.

    2/lambda for plain descent, 2(1+beta)/lambda for `heavy_ball`, 2(1+beta)/((1+2 beta) lambda) for `nesterov`.

    For a rule with a period the limit is found by search along its Floquet multipliers:
    $(1 + (2/\alpha - 1)^{1/k})/\lambda$ for `lookahead(k, alpha)` of plain descent with odd k. For constant rules an
    eigenvalue can leave the unit disc only through its boundary, where $\eta\lambda = -(z-1)\chi(z)/N(z)$. The
    learning rates at which that happens are found from the roots of one polynomial, and the loop is tested between
    them. Some rules converge again at larger learning rates; those are not counted.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      curvature: Above 0, or complex and not 0 (for games); any shape.
      step: See `closed_loop`.

    Returns:
      float64 of the shape of `curvature`; 0 for a rule that converges at no small learning rate.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If `curvature` is out of range, or a coefficient depends on the step and `step` is None.

    Reference:
      Jury, "Theory and application of the z-transform method", 1964, for the criterion that this replaces.
    """
    repeated = phases(rule, step)
    curvature = curvatures(curvature)
    bad = curvature == 0 if np.iscomplexobj(curvature) else curvature <= 0
    if np.any(bad):
        allowed = "other than 0" if np.iscomplexobj(curvature) else "in (0, inf)"
        raise ValueError(f"curvature must be {allowed}, got {curvature[bad].flat[0]}")
    # Only the product of learning rate and curvature matters; one search per direction of it.
    directions, which = np.unique(curvature / abs(curvature), return_inverse=True)
    limit = _limit if len(repeated) == 1 else periods.stability_limit
    limits = np.array([limit(repeated, direction) for direction in directions])
    return (limits[which.reshape(curvature.shape)] / abs(curvature))[()]


def _limit(repeated: Sequence[Filter], direction: np.number) -> float:
    """The stability limit of a constant rule for a curvature of modulus 1."""
    (rule,) = repeated
    numerator, denominator = rule.transfer_function()
    open_loop = np.convolve([1.0, -1.0], denominator)
    closing = np.concatenate([[0.0], numerator])
    # On the circle the product of learning rate and curvature is a positive number times `direction`.
    ratio = np.convolve(open_loop, closing[::-1]) / direction
    crossings = np.roots(np.trim_zeros(ratio - np.conj(ratio[::-1]), "f"))
    # Those near the circle; spurious ones are harmless, as the loop is tested on both sides of each.
    z = crossings[abs(abs(crossings) - 1) < 1e-3]
    z = z / abs(z)
    with np.errstate(divide="ignore", invalid="ignore"):
        products = (-np.polyval(open_loop, z) / np.polyval(closing, z) / direction).real
    products = np.unique(products[np.isfinite(products) & (products * abs(numerator).max() > 1e-12)])
    if not len(products):
        return 0.0
    between = np.concatenate([[products[0] / 2], (products[1:] + products[:-1]) / 2])
    stable = _verdicts(spectral_radius(rule, between, direction))
    first = int(np.argmin(stable))  # False sorts first
    return float(products[first - 1]) if first else 0.0


def _verdicts(radius: np.ndarray) -> np.ndarray:
    """Whether each interval is stable, and the last one, without end, which is not: there a root goes to infinity.

    Where crossings are too close to tell, an interval is as the one to its right.
    """
    stable = [False]
    for one in reversed(radius):
        stable.append(stable[-1] if abs(one - 1) < 1e-13 else bool(one < 1))
    return np.array(stable[::-1])


def contraction(
    rule: Filter, learning_rate: ArrayLike, mu: ArrayLike, L: ArrayLike, *, step: int | None = None
) -> Floats:
    r"""The contraction per step on a quadratic: the largest `spectral_radius` over the curvatures in [mu, L].

    $(\kappa-1)/(\kappa+1)$ for plain descent at its best learning rate, $(\sqrt\kappa-1)/(\sqrt\kappa+1)$ for the
    heavy ball. Over a period of k steps a rule contracts by the k-th power. The worst of 512 curvatures is refined; a
    peak narrower than their distance would be missed.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      learning_rate: In [0, inf); broadcasts against the others.
      mu: Smallest curvature, in [0, L].
      L: Largest curvature, in (0, inf).
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, or a coefficient depends on the step and `step` is None.

    Reference:
      Lessard, Recht and Packard, 2016, arXiv:1408.3595, proposition 1.
    """
    repeated = phases(rule, step)
    eta, mu, L = np.broadcast_arrays(
        reals("learning_rate", learning_rate, "[0, inf)"), reals("mu", mu, "[0, inf)"), reals("L", L, "(0, inf)")
    )
    if np.any(mu > L):
        raise ValueError(f"mu must be at most L, got {mu[mu > L].flat[0]} above {L[mu > L].flat[0]}")
    # Evenly spaced curvatures, and evenly spaced logarithms of them down to L/1e9 where mu is below that.
    share = np.linspace(0, 1, _GRID)
    low = np.maximum(mu, 1e-9 * L)[..., None]
    even = mu[..., None] + share * (L - mu)[..., None]
    curvature = np.sort(np.concatenate([even, low * (L[..., None] / low) ** share], -1), -1)
    worst = np.zeros(eta.shape)
    for _ in range(_ROUNDS):
        rates = np.broadcast_to(eta[..., None], curvature.shape)
        radius = largest(over_a_period(repeated, rates, curvature)) ** (1 / len(repeated))
        worst = np.maximum(worst, radius.max(-1))
        at = radius.argmax(-1)[..., None]
        left = np.take_along_axis(curvature, np.maximum(at - 1, 0), -1)
        right = np.take_along_axis(curvature, np.minimum(at + 1, curvature.shape[-1] - 1), -1)
        curvature = left + np.linspace(0, 1, 17) * (right - left)
    return worst[()]


def iterations(
    rule: Filter,
    learning_rate: ArrayLike,
    curvature: ArrayLike,
    tolerance: ArrayLike = 1e-6,
    *,
    point: str = "stored",
    step: int | None = None,
) -> Floats:
    r"""Steps from rest until the error is at most `tolerance` times its start for good, the transient included.

    Exact. The number for a whole spectrum is the largest over its curvatures.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      learning_rate: In [0, inf); broadcasts against the others.
      curvature: Real and finite.
      tolerance: In (0, inf).
      point: "stored" for the parameters that the gradient is taken at, "evaluated" for the point of `eval_params`.
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape; infinite where the loop does not converge.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, `point` is another string, a coefficient depends on the step and `step`
        is None, or it takes more than 2^24/(K + 1) steps.
    """
    tolerance = reals("tolerance", tolerance, "(0, inf)")
    M, readouts = _from_rest(phases(rule, step), learning_rate, curvature, point)
    shape = np.broadcast_shapes(M.shape[:-2], tolerance.shape)
    k, d = readouts.shape[-2:]
    entries = zip(
        np.broadcast_to(M, (*shape, d, d)).reshape(-1, d, d),
        np.broadcast_to(readouts, (*shape, k, d)).reshape(-1, k, d),
        np.broadcast_to(tolerance, shape).ravel(),
        strict=True,
    )
    counts = [_settling_time(M, c, float(level)) for M, c, level in entries]
    return np.array(counts, np.float64).reshape(shape)[()]


def transient_growth(
    rule: Filter, learning_rate: ArrayLike, curvature: ArrayLike, *, point: str = "stored", step: int | None = None
) -> Floats:
    r"""The largest error of a run from rest over its start: the overshoot before the contraction sets in.

    1 for plain descent; the optimal heavy ball at the largest curvature grows about $\sqrt\kappa\,/\,e$-fold first.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given.
      learning_rate: In [0, inf); broadcasts against `curvature`.
      curvature: Real and finite.
      point: "stored" for the parameters that the gradient is taken at, "evaluated" for the point of `eval_params`.
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape, at least 1; infinite where the loop does not converge.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, `point` is another string, a coefficient depends on the step and `step`
        is None, or settling takes more than 2^24/(K + 1) steps.

    Reference:
      Mohammadi et al., "Transient growth of accelerated optimization algorithms", 2021, arXiv:2103.08017.
    """
    M, readouts = _from_rest(phases(rule, step), learning_rate, curvature, point)
    k, d = readouts.shape[-2:]
    pairs = zip(M.reshape(-1, d, d), readouts.reshape(-1, k, d), strict=True)
    peaks = [max(peak(M, np.eye(d)[0], c, 1.0) for c in each) for M, each in pairs]
    return np.array(peaks).reshape(M.shape[:-2])[()]


def _from_rest(
    repeated: Sequence[Filter], learning_rate: ArrayLike, curvature: ArrayLike, point: str
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix of one period, and the point after 0, 1, ..., k - 1 steps of it as weights of the state before it.

    Shapes (..., d, d) and (..., k, d).
    """
    eta, curvature = np.broadcast_arrays(
        reals("learning_rate", learning_rate, "[0, inf)"), reals("curvature", curvature, "(-inf, inf)")
    )
    readouts = []
    M = np.broadcast_to(np.eye(repeated[0].order + 1), (*eta.shape, repeated[0].order + 1, repeated[0].order + 1))
    with np.errstate(over="ignore", invalid="ignore"):
        for before, now in zip((repeated[-1], *repeated), repeated, strict=False):
            readouts.append(np.einsum("...i,...ij->...j", readout(before, eta, point), M))
            M = loop_matrix(now, eta, curvature) @ M
    return M, np.stack(readouts, -2)


def _settling_time(M: np.ndarray, readouts: np.ndarray, level: float) -> float:
    """Steps until the point is below `level` for good; M is of a period, with a readout before each of its steps."""
    k = len(readouts)
    rounds = [settling_time(M, np.eye(len(M))[0], c, level) for c in readouts]
    return max((n - 1) * k + j + 1 if n else 0.0 for j, n in enumerate(rounds))


def asymptotic_iterations(contraction: ArrayLike, tolerance: ArrayLike = 1e-6) -> Floats:
    r"""$\ln(\mathrm{tolerance})/\ln(\mathrm{contraction})$: the steps to a tolerance, without the transient.

    Args:
      contraction: Factor per step, in [0, inf), e.g. from `analysis.contraction`; broadcasts against `tolerance`.
      tolerance: In (0, 1).

    Returns:
      float64 of the broadcast shape; infinite where the contraction is 1 or more.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range.
    """
    factor, tolerance = np.broadcast_arrays(
        reals("contraction", contraction, "[0, inf)"), reals("tolerance", tolerance, "(0, 1)")
    )
    contracts = (factor > 0) & (factor < 1)
    steps = np.log(tolerance) / np.log(np.where(contracts, factor, 0.5))
    return np.where(contracts, steps, np.where(factor == 0, 0.0, np.inf))[()]
