"""Everything that can be said about a rule before it runs, in one table."""

import dataclasses
from typing import Any

import numpy as np

from .. import _checks
from ..filters import Filter
from .arguments import constant
from .mechanics import energy_limit
from .noise import stationary_variance
from .rates import convergence_rate, iterations, stability_limit, transient_growth
from .response import bandwidth, dc_gain, half_life, mean_lag, memory, noise_gain, poles
from .rounding import precision

# Curvatures between mu and L at which the run from rest is followed.
_FOLLOWED = 65


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` found; None for what an argument was missing for. Printed, it is a table.

    Attributes:
      order: Velocities per parameter.
      poles: The eigenvalues of the memory, the slowest first; complex, K entries.
      dc_gain: See `dc_gain`.
      half_life: In steps, see `half_life`.
      memory: Gradients that make up half and nine tenths of a lasting update, see `memory`.
      mean_lag: In steps, see `mean_lag`.
      bandwidth: In radians per step, see `bandwidth`; None where the gain at zero frequency is 0 or infinite.
      noise_gain: See `noise_gain`.
      relative_noise: Variance passed at equal effective learning rate: noise gain over the square of the DC gain.
      stability_limit: Largest stable learning rate for curvature L.
      energy_limit: Learning rate up to which it cannot climb above its start; None unless it is a heavy ball.
      effective_learning_rate: Learning rate times DC gain.
      rate: Contraction per step on a quadratic with curvatures in [mu, L].
      iterations: From rest until a millionth of the error is left, for the worst curvature.
      transient_growth: Largest overshoot from rest, over those curvatures.
      variance: Stationary variance for gradient noise of variance 1, at curvature mu and at L.
      bytes_per_parameter: Of all velocities; needs a storage, as do the next two.
      stall: See `Precision`.
      rounding_noise: See `Precision`.
    """

    order: int
    poles: tuple[complex, ...]
    dc_gain: float
    half_life: float
    memory: tuple[float, float]
    mean_lag: float
    bandwidth: float | None
    noise_gain: float
    relative_noise: float
    stability_limit: float | None = None
    energy_limit: float | None = None
    effective_learning_rate: float | None = None
    rate: float | None = None
    iterations: float | None = None
    transient_growth: float | None = None
    variance: tuple[float, float] | None = None
    bytes_per_parameter: float | None = None
    stall: float | None = None
    rounding_noise: float | None = None

    def __str__(self) -> str:
        rows = [(label, _text(getattr(self, name)), unit) for name, label, unit in _ROWS]
        return "\n".join(f"{label:38}{text:>16}  {unit}".rstrip() for label, text, unit in rows if text)


_ROWS = (
    ("order", "velocities per parameter", ""),
    ("poles", "poles", ""),
    ("dc_gain", "gain of a lasting gradient", ""),
    ("half_life", "half-life of the slowest memory", "steps"),
    ("memory", "half, nine tenths of an update", "gradients"),
    ("mean_lag", "mean lag", "steps"),
    ("bandwidth", "bandwidth (-3 dB)", "radians per step"),
    ("noise_gain", "noise gain", ""),
    ("relative_noise", "noise gain at equal effective rate", ""),
    ("stability_limit", "largest stable learning rate", ""),
    ("energy_limit", "largest that cannot climb", ""),
    ("effective_learning_rate", "effective learning rate", ""),
    ("rate", "contraction per step, worst", ""),
    ("iterations", "to a millionth of the error", "steps"),
    ("transient_growth", "largest error on the way", "times the start"),
    ("variance", "variance under unit noise, at mu, L", ""),
    ("bytes_per_parameter", "velocities", "bytes per parameter"),
    ("stall", "constant reached, rounded to nearest", "of its size"),
    ("rounding_noise", "error of rounding at random, at most", "of the update"),
)


def report(
    rule: Filter,
    *,
    learning_rate: float | None = None,
    L: float | None = None,
    mu: float | None = None,
    storage: Any = None,
    step: int | None = None,
) -> Report:
    """Print what a rule will do, and return the numbers.

    Args:
      rule: A rule; its coefficients must be constant, or `step` given.
      learning_rate: In (0, inf); without it nothing is said about a run.
      L: Largest curvature of the loss, in (0, inf).
      mu: Smallest curvature, in (0, L]; rates and iterations need it.
      storage: Where the velocities are kept, such as `mo.storage.bfloat16()`.
      step: The step whose coefficients are used. None: constants, and for coefficients that follow a leaf's age
        (special first steps, debiasing weights) what they settle at.

    Returns:
      A `Report`; what is printed is its text.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, mu is given without L, or a coefficient follows the step and `step` is
        None.

    Reference:
      See the functions that its attributes name.
    """
    rule = constant(rule, step)
    _check("learning_rate", learning_rate, "(0, inf)")
    _check("L", L, "(0, inf)")
    if mu is not None and L is None:
        raise ValueError(f"L must be given where mu is, got mu={mu!r} alone")
    _check("mu", mu, f"(0, {L}]")
    found = _of_the_rule(rule)
    if L is not None:
        found |= {"stability_limit": float(stability_limit(rule, L)), "energy_limit": _energy_limit(rule, L)}
    if learning_rate is not None:
        found["effective_learning_rate"] = learning_rate * found["dc_gain"]
        if L is not None and mu is not None:
            found |= _of_the_run(rule, learning_rate, mu, L)
    if storage is not None:
        kept = precision(rule, storage)
        found |= {"bytes_per_parameter": kept.bytes_per_parameter, "stall": kept.stall, "rounding_noise": kept.noise}
    result = Report(**found)
    print(result)
    return result


def _check(name: str, value: Any, interval: str) -> None:
    if value is not None:
        _checks.number(name, value, interval)


def _of_the_rule(rule: Filter) -> dict[str, Any]:
    gain, noise = dc_gain(rule), noise_gain(rule)
    ordinary = np.isfinite(gain) and gain != 0
    return {
        "order": rule.order,
        "poles": tuple(complex(p) for p in poles(rule)),
        "dc_gain": gain,
        "half_life": half_life(rule),
        "memory": (memory(rule, 0.5), memory(rule, 0.9)),
        "mean_lag": mean_lag(rule),
        "bandwidth": bandwidth(rule) if ordinary else None,
        "noise_gain": noise,
        "relative_noise": noise / gain**2 if ordinary else np.nan,
    }


def _of_the_run(rule: Filter, learning_rate: float, mu: float, L: float) -> dict[str, Any]:
    curvature = np.geomspace(mu, L, _FOLLOWED)
    at_ends = stationary_variance(rule, learning_rate, [mu, L])
    return {
        "rate": float(convergence_rate(rule, learning_rate, mu, L)),
        "iterations": float(np.max(iterations(rule, learning_rate, curvature))),
        "transient_growth": float(np.max(transient_growth(rule, learning_rate, curvature))),
        "variance": (float(at_ends[0]), float(at_ends[1])),
    }


def _energy_limit(rule: Filter, L: float) -> float | None:
    try:
        return float(energy_limit(rule, L))
    except ValueError:  # no heavy ball
        return None


def _text(value: Any) -> str:
    """Four digits; nothing for None or no entries, and the first three of many."""
    if isinstance(value, tuple):
        shown = ", ".join(_text(entry) for entry in value[:3])
        return f"{shown}, ..." if len(value) > 3 else shown
    if isinstance(value, complex):
        return f"{value.real:.4g}{value.imag:+.4g}i" if value.imag else f"{value.real:.4g}"
    return "" if value is None else f"{value:.4g}"
