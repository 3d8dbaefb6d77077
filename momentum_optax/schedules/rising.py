"""Momentum that rises towards 1 in a run of any length: sequences of accelerated methods, and of averages."""

__all__ = ["fista", "nesterov_convex", "power_average", "sutskever"]

import itertools
import math
from typing import TYPE_CHECKING

from .. import _checks
from ..filters.coefficients import select, table_lookup
from .arithmetic import least, log

if TYPE_CHECKING:
    from .._typing import Count, Number, Schedule


def sutskever(
    max_decay: float = 0.99, *, stage: int = 250, drop_at: int | None = None, drop_to: float = 0.9
) -> "Schedule":
    r"""Sutskever's schedule: $\mu_t = \min(1 - 2^{-1-\log_2(\lfloor t/250 \rfloor + 1)}, \mu_{max})$.

    Args:
      max_decay: Upper limit, in [0, 1); the paper tries 0, 0.9, 0.99, 0.995 and 0.999.
      stage: Steps between two increases, at least 1.
      drop_at: From this step on the momentum is at most `drop_to`; the paper does so for the last 1000 steps.
      drop_to: Upper limit from `drop_at` on, in [0, 1).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Sutskever, Martens, Dahl and Hinton, ICML 2013, equation 5.
    """
    _checks.number("max_decay", max_decay, "[0, 1)")
    _checks.integer("stage", stage, 1)
    _checks.number("drop_to", drop_to, "[0, 1)")
    if drop_at is not None:
        _checks.integer("drop_at", drop_at, 0)

    def schedule(step: "Count") -> "Number":
        rising = least(1 - 0.5 / (step // stage + 1.0), max_decay)
        return rising if drop_at is None else select(step >= drop_at, least(rising, drop_to), rising)

    return schedule


def fista() -> "Schedule":
    r"""FISTA's momentum: $\mu_k = (t_k - 1)/t_{k+1}$, $t_0 = 1$, $t_{k+1} = (1 + \sqrt{1 + 4 t_k^2})/2$.

    The first 1024 terms come from the recurrence; later ones solve its asymptotic series, to about 1e-13.

    Reference:
      Nesterov, 1983; Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2009.
    """
    t = [1.0]
    while len(t) <= 1024:
        t.append((1 + math.sqrt(1 + 4 * t[-1] ** 2)) / 2)
    table = [(now - 1) / later for now, later in itertools.pairwise(t)]
    last, anchor = len(table) - 1, t[-2]

    def schedule(step: "Count") -> "Number":
        # 2t - ln(t)/2 grows by 1 + O(t^-3) per step; three fixed-point rounds invert it to the last digits.
        beyond = (step - last) * (step > last)
        guess: Number = anchor + beyond / 2.0
        for _ in range(3):
            guess = anchor + beyond / 2.0 + log(guess / anchor) / 4
        tail = (guess - 1) / (0.5 + (0.25 + guess * guess) ** 0.5)
        return select(step > last, tail, table_lookup(table, step))

    return schedule


def nesterov_convex(offset: float = 3.0) -> "Schedule":
    r"""The simple schedule for convex problems: $\mu_k = k/(k + 3)$.

    Args:
      offset: The constant 3 of the formula, in (0, inf); larger values forget less in the long run, and restarts help
        them less.

    Raises:
      ValueError: If `offset` is out of range.
      TypeError: If `offset` is not a number.

    Reference:
      Su, Boyd and Candes, "A differential equation for modeling Nesterov's accelerated gradient method", JMLR 2016,
      arXiv:1503.01243; Chambolle and Dossal, JOTA 2015.
    """
    _checks.number("offset", offset, "(0, inf)")
    return lambda step: step / (step + float(offset))


def power_average(exponent: float = 0.0, start: int = 0) -> "Schedule":
    r"""Decays of an average over all steps so far, the later ones with more weight: $c_t = (1 - 1/n)^{\gamma+1}$.

    Here n = t + 1 - start, and c = 0 until `start`. For `average_params`: in the average after n steps the weights
    after step $\tau$ have a share $\propto \tau^\gamma$, exactly for $\gamma = 0$, else to first order in $1/\tau$. So
    its memory is a fixed fraction of the run however long that is.

    * $\gamma = 0$: the uniform mean, with `start` that of the tail of a run;
    * half of the shares belong to the last fraction f of the steps for $\gamma = -\ln 2/\ln(1 - f) - 1$;
    * averages with two exponents give those with any other after the run, see `analysis.post_hoc_weights`.

    Args:
      exponent: gamma, a number in [0, inf).
      start: The step that begins the average, a whole number from 0.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Karras et al., CVPR 2024, arXiv:2312.02696, section 3.1; the mean: Polyak and Juditsky, SIAM J.
      Control and Optimization 1992.
    """
    _checks.number("exponent", exponent, "[0, inf)")
    _checks.integer("start", start, 0)

    def schedule(step: "Count") -> "Number":
        n = step + 1 - start
        late = n > 0
        return late * (1 - 1.0 / select(late, n, 1)) ** (float(exponent) + 1)

    return schedule
