"""Mixes of average and gradient, to be followed by a sign, an orthogonalisation or another optimizer."""

__all__ = ["grokfast", "lion_mix", "mars_mix", "muon_mix"]

from .. import _checks
from ..filters import BeforeSign, Filter
from ..filters.coefficients import Scalar, lift, on_first_step, shifted
from .arguments import checked_decay
from .sums_and_averages import quasi_hyperbolic


def lion_mix(b1: Scalar = 0.9, b2: Scalar = 0.99) -> Filter:
    r"""Lion's update before the sign: $u = \beta_1 v + (1 - \beta_1) g$, $v' = \beta_2 v + (1 - \beta_2) g$.

    Lion's direction is `optax.chain(scale_by_momentum(lion_mix()), optax.scale_by_sign())`. Normal form:
    (1, b2, b1/b2). Since only signs count, int8 rounds none of its velocities to far above itself, see `storage.int8`.

    Args:
      b1: beta_1 in [0, 1), the mix.
      b2: beta_2 in [0, 1), the memory.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, arXiv:2302.06675.
    """
    checked_decay("b1", b1)
    checked_decay("b2", b2)
    return BeforeSign(A=b2, B=lift(lambda b: 1 - b, b2), C=b1, D=lift(lambda b: 1 - b, b1))


def muon_mix(decay: Scalar = 0.95) -> Filter:
    r"""Muon's update before the orthogonalisation: $v' = \beta v + (1-\beta) g$, $u = \beta v' + (1-\beta) g$.

    The reference implementation's Nesterov form; Optax's Muon also debiases both terms. Normal form: (1, beta, beta).

    Args:
      decay: beta in [0, 1).

    Raises:
      ValueError: If `decay` is a number out of range.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    checked_decay("decay", decay)
    return quasi_hyperbolic(decay, decay)


def grokfast(decay: Scalar = 0.98, amplification: Scalar = 2.0) -> Filter:
    r"""Grokfast-EMA: the gradient plus its amplified slow part, $v' = \alpha v + (1-\alpha) g$, $u = g + \lambda v'$.

    The first velocity is the first gradient. Normal form apart from that first step: (1+lambda, alpha,
    lambda/(1+lambda)).

    Args:
      decay: alpha in [0, 1).
      amplification: lambda in [0, inf).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Lee et al., "Grokfast: accelerated grokking by amplifying slow gradients", 2024, arXiv:2405.20233.
    """
    checked_decay("decay", decay)
    _checks.within("amplification", amplification, "[0, inf)")
    return Filter(
        A=decay,
        B=on_first_step(1.0, lift(lambda a: 1 - a, decay)),
        C=lift(lambda a, w: w * a, decay, amplification),
        D=on_first_step(lift(lambda w: 1 + w, amplification), lift(lambda a, w: 1 + w * (1 - a), decay, amplification)),
    )


def mars_mix(decay: Scalar = 0.95, gamma: Scalar = 0.025) -> Filter:
    r"""The numerator of MARS in its approximate form, without its clip.

    $$ c_t = g_t + \gamma \frac{\beta}{1-\beta} (g_t - g_{t-1}), \qquad m' = \beta m + (1-\beta) c, \qquad u = m' $$

    with $g_{-1} = 0$. One velocity suffices: $v_t = \beta_t (m_t - \gamma_t g_{t-1})$. Normal form: (1, beta, 1-gamma);
    gamma = 1 - beta is Nesterov's step.

    Args:
      decay: beta in [0, 1).
      gamma: Weight of the variance reduction, finite.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    checked_decay("decay", decay)
    _checks.finite("gamma", gamma)
    ahead = shifted(decay)
    gain = lift(lambda b, c: 1 - b + c * b, decay, gamma)
    return Filter(A=ahead, B=lift(lambda b, d, c: b * (d - c), ahead, gain, shifted(gamma)), C=1.0, D=gain)
