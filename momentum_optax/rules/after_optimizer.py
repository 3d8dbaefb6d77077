r"""Rules that sit behind an optimizer: averages and outer steps of the parameters that it moves.

Here g_t is the update of the optimizer, learning rate and sign included, as in
`optax.chain(optax.adam(schedule), scale_by_momentum(rule))`: a rule so placed sees what is really stepped, and is exact
under every schedule of the learning rate. Directly on gradients, before a constant learning rate, each of them is a
momentum method like the others.

Periods count the steps that the rule makes: those that `optax.MultiSteps` and `accumulated` put together count once,
those that `guarded` and `optax.apply_if_finite` leave out do not count, and a run that is resumed keeps its place.
"""

__all__ = ["ema_nesterov", "lookahead", "outer_nesterov", "primal_averaging"]

from typing import TYPE_CHECKING, Any

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Periodic, Scalar, lift, shifted
from .arguments import checked_decay

if TYPE_CHECKING:
    from .._typing import Count


def primal_averaging(mu_x: Scalar = 0.9967, mu_y: Scalar = 0.7) -> Filter:
    r"""Generalised primal averaging (GPA): gradients between the newest iterate and an average of all of them.

    $$ y = \mu_y x + (1 - \mu_y) z, \qquad z' = z - \eta g(y), \qquad x' = \mu_x x + (1 - \mu_x) z' $$

    The stored parameters are y and $v = (x - z)/\eta$: $v' = \mu_x (v + g)$, $u = g + \mu_y v - \mu_y^+ v'$, where plus
    marks the next step's value. `eval_params` gives x. With mu_x = 1 - 1/(t+1) it is `schedule_free`, with mu_y = mu_x
    Nesterov's step. Weight decay of the optimizer before it acts at y, as in the code. Normal form: (1, mu_x, mu_y).

    Args:
      mu_x: Share of the average that an iterate leaves, in [0, 1); the paper takes $.9^{1/H}$ in place of H steps
        between two outer steps, .9967 for 32.
      mu_y: Share of the average in the point where the gradient is taken, in [0, 1].

    Raises:
      ValueError: If a number is out of range.

    Reference:
      "Smoothing DiLoCo with primal averaging for faster training of LLMs", 2025, arXiv:2512.17131, and its code,
      facebookresearch/optimizers.
    """
    _checks.within("mu_x", mu_x, "[0, 1)")
    _checks.within("mu_y", mu_y, "[0, 1]")
    ahead = shifted(mu_y)
    return Filter(
        A=mu_x,
        B=mu_x,
        C=lift(lambda m, n, k: m - n * k, mu_y, ahead, mu_x),
        D=lift(lambda n, k: 1 - n * k, ahead, mu_x),
        lookahead=lift(lambda n: 1 - n, ahead),
    )


def ema_nesterov(decay: Scalar = 0.99, lookahead: Scalar = 0.6) -> Filter:
    r"""EMA-Nesterov: looks ahead along an average of the displacements.

    $$ y = \theta + b\, m, \qquad \theta' = y - \eta g(y), \qquad m' = c\, m + (1 - c)(\theta' - \theta) $$

    The stored parameters are y and $v = -m/\eta$: $v' = (c + (1-c) b) v + (1-c) g$, $u = g + b^+ v'$, where plus marks
    the next step's value. `eval_params` gives theta. Normal form: (1/(1-b), 1 - (1-c) (1-b), b), which is
    `primal_averaging(1 - (1-c)(1-b), b)` at the rate eta/(1-b).

    Args:
      decay: c in [0, 1).
      lookahead: b in [0, 1); the code scales it by the learning rate relative to its largest value.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      "EMA-Nesterov", 2026, arXiv:2605.25395, and its code in a record of modded-nanogpt (decay .99, lookahead .6).
    """
    checked_decay("decay", decay)
    _checks.within("lookahead", lookahead, "[0, 1)")
    ahead = shifted(lookahead)
    keep = lift(lambda c, b: c + (1 - c) * b, decay, lookahead)
    return Filter(
        A=keep,
        B=lift(lambda c: 1 - c, decay),
        C=lift(lambda n, k: n * k, ahead, keep),
        D=lift(lambda n, c: 1 + n * (1 - c), ahead, decay),
        lookahead=ahead,
    )


def outer_nesterov(period: int = 28, learning_rate: Scalar = 0.68, decay: Scalar = 0.37) -> Filter:
    r"""Outer Nesterov steps: SNOO, and MuLoCo and DiLoCo with one worker.

    Every k steps, at those where k divides t + 1, the displacement d of the last k steps becomes the gradient of a
    Nesterov step of the outer parameters, and the inner ones continue from there:

    $$ m' = \mu m + d, \qquad \theta_{outer}' = \theta_{outer} - \eta_{outer} (d + \mu m') $$

    Two velocities, the displacement since the last outer step and m. t counts all steps, also those of leaves without
    gradients. `eval_params` gives the outer parameters. With decay 0 it is `lookahead`.

    Args:
      period: k, a whole number of at least 1.
      learning_rate: eta_outer in (0, inf).
      decay: mu in [0, 1).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `period` is not a whole number.

    Reference:
      "SNOO: step-k Nesterov outer optimizer", 2025, arXiv:2510.15830 (28, .68, .37); its code begins with an outer step
      after the first step. Therien et al., "MuLoCo", 2025, arXiv:2505.23725 (30, .7, .5). Douillard et al., "DiLoCo",
      2023, arXiv:2311.08105.
    """
    meets = meeting(period)
    _checks.within("learning_rate", learning_rate, "(0, inf)")
    checked_decay("decay", decay)
    keep = lift(lambda e: 1 - e, meets)
    jump = lift(lambda e, r, mu: e * (r * (1 + mu) - 1), meets, learning_rate, decay)
    return Filter(
        A=((keep, 0.0), (meets, lift(lambda e, mu: 1 - e + e * mu, meets, decay))),
        B=(keep, meets),
        C=(jump, lift(lambda e, r, mu: e * r * mu * mu, meets, learning_rate, decay)),
        D=lift(lambda j: 1 + j, jump),
        lookahead=(1.0, 0.0),
    )


def lookahead(period: int = 5, step_size: Scalar = 0.5) -> Filter:
    r"""Lookahead: k steps forward, one step back.

    Every k steps, at those where k divides t + 1, the slow parameters move a share alpha of the way to the fast ones,
    and the fast ones continue from there: $\phi' = \phi + \alpha (\theta - \phi)$, $\theta' = \phi'$.

    The stored parameters are the fast ones and v is the sum of the updates since the last meeting; `eval_params` gives
    the slow ones. t counts all steps, also those of leaves without gradients. The optimizer's state is kept, as
    with `optax.lookahead(reset_state=False)`.

    Args:
      period: k, a whole number of at least 1.
      step_size: alpha in (0, 1].

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `period` is not a whole number.

    Reference:
      Zhang, Lucas, Hinton and Ba, "Lookahead optimizer: k steps forward, 1 step back", NeurIPS 2019, arXiv:1907.08610.
    """
    meets = meeting(period)
    _checks.within("step_size", step_size, "(0, 1]")
    keep = lift(lambda e: 1 - e, meets)
    jump = lift(lambda e, a: e * (a - 1), meets, step_size)
    return Filter(A=keep, B=keep, C=jump, D=lift(lambda j: 1 + j, jump), lookahead=1.0)


def meeting(period: int) -> Scalar:
    """The coefficient that is 1 at every step t of which t + 1 is a multiple of `period`, and 0 at the others."""
    _checks.integer("period", period, 1)
    period = int(period)

    def meets(step: "Count") -> Any:
        return 1.0 * ((step + 1) % period == 0)

    return Periodic(meets, period)
