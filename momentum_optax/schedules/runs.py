"""Momentum over a training run of a given length: warm-ups, cycles and decays."""

__all__ = ["cyclical", "demon", "fsgdm", "half_life_ramp", "muon_momentum", "one_cycle", "ramp"]

import math
from typing import TYPE_CHECKING

from .. import _checks
from ..filters.coefficients import Periodic
from .arithmetic import least

if TYPE_CHECKING:
    from .._typing import Count, Number, Schedule


def demon(decay: float, total_steps: int) -> "Schedule":
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
        left = 1 - least(step / float(total_steps), 1.0)
        return decay * left / ((1 - decay) + decay * left)

    return schedule


def cyclical(low: float, high: float, period: int) -> "Schedule":
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
    _checks.number("high", high, f"[{float(low)}, 1)")
    _checks.integer("period", period, 2)

    def schedule(step: "Count") -> "Number":
        phase = 2 * (step % period) / float(period)
        return high - (high - low) * least(phase, 2 - phase)

    return Periodic(schedule, int(period))


def one_cycle(total_steps: int, low: float = 0.85, high: float = 0.95, *, peak: float = 0.3) -> "Schedule":
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
    _checks.number("high", high, f"[{float(low)}, 1)")
    _checks.number("peak", peak, "(0, 1)")

    def schedule(step: "Count") -> "Number":
        share = least(step / float(total_steps), 1.0)
        return high - (high - low) * least(share / peak, (1 - share) / (1 - peak))

    return schedule


def ramp(value: float, steps: int) -> "Schedule":
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
    return lambda step: value * least((step + 1) / float(steps), 1.0)


def half_life_ramp(start: float, end: float, steps: int) -> "Schedule":
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
        share = least((step + 1) / float(steps), 1.0)
        return 0.5 ** (1 / ((1 - share) * first + share * last))

    return schedule


def fsgdm(total_steps: int, *, stages: int = 300, scaling: float = 0.033) -> "Schedule":
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
) -> "Schedule":
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
    _checks.number("high", high, f"[{float(low)}, 1)")
    _checks.integer("warmup_steps", warmup_steps, 1)
    _checks.integer("cooldown_steps", cooldown_steps, 1)
    if total_steps is not None:
        _checks.integer("total_steps", total_steps, int(warmup_steps) + int(cooldown_steps))

    def schedule(step: "Count") -> "Number":
        share = least(step / float(warmup_steps), 1.0)
        if total_steps is not None:
            left = least((total_steps - step) / float(cooldown_steps), 1.0)
            share = share * left * (left > 0)
        return low + share * (high - low)

    return schedule
