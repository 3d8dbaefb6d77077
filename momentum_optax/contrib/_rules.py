"""Published rules that others have superseded, or that few need."""

import math

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, lift, shifted
from ..rules.arguments import AGE, step_number
from ..rules.look_ahead import _two_momenta
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


def implicit_transport(delta: Scalar = 1.0) -> Filter:
    r"""Implicit gradient transport (IGT): gradients taken so far ahead that their average is that of the iterate.

    $$ m' = \gamma_t m + (1 - \gamma_t) g(y), \quad \theta' = \theta - \eta m', \quad
       y' = \theta' + \frac{\gamma_{t+1}}{1 - \gamma_{t+1}} (\theta' - \theta), \quad \gamma_t = \frac{t}{t + \delta} $$

    t counts the steps from 0. The stored parameters are y, ahead of theta by (t + 1)/delta steps, and `eval_params`
    gives theta. On a quadratic m is exactly the mean gradient at theta. For a constant delta the update is
    $u = g + m'/\delta$.

    Args:
      delta: In (0, inf); 1 averages all gradients alike, more weights late ones.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Arnold et al., "Reducing the variance in online optimization by transporting past gradients", NeurIPS 2019,
      arXiv:1906.03532, and its code, seba-1511/igt.pth.
    """
    _checks.within("delta", delta, "(0, inf)")
    keep = lift(lambda d, t: t / (t + d), delta, step_number)
    intake = lift(lambda d, t: d / (t + d), delta, step_number)
    before = lift(lambda d, t: t / d, delta, step_number)
    ahead = lift(lambda n, t: (t + 1) / n, shifted(delta), step_number)
    return Filter(
        A=keep,
        B=intake,
        C=lift(lambda k, b, n: (1 + n) * k - b, keep, before, ahead),
        D=lift(lambda i, n: (1 + n) * i, intake, ahead),
        lookahead=ahead,
    )


def optimized_gradient_norm(steps: int) -> Filter:
    r"""OGM-G, the optimized gradient method for a small gradient after N steps; learning rate 1/L.

    $$ x' = y - \eta g(y), \qquad y' = x' + \frac{(\theta_t - 1)(2\theta_{t+1} - 1)}{\theta_t (2\theta_t - 1)} (x' - x)
       + \frac{2\theta_{t+1} - 1}{2\theta_t - 1} (x' - y) $$

    $\theta_N = 1$, $\theta_t = (1 + \sqrt{1 + 4\theta_{t+1}^2})/2$, but $\theta_0 = (1 + \sqrt{1 + 8\theta_1^2})/2$.
    The stored parameters are y: after N steps $\|\nabla f(y_N)\|^2 \le 2 L (f(y_0) - f^*)/\theta_0^2$ for a convex f.
    Steps after the N-th are plain descent.

    Args:
      steps: N, a whole number of at least 1; the rule holds a table of as many numbers.

    Raises:
      ValueError: If `steps` is below 1.
      TypeError: If `steps` is not a whole number.

    Reference:
      Kim and Fessler, "Optimizing the efficiency of first-order methods for decreasing the gradient of smooth convex
      functions", JOTA 2021, arXiv:1803.06600, as given by PEPit.
    """
    _checks.integer("steps", steps, 1)
    theta = [1.0]
    for t in range(int(steps)):
        theta.append((1 + math.sqrt(1 + (4 if t < steps - 1 else 8) * theta[-1] ** 2)) / 2)
    pairs = list(zip(theta[:0:-1], theta[-2::-1], strict=True))
    back = [(2 * later - 1) / (2 * now - 1) for now, later in pairs]
    return _two_momenta([*((now - 1) / now * b for (now, _), b in zip(pairs, back, strict=True)), 0.0], [*back, 0.0])
