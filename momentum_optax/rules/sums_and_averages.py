"""Sums and averages: the heavy ball, the exponential moving average and their mixtures with the plain gradient."""

__all__ = ["ema", "heavy_ball", "quasi_hyperbolic", "simplified_ademamix"]

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Coefficient, Scalar, is_zero, lift, on_first_step
from .arguments import checked_decay


def heavy_ball(decay: Scalar, *, dampening: Scalar = 0.0, first_step: str = "zero") -> Filter:
    r"""Heavy ball, the classical momentum: a decaying sum of gradients.

    $$ v' = \mu v + (1 - \tau) g, \qquad u = v' $$

    At a constant learning rate this is Polyak's $x_{t+1} = x_t - \alpha g_t + \mu (x_t - x_{t-1})$. A negative decay
    is the negative momentum of Gidel et al. for games. Normal form for dampening 0: (1/(1-mu), mu, 1).

    Args:
      decay: mu in (-1, 1].
      dampening: tau in [0, 1).
      first_step: `"zero"` starts from velocity zero; `"gradient"` is PyTorch's rule, in which the first gradient that a
        leaf receives becomes its velocity, undampened. Without dampening the two are the same.

    Raises:
      ValueError: If a number is out of range or `first_step` is another string.

    Reference:
      Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. Gidel et al., "Negative
      momentum for improved game dynamics", AISTATS 2019, arXiv:1807.04740.
    """
    _checks.within("decay", decay, "(-1, 1]")
    _checks.within("dampening", dampening, "[0, 1)")
    _checks.choice("first_step", first_step, ("zero", "gradient"))
    intake: Coefficient = lift(lambda tau: 1 - tau, dampening)
    if first_step == "gradient" and not is_zero(dampening):
        intake = on_first_step(1.0, intake)
    return Filter(A=decay, B=intake, C=decay, D=intake)


def ema(decay: Scalar) -> Filter:
    r"""The exponentially weighted moving average of the gradients: $v' = \beta v + (1 - \beta) g$, $u = v'$.

    Not debiased; `scale_by_momentum(..., debias=True)` debiases it, exactly under any schedule.
    Normal form: (1, beta, 1).

    Args:
      decay: beta in [0, 1); the mean lag is beta/(1-beta) steps.

    Raises:
      ValueError: If `decay` is a number out of range.

    Reference:
      The first moment of Kingma and Ba, "Adam", ICLR 2015, arXiv:1412.6980.
    """
    intake = lift(lambda b: 1 - b, checked_decay("decay", decay))
    return Filter(A=decay, B=intake, C=decay, D=intake)


def quasi_hyperbolic(decay: Scalar, nu: Scalar) -> Filter:
    r"""Quasi-hyperbolic momentum (QHM): an average, mixed with the plain gradient.

    $$ v' = \beta v + (1 - \beta) g, \qquad u = (1 - \nu) g + \nu v' $$

    The gain at zero frequency is one, so that the learning rate keeps its meaning. Every rule of order one with a
    non-zero pole and gain is this rule times a number: it is the normal form (1, beta, nu) of the others.

    Args:
      decay: beta in (-1, 1); the paper's are not negative, the normal forms of some heavy balls are.
      nu: Share of the average, finite; 0 is plain descent, 1 the average, beta Nesterov's step.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019, arXiv:1810.06801.
    """
    _checks.within("decay", decay, "(-1, 1)")
    _checks.finite("nu", nu)
    return Filter(
        A=decay,
        B=lift(lambda b: 1 - b, decay),
        C=lift(lambda b, n: n * b, decay, nu),
        D=lift(lambda b, n: 1 - n + n * (1 - b), decay, nu),
    )


def simplified_ademamix(decay: Scalar = 0.99, alpha: Scalar = 0.0) -> Filter:
    r"""The numerator of Simplified AdEMAMix: $v' = \beta v + g$, $u = v' + \alpha g$.

    Normal form: (alpha + 1/(1-beta), beta, 1/(1 + alpha (1-beta))).

    Args:
      decay: beta in [0, 1].
      alpha: Weight of the raw gradient, in [0, inf).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Morwani et al., "Connections between schedule-free optimizers, AdEMAMix, and accelerated SGD variants", 2025,
      arXiv:2502.02431.
    """
    _checks.within("decay", decay, "[0, 1]")
    _checks.within("alpha", alpha, "[0, inf)")
    return Filter(A=decay, B=1.0, C=decay, D=lift(lambda a: 1 + a, alpha))
