"""Rules with several velocities per parameter."""

__all__ = ["adan_mix", "ademamix_mix", "aggregated", "aggregated_exponential", "pid", "positive_negative"]

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, lift, on_first_step, shifted
from .arguments import AGE, checked_decay, diagonal


def aggregated(decays: tuple[Scalar, ...] = (0.0, 0.9, 0.99)) -> Filter:
    r"""Aggregated momentum (AggMo): the mean of K heavy balls.

    $$ v_i' = \beta_i v_i + g, \qquad u = \frac{1}{K} \sum_i v_i' $$

    A velocity whose decay is the number 0 is not stored.

    Args:
      decays: K values beta_i in [0, 1].

    Raises:
      ValueError: If `decays` is empty or a number is out of range.
      TypeError: If `decays` is not a tuple or list.

    Reference:
      Lucas et al., "Aggregated momentum: stability through passive damping", ICLR 2019, arXiv:1804.00325.
    """
    if not isinstance(decays, tuple | list):
        raise TypeError(f"decays must be a tuple or list of decays, got {_checks.shown(decays)}")
    if not decays:
        raise ValueError("decays must have at least one entry, got none")
    for i, decay in enumerate(decays):
        _checks.within(f"decays[{i}]", decay, "[0, 1]")
    K = len(decays)
    return Filter(A=diagonal(*decays), B=(1.0,) * K, C=tuple(lift(lambda b: b / K, decay) for decay in decays), D=1.0)


def aggregated_exponential(base: Scalar = 0.1, count: int = 3) -> Filter:
    r"""AggMo with decays $\beta_i = 1 - a^i$, $i = 0, \ldots, K - 1$: its exponential parameterisation.

    Args:
      base: a in (0, 1); 0.1 and 3 give 0, 0.9, 0.99.
      count: K, a whole number of at least 1.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `count` is not a whole number.

    Reference:
      Lucas et al., ICLR 2019, arXiv:1804.00325, section 4.
    """
    _checks.within("base", base, "(0, 1)")
    _checks.integer("count", count, 1)
    return aggregated((0.0, *(lift(lambda a, i=i: 1 - a**i, base) for i in range(1, int(count)))))


def ademamix_mix(fast: Scalar = 0.9, slow: Scalar = 0.9999, alpha: Scalar = 5.0) -> Filter:
    r"""The numerator of AdEMAMix: a debiased fast average plus alpha times a slow average that is not debiased.

    $$ m' = \beta_1 m + (1 - \beta_1) g, \quad n' = \beta_3 n + (1 - \beta_3) g, \quad
       u_t = \frac{m'}{1 - \beta_1^{t+1}} + \alpha n' $$

    t counts the gradients that the leaf has received. The paper warms alpha and the slow decay up: `schedules.ramp` and
    `schedules.half_life_ramp`.

    Args:
      fast: beta_1 in [0, 1).
      slow: beta_3 in [0, 1).
      alpha: Weight of the slow average, in [0, inf).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Pagliardini, Ablin and Grangier, "The AdEMAMix optimizer", ICLR 2025, arXiv:2409.03137.
    """
    checked_decay("fast", fast)
    checked_decay("slow", slow)
    _checks.within("alpha", alpha, "[0, inf)")
    weight = lift(lambda b, t: 1 / (1 - b ** (t + 1)), fast, AGE)
    return Filter(
        A=diagonal(fast, slow),
        B=(lift(lambda b: 1 - b, fast), lift(lambda b: 1 - b, slow)),
        C=(lift(lambda w, b: w * b, weight, fast), lift(lambda a, b: a * b, alpha, slow)),
        D=lift(lambda w, b, a, s: w * (1 - b) + a * (1 - s), weight, fast, alpha, slow),
    )


def pid(proportional: Scalar, integral: Scalar, derivative: Scalar, decay: Scalar) -> Filter:
    r"""A PID controller on the negative gradient, with a filtered derivative; learning rate 1.

    $$ \theta_{t+1} = \theta_0 + k_P e_t + k_I \sum_{s \le t} e_s + k_D w_t, \quad e = -g, \quad
       w_t = \beta w_{t-1} + (1-\beta)(e_t - e_{t-1}) $$

    in its incremental form, in which scheduled gains multiply the increments of their step. Order 2.
    `contrib.recht_pid` is the case that quasi-hyperbolic momentum can express.

    Args:
      proportional: k_P, finite.
      integral: k_I, finite; with the other two at zero this is the learning rate of plain descent.
      derivative: k_D, finite.
      decay: beta in [0, 1).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Ma and Yarats, ICLR 2019, arXiv:1810.06801, section 4 and appendix; An et al., "A PID controller approach for
      stochastic optimization of deep networks", CVPR 2018.
    """
    for name, value in (("proportional", proportional), ("integral", integral), ("derivative", derivative)):
        _checks.finite(name, value)
    checked_decay("decay", decay)
    intake = lift(lambda b: 1 - b, decay)
    slope = lift(lambda d, b: d * (1 - b), derivative, decay)
    return Filter(
        A=((0.0, 0.0), (lift(lambda b: b - 1, decay), decay)),
        B=(1.0, intake),
        C=(lift(lambda p, s: -p - s, proportional, slope), lift(lambda s: -s, slope)),
        D=lift(lambda p, i, s: p + i + s, proportional, integral, slope),
    )


def adan_mix(b1: Scalar = 0.98, b2: Scalar = 0.92) -> Filter:
    r"""The numerator of Adan, not debiased: $u = m' + \beta_2 d'$ with averages of the gradient and of its change.

    $$ m' = \beta_1 m + (1-\beta_1) g, \qquad d'_t = \beta_2 d_t + (1-\beta_2)(g_t - g_{t-1}), \qquad g_{-1} = g_0 $$

    The last gradient is not stored: $w_t = \beta_2 d_t - (1-\beta_2) g_{t-1}$, with beta_2 of step t, suffices.

    Args:
      b1: beta_1 in [0, 1), the code's convention (the paper writes 1 - beta).
      b2: beta_2 in [0, 1).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models", TPAMI 2024,
      arXiv:2208.06677.
    """
    checked_decay("b1", b1)
    checked_decay("b2", b2)
    ahead = shifted(b2)
    a1 = lift(lambda b: 1 - b, b1)
    return Filter(
        A=diagonal(b1, ahead),
        B=(a1, on_first_step(lift(lambda n: n - 1, ahead), lift(lambda b, n: n * (1 - b) + n - 1, b2, ahead))),
        C=(b1, b2),
        D=on_first_step(a1, lift(lambda a, b: a + b * (1 - b), a1, b2)),
    )


def positive_negative(decay: Scalar = 0.9, beta0: Scalar = 1.0) -> Filter:
    r"""Positive-negative momentum (PNM): the newest average, less a share of the one before, which raises the noise.

    $$ m_t = \beta_1^2 m_{t-2} + (1 - \beta_1^2) g_t, \qquad
       u_t = \frac{(1 + \beta_0) m_t - \beta_0 m_{t-1}}{\sqrt{(1 + \beta_0)^2 + \beta_0^2}} $$

    Two velocities, the averages of the even and of the odd steps in turn. The gain at zero frequency is
    $1/\sqrt{(1+\beta_0)^2+\beta_0^2}$, .447 for beta_0 = 1.

    Args:
      decay: beta_1 in [0, 1).
      beta0: beta_0 in [0, inf); 0 is an average with every other gradient.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Xie et al., "Positive-negative momentum: manipulating stochastic gradient noise to improve generalization", ICML
      2021, arXiv:2103.17182; the form of the code in pytorch_optimizer.
    """
    checked_decay("decay", decay)
    _checks.within("beta0", beta0, "[0, inf)")
    kept = lift(lambda b: b * b, decay)
    size = lift(lambda n: ((1 + n) ** 2 + n * n) ** 0.5, beta0)
    newest = lift(lambda n, c: (1 + n) / c, beta0, size)
    intake = lift(lambda k: 1 - k, kept)
    return Filter(
        A=((0.0, kept), (1.0, 0.0)),
        B=(intake, 0.0),
        C=(lift(lambda n, c: -n / c, beta0, size), lift(lambda w, k: w * k, newest, kept)),
        D=lift(lambda w, i: w * i, newest, intake),
    )
