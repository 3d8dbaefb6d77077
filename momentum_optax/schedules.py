r"""Schedules for momentum coefficients: Optax schedules, functions of the step counted from 0.

They take Python integers, for which they give Python floats, and traced ones. Any coefficient of any rule accepts them,
and any Optax schedule.
"""

# Divisors are floats throughout: JAX divides two integers in float32 even where 64 bits are enabled.

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

from . import _checks
from .filters.coefficients import Periodic, Scalar, select, table_lookup, value_at

if TYPE_CHECKING:
    import jax
    import numpy as np

    from ._typing import Count, Number

Schedule: TypeAlias = "Callable[[Count], Number]"


def sutskever(
    max_decay: float = 0.99, *, stage: int = 250, drop_at: int | None = None, drop_to: float = 0.9
) -> Schedule:
    r"""Sutskever's schedule: $\mu_t = \min(1 - 2^{-1-\log_2(\lfloor t/250 \rfloor + 1)}, \mu_{max})$.

    Args:
      max_decay: Upper limit, in [0, 1); the paper tries 0, 0.9, 0.99, 0.995 and 0.999.
      stage: Steps between two increases, at least 1.
      drop_at: From this step on the momentum is at most `drop_to`; the paper does so for the last 1000 steps.
      drop_to: Upper limit from `drop_at` on, in [0, 1).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Sutskever, Martens, Dahl and Hinton, ICML 2013, equation 5.
    """
    _checks.number("max_decay", max_decay, "[0, 1)")
    _checks.integer("stage", stage, 1)
    _checks.number("drop_to", drop_to, "[0, 1)")
    if drop_at is not None:
        _checks.integer("drop_at", drop_at, 0)

    def schedule(step: "Count") -> "Number":
        rising = _least(1 - 0.5 / (step // stage + 1.0), max_decay)
        return rising if drop_at is None else select(step >= drop_at, _least(rising, drop_to), rising)

    return schedule


def fista() -> Schedule:
    r"""FISTA's momentum: $\mu_k = (t_k - 1)/t_{k+1}$, $t_0 = 1$, $t_{k+1} = (1 + \sqrt{1 + 4 t_k^2})/2$.

    The first 1024 terms come from the recurrence; later ones solve its asymptotic series, to about 1e-13.

    Reference:
      Nesterov, 1983; Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm", SIAM J. Imaging Sci. 2009.
    """
    t = [1.0]
    while len(t) <= 1024:
        t.append((1 + math.sqrt(1 + 4 * t[-1] ** 2)) / 2)
    table = [(now - 1) / later for now, later in itertools.pairwise(t)]
    last, anchor = len(table) - 1, t[-2]

    def schedule(step: "Count") -> "Number":
        # 2t - ln(t)/2 grows by 1 + O(t^-3) per step; three fixed-point rounds invert it to the last digits.
        beyond = (step - last) * (step > last)
        guess: Number = anchor + beyond / 2.0
        for _ in range(3):
            guess = anchor + beyond / 2.0 + _log(guess / anchor) / 4
        tail = (guess - 1) / (0.5 + (0.25 + guess * guess) ** 0.5)
        return select(step > last, tail, table_lookup(table, step))

    return schedule


def nesterov_convex(offset: float = 3.0) -> Schedule:
    r"""The simple schedule for convex problems: $\mu_k = k/(k + 3)$.

    Args:
      offset: The constant 3 of the formula, in (0, inf); larger values forget less in the long run, and restarts help
        them less.

    Raises:
      ValueError: If `offset` is out of range.
      TypeError: If `offset` is not a number.

    Reference:
      Su, Boyd and Candes, "A differential equation for modeling Nesterov's accelerated gradient method", JMLR 2016,
      arXiv:1503.01243; Chambolle and Dossal, JOTA 2015.
    """
    _checks.number("offset", offset, "(0, inf)")
    return lambda step: step / (step + float(offset))


def demon(decay: float, total_steps: int) -> Schedule:
    r"""Decaying momentum: $\beta_t = \beta_0 (1 - t/T) / ((1 - \beta_0) + \beta_0 (1 - t/T))$, and 0 from T on.

    Args:
      decay: beta_0 in [0, 1).
      total_steps: T, at least 1.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Chen, Wolfe, Li and Kyrillidis, "Demon: improved neural network training with momentum decay", ICASSP 2022,
      arXiv:1910.04952.
    """
    _checks.number("decay", decay, "[0, 1)")
    _checks.integer("total_steps", total_steps, 1)

    def schedule(step: "Count") -> "Number":
        left = 1 - _least(step / float(total_steps), 1.0)
        return decay * left / ((1 - decay) + decay * left)

    return schedule


def restarted(schedule: Schedule, at: "int | Sequence[int] | np.ndarray | jax.Array") -> Schedule:
    """Scheduled restart: the schedule starts again from its step 0 at given steps.

    With a period it is the way to say that a schedule repeats, which `analysis` takes without a `step`.

    `nesterov(restarted(nesterov_convex(), 40))` is the SRSGD rule: its momentum is 0 at a restart, which also
    clears the velocity.

    Args:
      schedule: The schedule to restart.
      at: A period of at least 1, or increasing steps, of at least 1, to restart at; numbers, or an integer array with
        at most one axis, which is not checked.

    Raises:
      ValueError: If `at` is out of range, empty or not increasing.
      TypeError: If `schedule` is not a function, or `at` holds anything but whole numbers.

    Reference:
      Wang et al., "Scheduled restart momentum for accelerated stochastic gradient descent", SIAM J. Imaging Sci. 2022,
      arXiv:2002.10583.
    """
    if not _checks.is_schedule(schedule):
        raise TypeError(f"schedule must be a function of the step, got {_checks.shown(schedule)}")
    if getattr(at, "ndim", 0) == 1:
        steps = cast("jax.Array", at)
        return lambda step: schedule(step - ((steps <= step) * steps).max(initial=0))
    if not isinstance(at, Sequence):
        period = cast("Count", at)
        if _checks.is_array(at):
            return lambda step: schedule(step % period)
        _checks.integer("at", at, 1)
        return Periodic(lambda step: schedule(step % period), int(at))
    for i, begin in enumerate(at):
        _checks.integer(f"at[{i}]", begin, 1 if i == 0 else at[i - 1] + 1)
    if not at:
        raise ValueError("at must name at least one step, got none")
    lengths = [now - before for before, now in zip((0, *at), at, strict=False)]
    return lambda step: schedule(step - sum((step >= now) * n for now, n in zip(at, lengths, strict=True)))


def cyclical(low: float, high: float, period: int) -> Schedule:
    r"""A triangle wave from `high` down to `low` and back: momentum for a learning rate that cycles up and down.

    Args:
      low: The value in the middle of a period, in [0, 1).
      high: The value at its ends, in [low, 1).
      period: Steps per cycle, at least 2.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Smith, "A disciplined approach to neural network hyper-parameters", 2018, arXiv:1803.09820.
    """
    _checks.number("low", low, "[0, 1)")
    _checks.number("high", high, f"[{low}, 1)")
    _checks.integer("period", period, 2)

    def schedule(step: "Count") -> "Number":
        phase = 2 * (step % period) / float(period)
        return high - (high - low) * _least(phase, 2 - phase)

    return Periodic(schedule, int(period))


def one_cycle(total_steps: int, low: float = 0.85, high: float = 0.95, *, peak: float = 0.3) -> Schedule:
    r"""One-cycle momentum: linearly from `high` to `low` while the learning rate rises, then back; `high` afterwards.

    Args:
      total_steps: Steps of the cycle, at least 2.
      low: The value at the peak of the learning rate, in [0, 1).
      high: The value at both ends, in [low, 1).
      peak: The step of the learning rate's peak as a fraction of the cycle, in (0, 1).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Smith and Topin, "Super-convergence", 2018, arXiv:1708.07120; Smith, 2018, arXiv:1803.09820.
    """
    _checks.integer("total_steps", total_steps, 2)
    _checks.number("low", low, "[0, 1)")
    _checks.number("high", high, f"[{low}, 1)")
    _checks.number("peak", peak, "(0, 1)")

    def schedule(step: "Count") -> "Number":
        share = _least(step / float(total_steps), 1.0)
        return high - (high - low) * _least(share / peak, (1 - share) / (1 - peak))

    return schedule


def ramp(value: float, steps: int) -> Schedule:
    r"""AdEMAMix's warm-up of alpha: $\min((t + 1)/T, 1)\,\alpha$; the reference code counts steps from 1.

    Args:
      value: alpha, finite.
      steps: T, at least 1.

    Raises:
      ValueError: If a number is out of range (0 steps would be 0/0).
      TypeError: If an argument is not a number.

    Reference:
      Pagliardini, Ablin and Grangier, ICLR 2025, arXiv:2409.03137, appendix.
    """
    _checks.number("value", value, "(-inf, inf)")
    _checks.integer("steps", steps, 1)
    return lambda step: value * _least((step + 1) / float(steps), 1.0)


def half_life_ramp(start: float, end: float, steps: int) -> Schedule:
    r"""AdEMAMix's warm-up of the slow decay, linear in its half-life: $f(\beta) = \ln 0.5/\ln\beta - 1$.

    $$ \beta_t = f^{-1}\big((1 - a) f(\beta_{start}) + a f(\beta_{end})\big), \quad a = \min((t + 1)/T, 1),
       \quad f^{-1}(h) = 0.5^{1/(h+1)} $$

    Args:
      start: Decay to begin from, in (0, 1); the paper takes the fast decay.
      end: Decay from step T - 1 on, in (0, 1).
      steps: T, at least 1.

    Raises:
      ValueError: If a number is out of range (0 steps would be 0/0).
      TypeError: If an argument is not a number.

    Reference:
      Pagliardini, Ablin and Grangier, ICLR 2025, arXiv:2409.03137, appendix.
    """
    _checks.number("start", start, "(0, 1)")
    _checks.number("end", end, "(0, 1)")
    _checks.integer("steps", steps, 1)
    first, last = (math.log(0.5) / math.log(decay) for decay in (start, end))

    def schedule(step: "Count") -> "Number":
        share = _least((step + 1) / float(steps), 1.0)
        return 0.5 ** (1 / ((1 - share) * first + share * last))

    return schedule


def fsgdm(total_steps: int, *, stages: int = 300, scaling: float = 0.033) -> Schedule:
    r"""FSGDM's schedule, which rises in stages of $m = \lfloor\Sigma/n\rfloor$ steps.

    $$ u_t = \frac{s}{s + c\Sigma}, \qquad s = m \lfloor (t+1)/m \rfloor $$

    For `heavy_ball`, whose gain rises with it: FSGDM adds whole gradients to its buffer.

    Args:
      total_steps: Sigma, a whole number of at least `stages`.
      stages: n, at least 1; the code's default for 300 epochs.
      scaling: c in (0, inf).

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      "On the performance analysis of momentum method: a frequency domain perspective", ICLR 2025, arXiv:2411.19671, and
      its code, yinleung/FSGDM, which counts steps from 1.
    """
    _checks.integer("stages", stages, 1)
    _checks.integer("total_steps", total_steps, stages)
    _checks.number("scaling", scaling, "(0, inf)")
    length, settled = int(total_steps) // int(stages), scaling * total_steps

    def schedule(step: "Count") -> "Number":
        begun = (step + 1) // length * float(length)
        return begun / (begun + settled)

    return schedule


def muon_momentum(
    total_steps: int | None = None,
    *,
    low: float = 0.85,
    high: float = 0.95,
    warmup_steps: int = 300,
    cooldown_steps: int = 50,
) -> Schedule:
    """The momentum of Muon in modded-nanogpt: linear from `low` to `high`, and back to `low` in the last steps.

    Args:
      total_steps: Steps of the run, a whole number of at least both ramps together; None for no cool-down.
      low: The value at step 0 and, after a cool-down, from step `total_steps` on, in [0, 1).
      high: The value between, in [low, 1).
      warmup_steps: Steps from `low` to `high`, at least 1.
      cooldown_steps: Steps from `high` to `low`, at least 1.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is not a number.

    Reference:
      KellerJordan/modded-nanogpt, `get_muon_momentum` of its training scripts (.85 to .95 in 300 steps and back in 50).
    """
    _checks.number("low", low, "[0, 1)")
    _checks.number("high", high, f"[{low}, 1)")
    _checks.integer("warmup_steps", warmup_steps, 1)
    _checks.integer("cooldown_steps", cooldown_steps, 1)
    if total_steps is not None:
        _checks.integer("total_steps", total_steps, int(warmup_steps) + int(cooldown_steps))

    def schedule(step: "Count") -> "Number":
        share = _least(step / float(warmup_steps), 1.0)
        if total_steps is not None:
            left = _least((total_steps - step) / float(cooldown_steps), 1.0)
            share = share * left * (left > 0)
        return low + share * (high - low)

    return schedule


def momentum_correction(decay: Scalar, learning_rate: Schedule) -> Schedule:
    r"""The decay that makes a heavy ball exact under a learning-rate schedule: $\beta_t\,\eta_{t-1}/\eta_t$.

    With the learning rate after the velocity, `chain(scale_by_momentum(heavy_ball(decay)),
    scale_by_learning_rate(learning_rate))`, a drop of the learning rate shrinks the whole history at once. With this
    decay instead the steps equal those of the learning rate inside the velocity, $v' = \beta v + \eta_t g$. Where the
    learning rate is 0 so is the decay: a history cannot be carried through a step of size 0.

    Args:
      decay: beta, a number, a scalar array or a schedule.
      learning_rate: The schedule that scales the update afterwards.

    Raises:
      TypeError: If `learning_rate` is not a schedule: a constant one needs no correction.

    Reference:
      Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, arXiv:1706.02677, section 3, who
      correct in the other direction: the inverse factor makes the learning rate inside act as one outside.
    """
    _checks.within("decay", decay, "(-1, 1]")
    if not _checks.is_schedule(learning_rate):
        raise TypeError(f"learning_rate must be a schedule of the step, got {_checks.shown(learning_rate)}")

    def schedule(step: "Count") -> "Number":
        now = learning_rate(step)
        # At step 0 the velocity is zero, so any value will do, and step -1 may be outside the schedule's domain.
        before = learning_rate(step - (step > 0))
        alive = now != 0
        return value_at(decay, step) * before * alive / (now + (1 - alive))

    return schedule


def power_average(exponent: float = 0.0, start: int = 0) -> Schedule:
    r"""Decays of an average over all steps so far, the later ones with more weight: $c_t = (1 - 1/n)^{\gamma+1}$.

    Here n = t + 1 - start, and c = 0 until `start`. For `average_params`: in the average after n steps the weights
    after step $\tau$ have a share $\propto \tau^\gamma$, exactly for $\gamma = 0$, else to first order in $1/\tau$. So
    its memory is a fixed fraction of the run however long that is.

    * $\gamma = 0$: the uniform mean, with `start` that of the tail of a run;
    * half of the shares belong to the last fraction f of the steps for $\gamma = -\ln 2/\ln(1 - f) - 1$;
    * averages with two exponents give those with any other after the run, see `analysis.post_hoc_weights`.

    Args:
      exponent: gamma, a number in [0, inf).
      start: The step that begins the average, a whole number from 0.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If an argument is not a number.

    Reference:
      Karras et al., CVPR 2024, arXiv:2312.02696, section 3.1; the mean: Polyak and Juditsky, SIAM J.
      Control and Optimization 1992.
    """
    _checks.number("exponent", exponent, "[0, inf)")
    _checks.integer("start", start, 0)

    def schedule(step: "Count") -> "Number":
        n = step + 1 - start
        late = n > 0
        return late * (1 - 1.0 / select(late, n, 1)) ** (float(exponent) + 1)

    return schedule


def _least(a: "Number", b: "Number") -> "Number":
    return select(a < b, a, b)


def _log(x: "Number") -> "Number":
    if _checks.is_number(x):
        return math.log(x)
    import jax.numpy as jnp  # noqa: PLC0415  needed for traced steps only

    return jnp.log(x)
