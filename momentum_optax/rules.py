r"""The catalogue: every published linear momentum rule, as coefficients of one `Filter`.

Each function names the published form that it is. In the formulas g_t is the gradient at the stored parameters and
u_t the update; the parameters then move by -learning_rate u_t. Velocities start at zero; primes mark the value after
the step. "Normal form" gives (scale, decay, nu) such that the rule is `quasi_hyperbolic(decay, nu).scale(scale)`;
`Filter.normal_form` computes it, and `quasi_hyperbolic(decay, nu).scale(scale)` goes back.

Every argument that is named in a formula may be a number, a scalar array (traced too) or a schedule of the step,
unless its own text says otherwise. Numbers are range-checked here, with `ValueError`; what is no scalar at all raises
`TypeError`. Arrays and schedules are not checked. The decay of a sum, such as the heavy ball's, may be 1: nothing is
forgotten. That of an average may not: the gradient would have weight 0. Velocities have the parameters' shapes, updates
the gradients' dtypes; accumulation is in float32, or wider where the leaf is (see `scale_by_momentum`).
"""

import math
from typing import Any

from . import checks
from .coefficients import ByAge, Coefficient, Scalar, at_first, is_zero, lift, look_up, next_step
from .filters import Filter


def heavy_ball(decay: Scalar, *, dampening: Scalar = 0.0, first_step: str = "zero") -> Filter:
    r"""Heavy ball, the classical momentum: a decaying sum of gradients.

    $$ v' = \mu v + (1 - \tau) g, \qquad u = v' $$

    At a constant learning rate this is Polyak's $x_{t+1} = x_t - \alpha g_t + \mu (x_t - x_{t-1})$. A negative decay
    is the negative momentum of Gidel et al. for games. Normal form for dampening 0: (1/(1-mu), mu, 1).

    Args:
      decay: mu in (-1, 1].
      dampening: tau in [0, 1).
      first_step: `"zero"` starts from velocity zero; `"gradient"` is PyTorch's rule, in which the first gradient that a
        leaf receives becomes its velocity undampened. Without dampening both are the same.

    Raises:
      ValueError: If a number is out of range or `first_step` is another word.

    Reference:
      Polyak, "Some methods of speeding up the convergence of iteration methods", 1964. Gidel et al., "Negative
      momentum for improved game dynamics", AISTATS 2019, arXiv:1807.04740.
    """
    checks.within("decay", decay, "(-1, 1]")
    checks.within("dampening", dampening, "[0, 1)")
    checks.choice("first_step", first_step, ("zero", "gradient"))
    intake = lift(lambda tau: 1 - tau, dampening)
    if first_step == "gradient" and not is_zero(dampening):
        intake = at_first(1.0, intake)
    return Filter(A=decay, B=intake, C=decay, D=intake)


def ema(decay: Scalar) -> Filter:
    r"""The exponentially weighted moving average of the gradients: $v' = \beta v + (1 - \beta) g$, $u = v'$.

    Not debiased; `scale_by_momentum(..., debias=True)` does that, exactly under any schedule.
    Normal form: (1, beta, 1).

    Args:
      decay: beta in [0, 1); the mean lag is beta/(1-beta) steps.

    Raises:
      ValueError: If `decay` is a number out of range.

    Reference:
      The first moment of Kingma and Ba, "Adam", ICLR 2015, arXiv:1412.6980.
    """
    intake = lift(lambda b: 1 - b, _checked("decay", decay))
    return Filter(A=decay, B=intake, C=decay, D=intake)


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
    checks.within("decay", decay, "[0, 1]")
    return Filter(A=decay, B=decay, C=decay, D=lift(lambda mu: 1 + mu, decay), lookahead=1.0)


def torch_nesterov(decay: Scalar, *, dampening: Scalar = 0.0) -> Filter:
    r"""The Nesterov form of PyTorch and Optax.

    $$ v' = \mu v + (1 - \tau) g, \qquad u = g + \mu v' $$

    At a constant decay and without dampening it is `nesterov`; under a schedule it is a different rule, kept for parity
    with those libraries. The evaluation point is that of a constant decay. Normal form: (1/(1-mu), mu, mu).

    Args:
      decay: mu in [0, 1].
      dampening: tau in [0, 1); the first gradient that a leaf receives enters undampened. PyTorch's constructor wants 0
        here, its arithmetic does not.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      `torch.optim.SGD(nesterov=True)`, `optax.trace(nesterov=True)`.
    """
    checks.within("decay", decay, "[0, 1]")
    checks.within("dampening", dampening, "[0, 1)")
    intake = lift(lambda tau: 1 - tau, dampening)
    if not is_zero(dampening):
        intake = at_first(1.0, intake)
    return Filter(
        A=decay,
        B=intake,
        C=lift(lambda mu: mu * mu, decay),
        D=lift(lambda mu, b: 1 + mu * b, decay, intake),
        lookahead=decay,
    )


def quasi_hyperbolic(decay: Scalar, nu: Scalar) -> Filter:
    r"""Quasi-hyperbolic momentum (QHM): an average, with the raw gradient mixed back in.

    $$ v' = \beta v + (1 - \beta) g, \qquad u = (1 - \nu) g + \nu v' $$

    The gain at zero frequency is one, so the learning rate keeps its meaning. Every rule of order one with a non-zero
    pole and gain is this rule times a number: it is the normal form (1, beta, nu) of the others.

    Args:
      decay: beta in (-1, 1); the paper's are not negative, the normal forms of some heavy balls are.
      nu: Share of the average, finite; 0 is plain descent, 1 the average, beta Nesterov's step.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Ma and Yarats, "Quasi-hyperbolic momentum and Adam for deep learning", ICLR 2019, arXiv:1810.06801.
    """
    checks.within("decay", decay, "(-1, 1)")
    checks.finite("nu", nu)
    return Filter(
        A=decay,
        B=lift(lambda b: 1 - b, decay),
        C=lift(lambda b, n: n * b, decay, nu),
        D=lift(lambda b, n: 1 - n + n * (1 - b), decay, nu),
    )


def aggregated(decays: tuple[Scalar, ...] = (0.0, 0.9, 0.99)) -> Filter:
    r"""Aggregated momentum (AggMo): the mean of K heavy balls.

    $$ v_i' = \beta_i v_i + g, \qquad u = \frac{1}{K} \sum_i v_i' $$

    A velocity whose decay is the number 0 is not stored.

    Args:
      decays: K values beta_i in [0, 1].

    Raises:
      ValueError: If `decays` is empty or a number is out of range.
      TypeError: If `decays` is no tuple or list.

    Reference:
      Lucas et al., "Aggregated momentum: stability through passive damping", ICLR 2019, arXiv:1804.00325.
    """
    if not isinstance(decays, tuple | list):
        raise TypeError(f"decays must be a tuple or list of decays, got {checks.shown(decays)}")
    if not decays:
        raise ValueError("decays must have at least one entry, got none")
    for i, decay in enumerate(decays):
        checks.within(f"decays[{i}]", decay, "[0, 1]")
    K = len(decays)
    return Filter(A=_diagonal(*decays), B=(1.0,) * K, C=tuple(lift(lambda b: b / K, decay) for decay in decays), D=1.0)


def aggregated_exponential(base: Scalar = 0.1, count: int = 3) -> Filter:
    r"""AggMo with decays $\beta_i = 1 - a^i$, $i = 0, \ldots, K - 1$: its exponential parameterisation.

    Args:
      base: a in (0, 1); 0.1 and 3 give 0, 0.9, 0.99.
      count: K, a whole number of at least 1.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `count` is no whole number.

    Reference:
      Lucas et al., ICLR 2019, arXiv:1804.00325, section 4.
    """
    checks.within("base", base, "(0, 1)")
    checks.integer("count", count, 1)
    return aggregated((0.0, *(lift(lambda a, i=i: 1 - a**i, base) for i in range(1, int(count)))))


def double_ema(fast: Scalar = 0.9, slow: Scalar = 0.9999, alpha: Scalar = 5.0) -> Filter:
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
    _checked("fast", fast)
    _checked("slow", slow)
    checks.within("alpha", alpha, "[0, inf)")
    weight = lift(lambda b, t: 1 / (1 - b ** (t + 1)), fast, _AGE)
    return Filter(
        A=_diagonal(fast, slow),
        B=(lift(lambda b: 1 - b, fast), lift(lambda b: 1 - b, slow)),
        C=(lift(lambda w, b: w * b, weight, fast), lift(lambda a, b: a * b, alpha, slow)),
        D=lift(lambda w, b, a, s: w * (1 - b) + a * (1 - s), weight, fast, alpha, slow),
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
    checks.within("decay", decay, "[0, 1]")
    checks.within("alpha", alpha, "[0, inf)")
    return Filter(A=decay, B=1.0, C=decay, D=lift(lambda a: 1 + a, alpha))


def synthesized_nesterov(decay: Scalar, lookahead: Scalar) -> Filter:
    r"""The synthesised Nesterov variants: gradient at a look-ahead point of its own length.

    $$ x_{t+1} = x_t + \beta_1 p_t - \alpha g(y_t), \quad p_t = x_t - x_{t-1}, \quad y_t = x_t + \beta_2 p_t $$

    The learning rate is alpha and the stored parameters are y; with $p = -\alpha v$, $v' = \beta_1 v + g$ and
    $u = (1 + \beta_2^+) v' - \beta_2 v$, where plus marks the next step's value. beta_2 = 0 is the heavy ball,
    beta_2 = beta_1 Nesterov. Normal form: (1/(1-b1), b1, 1 - b2 (1-b1)/b1).

    Args:
      decay: beta_1 in (-1, 1].
      lookahead: beta_2, finite.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Lessard, Recht and Packard, SIAM J. Optim. 2016, arXiv:1408.3595, section 3.
    """
    checks.within("decay", decay, "(-1, 1]")
    checks.finite("lookahead", lookahead)
    ahead = next_step(lookahead)
    return Filter(
        A=decay,
        B=1.0,
        C=lift(lambda b1, b2, n2: (1 + n2) * b1 - b2, decay, lookahead, ahead),
        D=lift(lambda n2: 1 + n2, ahead),
        # The velocity after step t and the point y of step t + 1 belong together.
        lookahead=ahead,
    )


def triple_momentum(L: Scalar, mu: Scalar) -> Filter:
    r"""The triple momentum method, the fastest known rule for smooth strongly convex functions; learning rate 1.

    With $\rho = 1 - \sqrt{\mu/L}$ it is `synthesized_nesterov` for $\alpha = (1+\rho)/L$,
    $\beta = \rho^2/(2-\rho)$, $\gamma = \rho^2/((1+\rho)(2-\rho))$. The point to evaluate at is
    $x + \delta p$, $\delta = \rho^2/(1-\rho^2)$: `eval_params` gives it. The error contracts by rho per step.
    Normal form: (alpha/(1-beta), beta, (rho+beta)/(1+rho)).

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      ValueError: If a number is out of range, or mu is not below L.

    Reference:
      Van Scoy, Freeman and Lynch, "The fastest known globally convergent first-order method for minimizing strongly
      convex functions", IEEE Control Systems Letters 2018.
    """
    _curvatures(L, mu)
    rho = lift(lambda big, small: 1 - (small / big) ** 0.5, L, mu)
    alpha = lift(lambda r, big: (1 + r) / big, rho, L)
    gamma = lift(lambda r: r**2 / ((1 + r) * (2 - r)), rho)
    rule = _rate_inside(synthesized_nesterov(lift(lambda r: r**2 / (2 - r), rho), gamma), alpha)
    output = next_step(lift(lambda r, c: c - r**2 / (1 - r**2), rho, gamma))
    return Filter(rule.A, rule.B, rule.C, rule.D, lookahead=output)


def robust_momentum(L: Scalar, mu: Scalar, rho: "Scalar | None" = None) -> Filter:
    r"""The robust momentum method: trades speed for tolerance of gradient noise; learning rate 1.

    With $\kappa = L/\mu$ it is `synthesized_nesterov` for $\alpha = \kappa (1-\rho)^2 (1+\rho)/L$,
    $\beta = \kappa\rho^3/(\kappa - 1)$, $\gamma = \rho^3/((\kappa-1)(1-\rho)^2(1+\rho))$. The least rho gives the
    triple momentum method's iterates, the largest plain descent at rate 1/L.
    Normal form: (alpha/(1-beta), beta, 1 - gamma (1-beta)/beta).

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).
      rho: Contraction per step, in [1 - sqrt(mu/L), 1 - mu/L]; the lower end if None.

    Raises:
      ValueError: If a number is out of range, or mu is not below L.

    Reference:
      Cyrus, Hu, Van Scoy and Lessard, "A robust accelerated optimization algorithm for strongly convex functions",
      ACC 2018, arXiv:1710.04753.
    """
    _curvatures(L, mu)
    if rho is None:
        rho = lift(lambda big, small: 1 - (small / big) ** 0.5, L, mu)
    elif checks.is_number(L) and checks.is_number(mu):
        # The ends are allowed, whatever the last bit of the caller's own square root.
        checks.within("rho", rho, f"[{(1 - math.sqrt(mu / L)) * (1 - 1e-12)}, {(1 - mu / L) * (1 + 1e-12)}]")
    else:
        checks.within("rho", rho, "(0, 1)")
    kappa = lift(lambda big, small: big / small, L, mu)
    decay = lift(lambda k, r: k * r**3 / (k - 1), kappa, rho)
    gamma = lift(lambda k, r: r**3 / ((k - 1) * (1 - r) ** 2 * (1 + r)), kappa, rho)
    alpha = lift(lambda k, r, big: k * (1 - r) ** 2 * (1 + r) / big, kappa, rho, L)
    return _rate_inside(synthesized_nesterov(decay, gamma), alpha)


def accelerated(kappa: Scalar = 1000.0, xi: Scalar = 10.0, epsilon: Scalar = 0.7) -> Filter:
    r"""Accelerated SGD (AccSGD, ASGD): a short and a long step, coupled.

    With $b = \epsilon^2\xi/\kappa$ and $\zeta = \epsilon/(\epsilon + b)$ the reference code keeps a long-step
    average w, $w' = (1-b) w + b (x - \alpha(\kappa/\epsilon) g)$ and $x' = \zeta (x - \alpha g) + (1-\zeta) w'$, from
    $w_0 = x_0$.
    Here $v = (x - w)/\alpha$. Normal form: (eps (1+xi)/(1+eps), (kappa - eps^2 xi)/(kappa + eps xi),
    (eps xi - 1)/(eps (1+xi))).

    Args:
      kappa: Ratio of the long to the short step ("long step"), in [1, inf).
      xi: Statistical advantage, in [1, inf); the paper wants at most sqrt(kappa).
      epsilon: The paper's small constant, in (0, 1].

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Kidambi et al., "On the insufficiency of existing momentum schemes for stochastic optimization", ICLR 2018,
      arXiv:1803.05591. Jain et al., "Accelerating stochastic gradient descent", COLT 2018, arXiv:1704.08227.
    """
    checks.within("kappa", kappa, "[1, inf)")
    checks.within("xi", xi, "[1, inf)")
    checks.within("epsilon", epsilon, "(0, 1]")
    b = lift(lambda e, x, k: e**2 * x / k, epsilon, xi, kappa)
    zeta = lift(lambda e, b: e / (e + b), epsilon, b)
    gain = lift(lambda e, x: e * x, epsilon, xi)
    return Filter(
        A=lift(lambda z, b: z * (1 - b), zeta, b),
        B=lift(lambda z, h: z * (h - 1), zeta, gain),
        C=lift(lambda e, b: b / (e + b) * (1 - b), epsilon, b),
        D=lift(lambda z, h: h - z * (h - 1), zeta, gain),
    )


def mass(alpha: Scalar = 0.05, kappa: Scalar = 12.0) -> Filter:
    r"""MaSS, momentum-added stochastic solver: Nesterov with a compensation for over-parametrised models.

    $$ w' = x - \eta g, \quad z' = (1-\alpha) z + \alpha x - \frac{\eta}{\alpha\kappa} g, \quad
       x' = \frac{\alpha z' + w'}{1 + \alpha} $$

    x are the stored parameters, eta the learning rate, and $v = (x - z)/\eta$; `eval_params` gives w.
    Normal form: (s, (1-alpha)/(1+alpha), 1 - 1/s), s = (1 + 1/(alpha kappa))/2.

    Args:
      alpha: In (0, 1).
      kappa: The paper's modified condition number, in [1, inf).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Liu and Belkin, "Accelerating SGD with momentum for over-parameterized learning", ICLR 2020, arXiv:1810.13395.
    """
    checks.within("alpha", alpha, "(0, 1)")
    checks.within("kappa", kappa, "[1, inf)")
    gain = lift(lambda a, k: (1 + 1 / k) / (1 + a), alpha, kappa)
    return Filter(
        A=lift(lambda a: (1 - a) / (1 + a), alpha),
        B=lift(lambda a, k, d: 1 / (a * k) - d, alpha, kappa, gain),
        C=lift(lambda a: a * (1 - a) / (1 + a), alpha),
        D=gain,
        lookahead=alpha,
    )


def pid(proportional: Scalar, integral: Scalar, derivative: Scalar, decay: Scalar) -> Filter:
    r"""A PID controller on the negative gradient, its derivative filtered by a pole of its own; learning rate 1.

    $$ \theta_{t+1} = \theta_0 + k_P e_t + k_I \sum_{s \le t} e_s + k_D w_t, \quad e = -g, \quad
       w_t = \beta w_{t-1} + (1-\beta)(e_t - e_{t-1}) $$

    in its incremental form, which is what scheduled gains mean here: the gains of the step multiply the increments.
    Order 2. `recht_pid` is the case that quasi-hyperbolic momentum can express.

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
        checks.finite(name, value)
    _checked("decay", decay)
    intake = lift(lambda b: 1 - b, decay)
    rate = lift(lambda d, b: d * (1 - b), derivative, decay)
    return Filter(
        A=((0.0, 0.0), (lift(lambda b: b - 1, decay), decay)),
        B=(1.0, intake),
        C=(lift(lambda p, r: -p - r, proportional, rate), lift(lambda r: -r, rate)),
        D=lift(lambda p, i, r: p + i + r, proportional, integral, rate),
    )


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
    checks.within("proportional", proportional, "(-inf, 0)")
    checks.within("integral", integral, "(0, inf)")
    checks.within("derivative", derivative, "(0, inf)")
    decay = lift(lambda p, d: d / (d - p), proportional, derivative)
    nu = lift(lambda p, i, d: p**2 / (i * d), proportional, integral, derivative)
    return quasi_hyperbolic(decay, nu).scale(integral)


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
    checks.finite("alpha", alpha)
    checks.finite("beta", beta)
    return Filter(
        A=0.0,
        B=1.0,
        C=lift(lambda b: -b, beta),
        D=at_first(alpha, lift(lambda a, b: a + b, alpha, beta)),
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
    checks.within("decay", decay, "[0, 1]")
    checks.finite("angle", angle)
    # Euler's formula by operators alone, so that numbers stay Python's and tracers stay JAX's.
    real = lift(lambda b, phi: (b * math.e ** (1j * phi)).real, decay, angle)
    imag = lift(lambda b, phi: (b * math.e ** (1j * phi)).imag, decay, angle)
    minus_imag = lift(lambda x: -x, imag)
    return Filter(A=((real, minus_imag), (imag, real)), B=(1.0, 0.0), C=(real, minus_imag), D=1.0)


def lion_mix(b1: Scalar = 0.9, b2: Scalar = 0.99) -> Filter:
    r"""What Lion takes the sign of: $u = \beta_1 v + (1 - \beta_1) g$, $v' = \beta_2 v + (1 - \beta_2) g$.

    Lion's direction is `optax.chain(scale_by_momentum(lion_mix()), optax.scale_by_sign())`. Normal form:
    (1, b2, b1/b2).

    Args:
      b1: beta_1 in [0, 1), the mix.
      b2: beta_2 in [0, 1), the memory.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, arXiv:2302.06675.
    """
    _checked("b1", b1)
    _checked("b2", b2)
    return Filter(A=b2, B=lift(lambda b: 1 - b, b2), C=b1, D=lift(lambda b: 1 - b, b1))


def muon_mix(decay: Scalar = 0.95) -> Filter:
    r"""What Muon orthogonalises: $v' = \beta v + (1-\beta) g$, $u = \beta v' + (1-\beta) g$.

    The reference implementation's Nesterov form; Optax's Muon also debiases both terms. Normal form: (1, beta, beta).

    Args:
      decay: beta in [0, 1).

    Raises:
      ValueError: If `decay` is a number out of range.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    _checked("decay", decay)
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
    _checked("decay", decay)
    checks.within("amplification", amplification, "[0, inf)")
    return Filter(
        A=decay,
        B=at_first(1.0, lift(lambda a: 1 - a, decay)),
        C=lift(lambda a, w: w * a, decay, amplification),
        D=at_first(lift(lambda w: 1 + w, amplification), lift(lambda a, w: 1 + w * (1 - a), decay, amplification)),
    )


def grokfast_average(window: int = 100, amplification: Scalar = 5.0) -> Filter:
    r"""Grokfast-MA: the gradient plus lambda times the mean of the last w gradients, once there are w of them.

    A finite filter: its w - 1 velocities are the past gradients, so it costs w - 1 times the parameters in memory.

    Args:
      window: w, a whole number of at least 2.
      amplification: lambda in [0, inf).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If `window` is no whole number.

    Reference:
      Lee et al., 2024, arXiv:2405.20233 (the moving-average form, with its warm-up).
    """
    checks.integer("window", window, 2)
    checks.within("amplification", amplification, "[0, inf)")
    K = int(window) - 1
    weight = lift(lambda w, age: w / (K + 1) * (age >= K), amplification, _AGE)
    return Filter(
        A=tuple(tuple(float(j == i - 1) for j in range(K)) for i in range(K)),
        B=(1.0,) + (0.0,) * (K - 1),
        C=(weight,) * K,
        D=lift(lambda x: 1 + x, weight),
    )


def mars(decay: Scalar = 0.95, gamma: Scalar = 0.025) -> Filter:
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
    _checked("decay", decay)
    checks.finite("gamma", gamma)
    ahead = next_step(decay)
    gain = lift(lambda b, c: 1 - b + c * b, decay, gamma)
    return Filter(A=ahead, B=lift(lambda b, d, c: b * (d - c), ahead, gain, next_step(gamma)), C=1.0, D=gain)


def nadam_mix(decay: Scalar = 0.9, psi: float = 0.004) -> Filter:
    r"""The numerator of NAdam, with its own momentum schedule; t counts the leaf's gradients from 1.

    $$ \mu_t = \beta (1 - \tfrac12 0.96^{\psi t}), \quad m' = \beta m + (1-\beta) g, \quad
       u_t = \frac{\mu_{t+1} m'}{1 - \prod_{i \le t+1} \mu_i} + \frac{(1-\mu_t) g}{1 - \prod_{i \le t} \mu_i} $$

    The products are $\beta^t$ times a short table, so no state is needed.

    Args:
      decay: beta in [0, 1), a number or a scalar array; the rule has its own schedule.
      psi: The paper's momentum decay, a number in (0, inf).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is a schedule, or `psi` is no number.

    Reference:
      Dozat, "Incorporating Nesterov momentum into Adam", ICLR workshop 2016; the form of `torch.optim.NAdam`.
    """
    if checks.is_schedule(decay):
        raise TypeError("decay must be a number or a scalar array, got a schedule: NAdam has its own")
    _checked("decay", decay)
    checks.number("psi", psi, "(0, inf)")
    q = 0.96**psi
    factors = [1.0]
    # Past these the product is zero, or no longer changes, in float64.
    while factors[-1] > 1e-20 and q ** (len(factors) - 1) > 1e-20:
        factors.append(factors[-1] * (1 - 0.5 * q ** len(factors)))

    def mu(b: Any, t: Any) -> Any:
        return b * (1 - 0.5 * q**t)

    def product(b: Any, t: Any) -> Any:
        return b**t * look_up(factors, t)

    average = lift(lambda b, age: mu(b, age + 2) / (1 - product(b, age + 2)), decay, _AGE)
    direct = lift(lambda b, age: (1 - mu(b, age + 1)) / (1 - product(b, age + 1)), decay, _AGE)
    return Filter(
        A=decay,
        B=lift(lambda b: 1 - b, decay),
        C=lift(lambda a, b: a * b, average, decay),
        D=lift(lambda a, d, b: a * (1 - b) + d, average, direct, decay),
    )


def adan_mix(b1: Scalar = 0.98, b2: Scalar = 0.92) -> Filter:
    r"""The numerator of Adan, not debiased: $u = m' + \beta_2 d'$ with averages of the gradient and of its change.

    $$ m' = \beta_1 m + (1-\beta_1) g, \qquad d'_t = \beta_2 d_t + (1-\beta_2)(g_t - g_{t-1}), \qquad g_{-1} = g_0 $$

    The change needs no stored gradient: $w_t = \beta_2 d_t - (1-\beta_2) g_{t-1}$, with the step's own beta_2, is
    enough.

    Args:
      b1: beta_1 in [0, 1), the code's convention (the paper writes 1 - beta).
      b2: beta_2 in [0, 1).

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Xie et al., "Adan: adaptive Nesterov momentum algorithm for faster optimizing deep models", TPAMI 2024,
      arXiv:2208.06677.
    """
    _checked("b1", b1)
    _checked("b2", b2)
    ahead = next_step(b2)
    a1 = lift(lambda b: 1 - b, b1)
    return Filter(
        A=_diagonal(b1, ahead),
        B=(a1, at_first(lift(lambda n: n - 1, ahead), lift(lambda b, n: n * (1 - b) + n - 1, b2, ahead))),
        C=(b1, b2),
        D=at_first(a1, lift(lambda a, b: a + b * (1 - b), a1, b2)),
    )


def chebyshev(L: Scalar, mu: Scalar) -> Filter:
    r"""Chebyshev's semi-iteration as a time-varying heavy ball: optimal on quadratics; learning rate 1.

    With $q = (\sqrt\kappa - 1)/(\sqrt\kappa + 1)$, $s = (L+\mu)/(L-\mu)$, $r_t = q (1+q^{2t})/(1+q^{2t+2})$:
    $v' = a_t v + b_t g$, $u = v'$, $a_t = 2 s r_t - 1$, $b_t = 4 r_t/(L-\mu)$, and $a_0 = 0$, $b_0 = 2/(L+\mu)$.
    After T steps the error on a quadratic is at most $2 q^T/(1+q^{2T})$ of the start, and no method does better.
    The coefficients follow the global step.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      ValueError: If a number is out of range, or mu is not below L.

    Reference:
      Golub and Varga, Numerische Mathematik 1961; d'Aspremont, Scieur and Taylor, "Acceleration methods", 2021,
      arXiv:2101.09545, section 2.
    """
    _curvatures(L, mu)
    q = lift(lambda big, small: ((big / small) ** 0.5 - 1) / ((big / small) ** 0.5 + 1), L, mu)
    r = lift(lambda q, t: q * (1 + q ** (2 * t)) / (1 + q ** (2 * t + 2)), q, _step)
    decay = lift(lambda r, big, small, t: (t > 0) * (2 * (big + small) / (big - small) * r - 1), r, L, mu, _step)
    # At t = 0 the formula for t > 0 gives twice the first coefficient.
    intake = lift(lambda r, big, small, t: (1 - 0.5 * (t == 0)) * 4 * r / (big - small), r, L, mu, _step)
    return Filter(A=decay, B=intake, C=decay, D=intake)


def schedule_free(beta: Scalar = 0.9) -> Filter:
    r"""Schedule-free SGD at a constant learning rate, as the filter that it is.

    $$ z' = z - \eta g(y), \quad x' = (1 - c) x + c z', \quad y = (1-\beta) z + \beta x, \quad c = \tfrac{1}{t+1} $$

    t counts the steps from 0. With $v = (x - z)/\eta$: $v' = (1-c)(v + g)$, $u = g + \beta v - \beta^+ v'$, where plus
    marks the next step's value. The stored parameters are y; `eval_params` gives x. Exact at a constant learning rate;
    `optax.contrib.schedule_free` weighs by the rate where it changes.

    Args:
      beta: Interpolation in [0, 1]; 0 is Polyak-Ruppert averaging, 1 primal averaging.

    Raises:
      ValueError: If `beta` is a number out of range.

    Reference:
      Defazio et al., "The road less scheduled", NeurIPS 2024, arXiv:2405.15682.
    """
    checks.within("beta", beta, "[0, 1]")
    # 1.0: an integer divided by an integer is float32 in JAX, whatever the leaf.
    keep = lift(lambda t: 1 - 1.0 / (t + 1), _step)
    ahead = next_step(beta)
    return Filter(
        A=keep,
        B=keep,
        C=lift(lambda b, n, k: b - n * k, beta, ahead, keep),
        D=lift(lambda n, k: 1 - n * k, ahead, keep),
        lookahead=lift(lambda n: 1 - n, ahead),
    )


_AGE = ByAge(lambda step, age: age)


def _step(step: Any) -> Any:
    return step


def _checked(name: str, decay: Scalar) -> Scalar:
    """The range of an average's decay: at 1 the gradient would have no weight, and below 0 the memory alternates."""
    checks.within(name, decay, "[0, 1)")
    return decay


def _curvatures(L: Scalar, mu: Scalar) -> None:
    checks.within("L", L, "(0, inf)")
    checks.within("mu", mu, f"(0, {L})" if checks.is_number(L) else "(0, inf)")


def _rate_inside(rule: Filter, rate: Scalar) -> Filter:
    """Each gradient multiplied by the rate of its own step: a method's own step size, which may be scheduled."""
    B = tuple(lift(lambda b, r: b * r, b, rate) for b in rule.B)
    return Filter(rule.A, B, rule.C, lift(lambda d, r: d * r, rule.D, rate), rule.lookahead)


def _diagonal(*entries: Coefficient) -> tuple[tuple[Coefficient, ...], ...]:
    return tuple(tuple(x if i == j else 0.0 for j in range(len(entries))) for i, x in enumerate(entries))
