"""Published rules that others have superseded."""

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, lift
from ..rules.arguments import AGE
from ..rules.sums_and_averages import quasi_hyperbolic


def recht_pid(proportional: Scalar, integral: Scalar, derivative: Scalar) -> Filter:
    r"""Recht's PID form: the derivative's pole is tied to the gains, $\beta = k_D/(k_D - k_P)$; learning rate 1.

    Normal form: (k_I, k_D/(k_D - k_P), k_P^2/(k_I k_D)). One velocity instead of the two of `pid`. Way back from
    (scale a, decay b, nu n): k_I = a, k_P = -a b n/(1-b), k_D = a n b^2/(1-b)^2.

    Args:
      proportional: k_P in (-inf, 0).
      integral: k_I in (0, inf).
      derivative: k_D in (0, inf).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Recht, "The best things in life are model free", 2018, as given by Ma and Yarats, arXiv:1810.06801, section 4.
    """
    _checks.within("proportional", proportional, "(-inf, 0)")
    _checks.within("integral", integral, "(0, inf)")
    _checks.within("derivative", derivative, "(0, inf)")
    decay = lift(lambda p, d: d / (d - p), proportional, derivative)
    nu = lift(lambda p, i, d: p**2 / (i * d), proportional, integral, derivative)
    return quasi_hyperbolic(decay, nu).scale(integral)


def grokfast_average(window: int = 100, amplification: Scalar = 5.0) -> Filter:
    r"""Grokfast-MA: the gradient plus lambda times the mean of the last w gradients, once there are w of them.

    A finite filter: its w - 1 velocities are the past gradients, so it costs w - 1 times the parameters in memory.

    Args:
      window: w, a whole number of at least 2.
      amplification: lambda in [0, inf).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `window` is not a whole number.

    Reference:
      Lee et al., 2024, arXiv:2405.20233 (the moving-average form, with its warm-up).
    """
    _checks.integer("window", window, 2)
    _checks.within("amplification", amplification, "[0, inf)")
    K = int(window) - 1
    weight = lift(lambda w, age: w / (K + 1) * (age >= K), amplification, AGE)
    return Filter(
        A=tuple(tuple(float(j == i - 1) for j in range(K)) for i in range(K)),
        B=(1.0,) + (0.0,) * (K - 1),
        C=(weight,) * K,
        D=lift(lambda x: 1 + x, weight),
    )
