"""Look-ahead rules: Nesterov's method in its published forms, schedule-free averaging, NAdam's numerator."""

__all__ = ["nadam_mix", "nesterov", "schedule_free", "torch_nesterov"]

from typing import TYPE_CHECKING, Any

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift, on_first_step, shifted, table_lookup
from .arguments import AGE, checked_decay, step_number

if TYPE_CHECKING:
    from .._typing import Count
    from ..filters.coefficients import Coefficient


def nesterov(decay: Scalar) -> Filter:
    r"""Nesterov's accelerated gradient, exact for any schedule of the momentum.

    $$ v' = \mu_t (v + g), \qquad u = v' + g $$

    The stored parameters are the look-ahead point $y_t$ of $x_{t+1} = y_t - \alpha g(y_t)$,
    $y_{t+1} = x_{t+1} + \mu_t (x_{t+1} - x_t)$, and $-\alpha v$ is the displacement $y - x$: `eval_params` gives x.
    `torch_nesterov` agrees at a constant decay only. Normal form: (1/(1-mu), mu, mu).

    Args:
      decay: mu in [0, 1]; see `schedules.fista`, `schedules.nesterov_convex` and `schedules.sutskever`.

    Raises:
      ValueError: If `decay` is a number out of range.

    Reference:
      Nesterov, 1983. Sutskever et al., "On the importance of initialization and momentum in deep learning",
      ICML 2013 (give the schedule as mu_{t+1} at step t). Beck and Teboulle, "FISTA", SIAM J. Imaging Sci. 2009.
    """
    _checks.within("decay", decay, "[0, 1]")
    return Filter(A=decay, B=decay, C=decay, D=lift(lambda mu: 1 + mu, decay), lookahead=1.0)


def torch_nesterov(decay: Scalar, *, dampening: Scalar = 0.0) -> Filter:
    r"""The Nesterov form of PyTorch and Optax.

    $$ v' = \mu v + (1 - \tau) g, \qquad u = g + \mu v' $$

    At a constant decay and without dampening it is `nesterov`; under a schedule it is a different rule, provided for
    parity with those libraries. The evaluation point assumes a constant decay. Normal form: (1/(1-mu), mu, mu).

    Args:
      decay: mu in [0, 1].
      dampening: tau in [0, 1); the first gradient that a leaf receives enters undampened. PyTorch's constructor
        requires 0 here, its arithmetic does not.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      `torch.optim.SGD(nesterov=True)`, `optax.trace(nesterov=True)`.
    """
    _checks.within("decay", decay, "[0, 1]")
    _checks.within("dampening", dampening, "[0, 1)")
    intake: Coefficient = lift(lambda tau: 1 - tau, dampening)
    if not is_zero(dampening):
        intake = on_first_step(1.0, intake)
    return Filter(
        A=decay,
        B=intake,
        C=lift(lambda mu: mu * mu, decay),
        D=lift(lambda mu, b: 1 + mu * b, decay, intake),
        lookahead=decay,
    )


def nadam_mix(decay: Scalar = 0.9, psi: float = 0.004) -> Filter:
    r"""The numerator of NAdam, with NAdam's momentum schedule; t counts the leaf's gradients from 1.

    $$ \mu_t = \beta (1 - \tfrac12 0.96^{\psi t}), \quad m' = \beta m + (1-\beta) g, \quad
       u_t = \frac{\mu_{t+1} m'}{1 - \prod_{i \le t+1} \mu_i} + \frac{(1-\mu_t) g}{1 - \prod_{i \le t} \mu_i} $$

    The products are $\beta^t$ times a short table of constants, so no state is needed.

    Args:
      decay: beta in [0, 1), a number or a scalar array, since the rule schedules it.
      psi: The paper's momentum decay, a number in (0, inf).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is a schedule, or `psi` is not a number.

    Reference:
      Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016; the form of `torch.optim.NAdam`.
    """
    if _checks.is_schedule(decay):
        raise TypeError("decay must be a number or a scalar array, got a schedule: NAdam has its own")
    checked_decay("decay", decay)
    _checks.number("psi", psi, "(0, inf)")
    q = 0.96**psi
    factors = [1.0]
    # Past these the product is zero, or no longer changes, in float64.
    while factors[-1] > 1e-20 and q ** (len(factors) - 1) > 1e-20:
        factors.append(factors[-1] * (1 - 0.5 * q ** len(factors)))

    def mu(b: float, t: "Count") -> Any:
        return b * (1 - 0.5 * q**t)

    def product(b: float, t: "Count") -> Any:
        return b**t * table_lookup(factors, t)

    average = lift(lambda b, age: mu(b, age + 2) / (1 - product(b, age + 2)), decay, AGE)
    direct = lift(lambda b, age: (1 - mu(b, age + 1)) / (1 - product(b, age + 1)), decay, AGE)
    return Filter(
        A=decay,
        B=lift(lambda b: 1 - b, decay),
        C=lift(lambda a, b: a * b, average, decay),
        D=lift(lambda a, d, b: a * (1 - b) + d, average, direct, decay),
    )


def schedule_free(beta: Scalar = 0.9) -> Filter:
    r"""Schedule-free SGD at a constant learning rate.

    $$ z' = z - \eta g(y), \quad x' = (1 - c) x + c z', \quad y = (1-\beta) z + \beta x, \quad c = \tfrac{1}{t+1} $$

    t counts the steps from 0. With $v = (x - z)/\eta$: $v' = (1-c)(v + g)$, $u = g + \beta v - \beta^+ v'$, where plus
    marks the next step's value. The stored parameters are y; `eval_params` gives x. Exact at a constant learning rate;
    `optax.contrib.schedule_free` weights the average by a learning rate that changes.

    Args:
      beta: Interpolation in [0, 1]; 0 is Polyak-Ruppert averaging, 1 primal averaging.

    Raises:
      ValueError: If `beta` is a number out of range.

    Reference:
      Defazio et al., "The road less scheduled", NeurIPS 2024, arXiv:2405.15682.
    """
    _checks.within("beta", beta, "[0, 1]")
    # 1.0: an integer divided by an integer is float32 in JAX, whatever the leaf.
    keep = lift(lambda t: 1 - 1.0 / (t + 1), step_number)
    ahead = shifted(beta)
    return Filter(
        A=keep,
        B=keep,
        C=lift(lambda b, n, k: b - n * k, beta, ahead, keep),
        D=lift(lambda n, k: 1 - n * k, ahead, keep),
        lookahead=lift(lambda n: 1 - n, ahead),
    )
