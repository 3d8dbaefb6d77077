"""Look-ahead rules: Nesterov's method in its published forms and OGM, schedule-free averaging, NAdam's numerator."""

__all__ = ["nadam_mix", "nesterov", "optimized_gradient", "overshoot", "schedule_free", "torch_nesterov"]

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero, lift, on_first_step, table_lookup
from .after_optimizer import primal_averaging
from .arguments import AGE, checked_decay, step_number
from .tuned import synthesized_nesterov

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


def schedule_free(beta: Scalar = 0.9, *, warmup_steps: int = 0, weight_power: float = 2.0) -> Filter:
    r"""Schedule-free SGD, with the weights of its average under a warm-up of the learning rate.

    $$ z' = z - \eta g(y), \quad x' = (1 - c_t) x + c_t z', \quad y = (1-\beta) z + \beta x, \quad
       c_t = \frac{w_t}{\sum_{s \le t} w_s}, \quad w_t = \min\big(\tfrac{t+1}{T}, 1\big)^p $$

    t counts the steps from 0; without a warm-up c_t = 1/(t+1). It is `primal_averaging(1 - c_t, beta)`: the stored
    parameters are y, $v = (x - z)/\eta$, and `eval_params` gives x. Exact before a constant learning rate, and behind
    any, `optax.chain(optax.scale_by_learning_rate(schedule), scale_by_momentum(rule))`. The code weights by the largest
    learning rate so far: after a linear warm-up of T steps these are its weights, whatever follows.

    Args:
      beta: Interpolation in [0, 1]; 0 is Polyak-Ruppert averaging, 1 primal averaging.
      warmup_steps: T, a whole number of at least 0.
      weight_power: p, a number in [0, inf); 0 weights all steps alike. Without a warm-up it is not read.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `warmup_steps` is not a whole number, or `weight_power` not a number.

    Reference:
      Defazio et al., "The road less scheduled", NeurIPS 2024, arXiv:2405.15682; the weights of
      `optax.contrib.schedule_free_sgd`.
    """
    _checks.within("beta", beta, "[0, 1]")
    _checks.integer("warmup_steps", warmup_steps, 0)
    _checks.number("weight_power", weight_power, "[0, inf)")
    T = int(warmup_steps)

    def with_next(total: float, t: int) -> float:
        return 1 + total * math.pow(t / (t + 1), weight_power)

    # The sums of the weights so far, each over the last of them: the weights themselves may be too small for a float.
    sums = list(itertools.accumulate(range(1, T), with_next, initial=1.0))
    kept = [1 - 1 / total for total in sums]

    def keep(step: "Count") -> Any:
        # 1.0: an integer divided by an integer is float32 in JAX, whatever the leaf.
        late = 1 - 1.0 / ((sums[-1] if T else 0.0) + 1 + (step - T) * (step >= T))
        return late if T == 0 else (step >= T) * late + (step < T) * table_lookup(kept, step)

    return primal_averaging(keep, beta)


def overshoot(decay: Scalar = 0.9, overshoot: Scalar = 5.0) -> Filter:
    r"""Overshoot: gradients at parameters beyond the heavy ball's, by gamma times its last step.

    $$ m' = \mu m + g(y), \qquad \theta' = \theta - \eta m', \qquad y' = \theta' - \gamma^+ \eta m' $$

    The stored parameters are y, and `eval_params` gives theta. It is `synthesized_nesterov(decay, overshoot)`, and at
    gamma = mu Nesterov's method. Normal form: (1/(1-mu), mu, 1 - gamma (1-mu)/mu).

    Args:
      decay: mu in (-1, 1].
      overshoot: gamma, finite; plus marks the next step's value. The example of the code takes 5.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Kopal, Gregor, de Leon-Martinez and Simko, "Overshoot: taking advantage of future gradients in momentum-based
      stochastic optimization", 2025, arXiv:2501.09556, and its code, kinit-sk/overshoot.
    """
    _checks.finite("overshoot", overshoot)
    return synthesized_nesterov(decay, overshoot)


def optimized_gradient(steps: int) -> Filter:
    r"""The optimized gradient method (OGM), for a number of steps N that is known; learning rate 1/L.

    $$ x' = y - \eta g(y), \qquad
       y' = x' + \frac{\theta_t - 1}{\theta_{t+1}} (x' - x) + \frac{\theta_t}{\theta_{t+1}} (x' - y) $$

    $\theta_0 = 1$, $\theta_{t+1} = (1 + \sqrt{1 + 4\theta_t^2})/2$, $\theta_N = (1 + \sqrt{1 + 8\theta_{N-1}^2})/2$.
    The stored parameters are y, and the bound is theirs: after N steps the loss of a convex function is within
    $L \|y_0 - y^*\|^2/(2\theta_N^2)$ of the least, half of Nesterov's bound, and no method of gradients has a better
    one. The velocity is $(x - y)/\eta$, so that `eval_params` gives x. Coefficients depend on the global step; after
    step N they are those of $\theta_N$, under which directions of curvature L no longer contract.

    Args:
      steps: N, a whole number of at least 1; the rule holds a table of as many numbers.

    Raises:
      ValueError: If `steps` is below 1.
      TypeError: If `steps` is not a whole number.

    Reference:
      Kim and Fessler, "Optimized first-order methods for smooth convex minimization", Mathematical Programming 2016,
      arXiv:1406.5468; Drori, 2017, arXiv:1606.01424, for the lower bound.
    """
    _checks.integer("steps", steps, 1)
    theta = [1.0]
    for t in range(int(steps)):
        theta.append((1 + math.sqrt(1 + (4 if t < steps - 1 else 8) * theta[-1] ** 2)) / 2)
    pairs = [*itertools.pairwise(theta), (theta[-1], theta[-1])]
    return _two_momenta([(now - 1) / later for now, later in pairs], [now / later for now, later in pairs])


def _two_momenta(along: Sequence[float], back: Sequence[float]) -> Filter:
    """$x' = y - g$, $y' = x' + a (x' - x) + b (x' - y)$ at learning rate 1: tables of a and b, whose last entries stay.

    The velocity is x - y.
    """
    a = lift(lambda t: table_lookup(along, t), step_number)
    both = lift(lambda a, t: a + table_lookup(back, t), a, step_number)
    return Filter(A=a, B=both, C=a, D=lift(lambda s: 1 + s, both), lookahead=1.0)
