r"""The physical picture: a heavy ball is a mass that loses energy, so that it cannot climb above its start.

For $x_{t+1} = x_t - \eta\nabla f(x_t) + \beta(x_t - x_{t-1})$ the energy $E_t = f(x_t) + \frac{\beta}{2\eta}
\|x_t - x_{t-1}\|^2$ never grows while $\eta \le 2(1-\beta)/L$: by the descent lemma
$E_{t+1} - E_t \le (\frac L2 - \frac{1-\beta}{\eta})\,\|x_{t+1} - x_t\|^2$. From rest $E_0 = f(x_0)$, so then
$f(x_t) \le f(x_0)$ for ever: a barrier higher than the start is out of reach on any landscape. Above that learning
rate the steps can add energy.
"""

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from ..filters import Filter
from .arguments import Floats, constant, reals


def energy(rule: Filter, learning_rate: float, values: ArrayLike, points: ArrayLike) -> np.ndarray:
    r"""The energy along a run of a heavy ball: its loss, plus $\frac{\beta}{2\eta}$ times the square of its last step.

    Args:
      rule: A heavy ball, or a rule that equals one up to a factor, such as `ema`.
      learning_rate: The learning rate of the run, in (0, inf).
      values: The losses f(x_0), ..., f(x_n); shape (n + 1,).
      points: The parameters x_0, ..., x_n, starting from rest; shape (n + 1, ...).

    Returns:
      Shape (n + 1,), float64, in the units of the loss.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If the rule is not a heavy ball, the shapes do not fit or a number is out of range.

    Reference:
      Polyak, 1964; the descent lemma of Nesterov, "Introductory lectures on convex optimization", 2004.
    """
    decay, gain = _heavy_ball(rule)
    values, points = reals("values", values, "[-inf, inf]"), reals("points", points, "[-inf, inf]")
    rate = reals("learning_rate", learning_rate, "(0, inf)")
    if rate.ndim:
        raise TypeError(f"learning_rate must be one number, got {_checks.shown(rate)}")
    eta = rate * gain * (1 - decay)
    if values.ndim != 1 or points.ndim == 0 or len(points) != len(values) or not len(values):
        raise ValueError(f"points must have as many entries as values, got shapes {points.shape} and {values.shape}")
    steps = np.diff(points.reshape(len(points), -1), axis=0, prepend=points[:1].reshape(1, -1))
    return np.asarray(values + decay / (2 * eta) * np.sum(steps**2, axis=1))


def energy_limit(rule: Filter, L: ArrayLike) -> Floats:
    r"""The largest learning rate at which a heavy ball released at rest can never climb above its start.

    $\eta\,H(1) = 2/L$: $2(1-\beta)/L$ for `heavy_ball`, $2/L$ for `ema`. Below it the energy cannot grow in any
    loss of curvature at most L; above it, whether a run climbs above its start depends on the landscape.

    Args:
      rule: A heavy ball, or a rule that equals one up to a factor, such as `ema`; decay in [0, 1).
      L: Largest curvature, in (0, inf); any shape.

    Returns:
      float64 of the shape of `L`.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If the rule is not a heavy ball, or L is out of range.

    Reference:
      See `energy`.
    """
    _, gain = _heavy_ball(rule)
    return (2 / (reals("L", L, "(0, inf)") * gain))[()]


def _heavy_ball(rule: Filter) -> tuple[float, float]:
    """Decay and gain at zero frequency of a rule that is a heavy ball times a number."""
    rule = constant(rule)
    if rule.order == 0:
        decay, gain, nu = 0.0, rule.dc_gain(), 1.0
    elif rule.order == 1 and rule.A[0][0] != 0 and rule.dc_gain() not in (0.0, np.inf):
        gain, decay, nu = rule.normal_form()
    else:
        decay, gain, nu = 0.0, 0.0, np.nan
    if not (abs(nu - 1) < 1e-9 and 0 <= decay < 1 and gain > 0):
        raise ValueError(
            f"rule must be a heavy ball of decay in [0, 1), times a positive number, got {_checks.shown(rule)}"
        )
    return float(decay), float(gain)
