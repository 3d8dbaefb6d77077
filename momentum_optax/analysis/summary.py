"""`report`: the numbers of a rule before it runs, in one table."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np

from .. import _checks
from ..filters import Filter
from .arguments import constant, phases
from .convergence import contraction, iterations, stability_limit, transient_growth
from .mechanics import energy_limit
from .noise import stationary_variance
from .response import bandwidth, dc_gain, half_life, mean_lag, memory, noise_gain, poles
from .rounding import Spacing, precision

# Curvatures between mu and L at which a run from rest is evaluated.
_FOLLOWED = 65

# Values of fields of `Report` by name.
Numbers: TypeAlias = dict[str, Any]
Counted = TypeVar("Counted")


def _row(label: str, unit: str = "", *, optional: bool = False) -> Any:
    """A field of `Report` with its line of the table; optional ones may be None."""
    default = None if optional else dataclasses.MISSING
    return dataclasses.field(default=default, metadata={"label": label, "unit": unit})


@dataclasses.dataclass(frozen=True)
class Report:
    """The numbers of `report`; None where an argument that they need was not given. Printed, it is a table.

    Attributes:
      order: Velocities per parameter.
      poles: The eigenvalues of A, the slowest first; complex, K entries. Per period, see `poles`.
      dc_gain: See `dc_gain`.
      half_life: In steps, see `half_life`.
      memory: Gradients that make up half and nine tenths of the update for a constant gradient, see `memory`; None for
        a rule with a period, and where they are too many to count.
      mean_lag: In steps, see `mean_lag`.
      bandwidth: In radians per step, see `bandwidth`; None where the gain at zero frequency is 0 or infinite, and for a
        rule with a period.
      noise_gain: See `noise_gain`.
      relative_noise: The noise gain over the square of the DC gain: at equal effective learning rate.
      period: Steps after which the coefficients repeat, see `monodromy`; None if they are constant.
      stability_limit: Largest stable learning rate for curvature L.
      energy_limit: Largest learning rate at which a run cannot climb above its start; None unless a heavy ball.
      effective_learning_rate: Learning rate times DC gain.
      contraction: Contraction per step on a quadratic with curvatures in [mu, L].
      iterations: Steps from rest to 1e-6 of the error, for the worst curvature; None where they are too many to count,
        see `iterations`.
      transient_growth: Largest error of a run from rest over its start, for the worst curvature; None where settling
        takes too many steps, see `transient_growth`.
      variance: Stationary variance for gradient noise of variance 1, at curvature mu and at L.
      bytes_per_parameter: Of all velocities; needs a storage, as do the next two.
      stall: See `Precision`.
      rounding_noise: See `Precision`.
    """

    order: int = _row("velocities per parameter")
    poles: tuple[complex, ...] = _row("poles")
    dc_gain: float = _row("gain of a constant gradient")
    half_life: float = _row("half-life of the slowest memory", "steps")
    memory: tuple[float, float] | None = _row("half, nine tenths of an update", "gradients")
    mean_lag: float = _row("mean lag", "steps")
    bandwidth: float | None = _row("bandwidth (-3 dB)", "radians per step")
    noise_gain: float = _row("noise gain")
    relative_noise: float = _row("noise gain over squared gain")
    period: int | None = _row("coefficients repeat after", "steps", optional=True)
    stability_limit: float | None = _row("largest stable learning rate", optional=True)
    energy_limit: float | None = _row("energy limit of the learning rate", optional=True)
    effective_learning_rate: float | None = _row("effective learning rate", optional=True)
    contraction: float | None = _row("contraction per step, worst", optional=True)
    iterations: float | None = _row("to 1e-6 of the error", "steps", optional=True)
    transient_growth: float | None = _row("largest error on the way", "times the start", optional=True)
    variance: tuple[float, float] | None = _row("variance under unit noise, at mu, L", optional=True)
    bytes_per_parameter: float | None = _row("velocities", "bytes per parameter", optional=True)
    stall: float | None = _row("constant reached, rounded to nearest", "of the exact one", optional=True)
    rounding_noise: float | None = _row("error of stochastic rounding, at most", "of the update", optional=True)

    def __str__(self) -> str:
        rows = [(field.metadata, _text(getattr(self, field.name))) for field in dataclasses.fields(self)]
        return "\n".join(f"{row['label']:38}{text:>16}  {row['unit']}".rstrip() for row, text in rows if text)


def report(
    rule: Filter,
    *,
    learning_rate: float | None = None,
    L: float | None = None,
    mu: float | None = None,
    storage: Spacing | None = None,
    step: int | None = None,
) -> Report:
    """Print a table of what a rule will do, and return its numbers.

    Args:
      rule: A rule; its coefficients must be constant or periodic, or `step` given. For a periodic one the numbers are
        means over a period, contraction and iterations per step.
      learning_rate: In (0, inf); needed for the numbers of a run.
      L: Largest curvature of the loss, in (0, inf).
      mu: Smallest curvature, in (0, L]; needed for the contraction and the iterations.
      storage: The storage of the velocities, such as `mo.storage.bfloat16()`.
      step: The step whose coefficients are used; None for constant coefficients, with the limit of those that depend
        on a leaf's age (special first steps, debiasing weights).

    Returns:
      The `Report` that is printed.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, mu is given without L, or a coefficient depends on the step and `step` is
        None.

    Reference:
      See the functions that its attributes name.
    """
    k = len(phases(rule, step))
    if k == 1:
        rule = constant(rule, step)
    _check("learning_rate", learning_rate, "(0, inf)")
    _check("L", L, "(0, inf)")
    if mu is not None and L is None:
        raise ValueError(f"L must be given where mu is, got mu={mu!r} alone")
    _check("mu", mu, f"(0, {L}]")
    found = _of_the_rule(rule, k)
    if L is not None:
        found |= {"stability_limit": float(stability_limit(rule, L)), "energy_limit": _energy_limit(rule, L)}
    if learning_rate is not None:
        found["effective_learning_rate"] = learning_rate * found["dc_gain"]
        if L is not None and mu is not None:
            found |= _of_the_run(rule, learning_rate, mu, L)
    if storage is not None:
        found |= _of_the_storage(rule, storage)
    result = Report(**found)
    print(result)
    return result


def _check(name: str, value: float | None, interval: str) -> None:
    if value is not None:
        _checks.number(name, value, interval)


def _of_the_rule(rule: Filter, k: int) -> Numbers:
    gain, noise = dc_gain(rule), noise_gain(rule)
    ordinary = np.isfinite(gain) and gain != 0
    return {
        "order": rule.pruned().order,
        "poles": tuple(complex(p) for p in poles(rule)),
        "dc_gain": gain,
        "half_life": half_life(rule),
        "memory": _counted(lambda: (memory(rule, 0.5), memory(rule, 0.9))) if k == 1 else None,
        "mean_lag": mean_lag(rule),
        "bandwidth": bandwidth(rule) if ordinary and k == 1 else None,
        "noise_gain": noise,
        "relative_noise": noise / gain**2 if ordinary else np.nan,
        "period": k if k > 1 else None,
    }


def _of_the_run(rule: Filter, learning_rate: float, mu: float, L: float) -> Numbers:
    curvature = np.geomspace(mu, L, _FOLLOWED)
    at_ends = stationary_variance(rule, learning_rate, [mu, L])
    return {
        "contraction": float(contraction(rule, learning_rate, mu, L)),
        "iterations": _counted(lambda: float(np.max(iterations(rule, learning_rate, curvature)))),
        "transient_growth": _counted(lambda: float(np.max(transient_growth(rule, learning_rate, curvature)))),
        "variance": (float(at_ends[0]), float(at_ends[1])),
    }


def _counted(count: Callable[[], Counted]) -> Counted | None:
    """What a function counts step by step; None where that would take too many."""
    try:
        return count()
    except ValueError:  # all arguments are checked before
        return None


def _of_the_storage(rule: Filter, storage: Spacing) -> Numbers:
    found = precision(rule, storage)
    return {"bytes_per_parameter": found.bytes_per_parameter, "stall": found.stall, "rounding_noise": found.noise}


def _energy_limit(rule: Filter, L: float) -> float | None:
    try:
        return float(energy_limit(rule, L))
    except ValueError:  # not a heavy ball
        return None


def _text(value: object) -> str:
    """Four digits, but all of a whole number; of several entries the first three; empty for None."""
    if isinstance(value, tuple):
        shown = ", ".join(_text(entry) for entry in value[:3])
        return f"{shown}, ..." if len(value) > 3 else shown
    if isinstance(value, complex):
        return f"{value.real:.4g}{value.imag:+.4g}i" if value.imag else f"{value.real:.4g}"
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"
