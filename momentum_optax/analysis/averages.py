"""Averages of weights after the run: any width from averages of two widths that were kept during it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from .arguments import reals


class PostHoc(NamedTuple):
    """The weights of kept averages in another one.

    Attributes:
      weights: One number for each kept average; their sum is about 1.
      error: The distance of the two profiles over the norm of the wanted one, in [0, 1]. For weights that are noise
        around one point it is the error of the average over its own noise; slow drifts are reconstructed better.
    """

    weights: np.ndarray
    error: float


def post_hoc_weights(exponents: ArrayLike, steps: ArrayLike, exponent: float, step: float | None = None) -> PostHoc:
    r"""Weights x for which $\sum_i x_i a_i$ of kept averages is about the average of another width.

        found = mo.analysis.post_hoc_weights([16.97, 6.94] * 8, np.repeat(steps, 2), 10.0)
        average = jax.tree.map(lambda *a: sum(x * y for x, y in zip(found.weights, a)), *snapshots)

    An average by `schedules.power_average(gamma)` after n steps has the profile
    $p(\tau) = (\gamma + 1)\,\tau^\gamma / n^{\gamma + 1}$ on [0, n], and two of them the product

    $$ \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)}{\gamma_i + \gamma_j + 1}\,
       \frac{\min(n_i, n_j)^{\gamma_i + \gamma_j + 1}}{n_i^{\gamma_i + 1}\, n_j^{\gamma_j + 1}}. $$

    x is the least-squares solution. The last two averages alone, of the exponents 16.97 and 6.94, give that of
    exponent 10 with an error of 4 % and that of exponent 3 with one of 24 %; kept at eight evenly spaced steps they
    give them with 1.2 % and 4 %, at 32 with 0.1 % and 0.3 %. These exponents are the widths 0.05 and 0.1 of the paper,
    which calls $(\gamma+1)^{1/2} (\gamma+2)^{-1} (\gamma+3)^{-1/2}$ the width.

    Args:
      exponents: gamma of each kept average, in [0, inf); shape (n,), n at least 1.
      steps: The number of steps after which it was kept, in (0, inf); shape (n,).
      exponent: gamma of the average that is wanted, in [0, inf).
      step: The number of steps of the run that it is to average, in (0, inf); the largest of `steps` if None.

    Raises:
      TypeError: If an argument is not of numbers.
      ValueError: If a number is out of range, the sequences are not of one length, or two averages are the same.

    Reference:
      Karras et al., CVPR 2024, arXiv:2312.02696, section 3.2.
    """
    gammas, counts = reals("exponents", exponents, "[0, inf)"), reals("steps", steps, "(0, inf)")
    if gammas.ndim != 1 or gammas.shape != counts.shape or not len(gammas):
        raise ValueError(
            f"exponents and steps must be of one length, at least 1, got shapes {gammas.shape} and {counts.shape}"
        )
    step = float(counts.max()) if step is None else step
    _checks.number("exponent", exponent, "[0, inf)")
    _checks.number("step", step, "(0, inf)")
    if len(np.unique(np.stack([gammas, counts]), axis=1).T) < len(gammas):
        raise ValueError("exponents and steps must differ from average to average, got one pair twice")
    products = _products(np.append(gammas, exponent), np.append(counts, step))
    # Normalized, so that early averages, whose profiles are high and narrow, count as others do.
    norms = np.sqrt(np.diag(products))
    cosines = products / np.outer(norms, norms)
    x = np.linalg.lstsq(cosines[:-1, :-1], cosines[:-1, -1], rcond=1e-12)[0]
    left = 1 - 2 * x @ cosines[:-1, -1] + x @ cosines[:-1, :-1] @ x
    return PostHoc(x * norms[-1] / norms[:-1], float(np.sqrt(max(left, 0.0))))


def _products(g: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The products of all pairs of profiles; powers of ratios below 1 alone, which do not overflow."""
    rows, columns = (g[:, None], n[:, None]), (g[None], n[None])
    first, second = np.minimum(rows[1], columns[1]) / rows[1], np.minimum(rows[1], columns[1]) / columns[1]
    total = rows[0] + columns[0] + 1
    sizes = (rows[0] + 1) * (columns[0] + 1) / total / np.minimum(rows[1], columns[1])
    result: np.ndarray = sizes * first ** (rows[0] + 1) * second ** (columns[0] + 1)
    return result
