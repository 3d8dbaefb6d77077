"""The standard picture of a rule: impulse and frequency response, contraction, a run from rest."""

from typing import TYPE_CHECKING

import numpy as np

from .. import _checks
from ..filters import Filter
from .arguments import constant
from .convergence import stability_limit
from .loop import error_curve, spectral_radius
from .response import frequency_response, impulse_response, memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, distinct under every common colour blindness; dashes for print in grey.
_STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))
_POINTS = 400


def plot(rule: Filter, *, learning_rate: float, L: float, mu: float, steps: int | None = None) -> "Figure":
    r"""Draw four panels: impulse response, frequency response, contraction over curvature, error of a run from rest.

    The impulse response and the run apply schedules from step 0 on; the other two need constant coefficients, and are
    empty but for a note for a rule that depends on the step.

    Args:
      rule: Any rule.
      learning_rate: In (0, inf).
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].
      steps: Length of the run, at least 1; None for ten times the slower of the memory and the run, at most 2000.

    Returns:
      A `matplotlib.figure.Figure`: `figure.savefig(path)` writes it.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range.
      ImportError: If matplotlib is not installed.

    Reference:
      Goh, "Why momentum really works", Distill 2017, draws such pictures of the heavy ball.
    """
    # Not pyplot: a bare figure is drawn by Agg and changes no backend and no setting for the rest of the process.
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ImportError(
            "analysis.plot needs matplotlib, which the extra momentum-optax[demo] brings: pip install "
            "'momentum-optax[demo]', or matplotlib itself"
        ) from error

    _checks.number("learning_rate", learning_rate, "(0, inf)")
    _checks.number("L", L, "(0, inf)")
    _checks.number("mu", mu, f"(0, {L}]")
    if steps is not None:
        _checks.integer("steps", steps, 1)
    settled = _settled(rule)
    n = int(steps) if steps is not None else _length(settled, learning_rate, mu)
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    (impulse_axes, frequency_axes), (contraction_axes, run_axes) = figure.subplots(2, 2)
    _draw_impulse(impulse_axes, rule, settled, n)
    _draw_frequency(frequency_axes, settled)
    _draw_contraction(contraction_axes, settled, learning_rate, L, mu)
    _draw_run(run_axes, rule, learning_rate, (mu, L), n)
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _settled(rule: Filter) -> Filter | None:
    """The constant rule, or None for one that depends on the step."""
    try:
        return constant(rule)
    except ValueError:
        return None


def _length(rule: Filter | None, learning_rate: float, mu: float) -> int:
    if rule is None:
        return 200
    radius = float(spectral_radius(rule, learning_rate, mu))
    run = 1 / max(1 - radius, 1e-6)
    remembered = memory(rule, 0.9)
    return int(min(max(10 * run, remembered if np.isfinite(remembered) else 0, 20), 2000))


def _draw_impulse(axes: "Axes", rule: Filter, settled: Filter | None, n: int) -> None:
    shown = n if settled is None else int(min(max(2 * memory(settled, 0.95), 10), n))
    weights = impulse_response(rule, shown)
    color, _ = _STYLES[0]
    axes.vlines(np.arange(shown), 0, weights, color=color, linewidth=1)
    axes.plot(np.arange(shown), weights, ".", color=color)
    axes.set(title="impulse response", xlabel="steps later", ylabel="weight in the update")


def _draw_frequency(axes: "Axes", rule: Filter | None) -> None:
    axes.set(title="frequency response", xlabel="frequency (radians per step)", ylabel="gain")
    if rule is None:
        return _note(axes)
    omega = np.geomspace(1e-4, np.pi, _POINTS)
    color, dashes = _STYLES[0]
    axes.loglog(omega, abs(frequency_response(rule, omega)), color=color, linestyle=dashes)
    return None


def _draw_contraction(axes: "Axes", rule: Filter | None, learning_rate: float, L: float, mu: float) -> None:
    axes.set(title="contraction per step", xlabel="curvature", ylabel="spectral radius")
    if rule is None:
        return _note(axes)
    curvature = np.geomspace(mu / 10, 10 * L, _POINTS)
    color, dashes = _STYLES[0]
    axes.semilogx(curvature, spectral_radius(rule, learning_rate, curvature), color=color, linestyle=dashes)
    axes.axvspan(mu, L, color="0.93", label="the loss")
    limit = float(stability_limit(rule, 1.0)) / learning_rate
    if mu / 10 < limit < 10 * L:
        axes.axvline(limit, color=_STYLES[1][0], linestyle=_STYLES[1][1], label="unstable beyond")
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.set_ylim(top=min(axes.get_ylim()[1], 2.0))
    axes.legend(frameon=False)
    return None


def _draw_run(axes: "Axes", rule: Filter, learning_rate: float, ends: tuple[float, float], n: int) -> None:
    mu, L = ends
    curvature = np.array([mu, np.sqrt(mu * L), L])
    with np.errstate(over="ignore", invalid="ignore"):
        errors = abs(error_curve(rule, learning_rate, curvature, n))
    for error, (color, dashes), label in zip(errors.T, _STYLES, ("mu", "between", "L"), strict=True):
        axes.semilogy(error, color=color, linestyle=dashes, label=f"curvature {label}")
    axes.set(title="a run from rest", xlabel="step", ylabel="error over its start")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-16))
    axes.legend(frameon=False)


def _note(axes: "Axes") -> None:
    axes.text(0.5, 0.5, "depends on the step", ha="center", transform=axes.transAxes)
