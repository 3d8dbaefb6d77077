"""Both players of the bilinear game use a rule; the simplest problem on which ordinary momentum does harm."""

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks
from ..filters import Filter
from .arguments import Floats, constant, reals
from .settling import largest


def bilinear_game(
    rule: Filter,
    learning_rate: ArrayLike,
    strength: ArrayLike = 1.0,
    *,
    alternating: bool = False,
    step: int | None = None,
) -> Floats:
    r"""The contraction per round of $\min_x \max_y s\,x y$ when both players use the rule.

    Simultaneous play is the loop of `spectral_radius` at the curvatures $\pm i s$. In alternating play y responds to
    the new x. Plain descent diverges in simultaneous play and circles in alternating play, where a negative decay
    contracts.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      learning_rate: In [0, inf), of both players; broadcasts against `strength`.
      strength: s, in (0, inf).
      alternating: Whether y's gradient is taken at the x of the same round.
      step: See `closed_loop`.

    Returns:
      float64 of the broadcast shape, the spectral radius of one round: above 1 the players spiral outwards.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, or a coefficient depends on the step and `step` is None.

    Reference:
      Gidel et al., AISTATS 2019, arXiv:1807.04740; Daskalakis et al., ICLR 2018, arXiv:1711.00141.
    """
    _checks.flag("alternating", alternating)
    A, B, C, D = constant(rule, step).matrices()
    eta, s = np.broadcast_arrays(
        reals("learning_rate", learning_rate, "[0, inf)"), reals("strength", strength, "(0, inf)")
    )
    K = len(B)
    d = K + 1
    own = np.eye(d)  # of (parameter, velocities), without the gradient
    own[1:, 1:] = A
    own = np.broadcast_to(own, (*eta.shape, d, d)).copy()
    own[..., 0, 1:] = -eta[..., None] * C
    # The change of a player's state per unit of gradient.
    push = np.empty((*eta.shape, d))
    push[..., 0], push[..., 1:] = -eta * D, B
    hears = (push * s[..., None])[..., :, None] * np.eye(d)[0]  # the gradient is +-s times the other's parameter
    x_moves = np.zeros((*eta.shape, 2 * d, 2 * d))
    x_moves[..., d:, d:] = np.eye(d)
    x_moves[..., :d, :d], x_moves[..., :d, d:] = own, hears
    y_moves = np.zeros_like(x_moves)
    y_moves[..., :d, :d] = np.eye(d)
    y_moves[..., d:, d:], y_moves[..., d:, :d] = own, -hears
    if alternating:
        one_round = y_moves @ x_moves
    else:
        one_round = np.concatenate([x_moves[..., :d, :], y_moves[..., d:, :]], axis=-2)
    return largest(one_round)[()]
