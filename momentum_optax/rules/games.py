"""Rules for games: saddle points and minimax problems."""

__all__ = ["complex_heavy_ball", "optimistic"]

import math

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, lift, on_first_step


def optimistic(alpha: Scalar = 1.0, beta: Scalar = 1.0) -> Filter:
    r"""Optimistic gradient: $u_t = (\alpha + \beta) g_t - \beta g_{t-1}$, with $g_{-1} = g_0$.

    The velocity is the last gradient. No normal form (its pole is 0).

    Args:
      alpha: Weight of the gradient, finite.
      beta: Weight of its change, finite.

    Raises:
      ValueError: If a number is not finite.

    Reference:
      Daskalakis et al., "Training GANs with optimism", ICLR 2018, arXiv:1711.00141; the generalised form of Mokhtari,
      Ozdaglar and Pattathil, 2020, arXiv:1901.08511.
    """
    _checks.finite("alpha", alpha)
    _checks.finite("beta", beta)
    return Filter(
        A=0.0,
        B=1.0,
        C=lift(lambda b: -b, beta),
        D=on_first_step(alpha, lift(lambda a, b: a + b, alpha, beta)),
    )


def complex_heavy_ball(decay: Scalar, angle: Scalar) -> Filter:
    r"""Complex momentum: a heavy ball whose decay is $\beta e^{i\phi}$; the update is the real part.

    $$ z' = \beta e^{i\phi} z + g, \qquad u = \mathrm{Re}\, z' $$

    Two real velocities, Re z and Im z; a complex leaf keeps two complex ones. For games, where real momentum fails.

    Args:
      decay: beta in [0, 1].
      angle: phi in radians, finite.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Lorraine et al., "Complex momentum for optimization in games", AISTATS 2022, arXiv:2102.08431.
    """
    _checks.within("decay", decay, "[0, 1]")
    _checks.finite("angle", angle)
    # Euler's formula in operators only, so that it gives Python numbers for numbers and JAX values for tracers.
    real = lift(lambda b, phi: (b * math.e ** (1j * phi)).real, decay, angle)
    imag = lift(lambda b, phi: (b * math.e ** (1j * phi)).imag, decay, angle)
    minus_imag = lift(lambda x: -x, imag)
    return Filter(A=((real, minus_imag), (imag, real)), B=(1.0, 0.0), C=(real, minus_imag), D=1.0)
