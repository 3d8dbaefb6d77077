"""The standard picture of one rule or several: impulse and frequency response, contraction, a run from rest."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .. import _checks
from ..filters import Filter
from .arguments import constant, phases
from .convergence import stability_limit
from .loop import error_curve, spectral_radius
from .response import frequency_response, impulse_response, memory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A name, or (offset, lengths of dashes and gaps).
LineStyle: TypeAlias = "str | tuple[int, tuple[int, ...]]"
# Okabe and Ito's colours, distinct under every common colour blindness; dashes for print in grey.
_STYLES: tuple[tuple[str, LineStyle], ...] = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", ":"),
    ("#CC79A7", "-."),
    ("#E69F00", (0, (5, 1, 1, 1, 1, 1))),
    ("#56B4E9", (0, (1, 3))),
)
_POINTS = 400


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A rule in a picture.

    Attributes:
      name: Its label; empty for a rule alone.
      rule: The rule.
      settled: The constant rule, or None for one that depends on the step.
      converges: The rule if its contraction per step is defined, constant or periodic, else None.
      rate: Its learning rate.
      style: Its colour and dashes.
    """

    name: str
    rule: Filter
    settled: Filter | None
    converges: Filter | None
    rate: float
    style: tuple[str, LineStyle]

    def line(self) -> dict[str, Any]:
        color, dashes = self.style
        return {"color": color, "linestyle": dashes, "label": self.name or None}


def plot(
    rule: "Filter | Mapping[str, Filter]",
    *,
    learning_rate: "float | Mapping[str, float]",
    L: float,
    mu: float,
    steps: int | None = None,
) -> "Figure":
    r"""Draw four panels: impulse response, frequency response, contraction over curvature, error of a run from rest.

    The impulse response and the run apply schedules from step 0 on. The frequency response needs constant coefficients,
    the contraction constant or periodic ones; for other rules they have but a note. Several rules are drawn over each
    other; the run is then the largest error at the curvatures mu, sqrt(mu L) and L.

    Args:
      rule: Any rule, or up to six by the names that they have in the legend.
      learning_rate: In (0, inf); for several rules one number, or one for each by the same names.
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].
      steps: Length of the run, at least 1; None for ten times the slower of the memory and the run, at most 2000.

    Returns:
      A `matplotlib.figure.Figure`: `figure.savefig(path)` writes it.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a number is out of range, there are no rules or more than six, or the names of the learning rates
        are not those of the rules.
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

    drawn = _drawn(rule, learning_rate)
    _checks.number("L", L, "(0, inf)")
    _checks.number("mu", mu, f"(0, {L}]")
    if steps is not None:
        _checks.integer("steps", steps, 1)
    n = int(steps) if steps is not None else max(_length(one, mu) for one in drawn)
    figure = Figure(figsize=(9.6, 6.8), layout="constrained")
    (impulse_axes, frequency_axes), (contraction_axes, run_axes) = figure.subplots(2, 2)
    _draw_impulse(impulse_axes, drawn, n)
    _draw_frequency(frequency_axes, drawn)
    _draw_contraction(contraction_axes, drawn, L, mu)
    (_draw_run if len(drawn) == 1 else _draw_runs)(run_axes, drawn, (mu, L), n)
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _drawn(rule: "Filter | Mapping[str, Filter]", learning_rate: "float | Mapping[str, float]") -> list[_Drawn]:
    """The rules with their names, learning rates and styles, all checked."""
    rules = rule if isinstance(rule, Mapping) else {"": rule}
    if not 0 < len(rules) <= len(_STYLES):
        got = f"{len(rules)}: {_checks.shown(rules)}"
        raise ValueError(f"rule must be one rule, or a mapping of up to {len(_STYLES)}, got {got}")
    rates = learning_rate if isinstance(learning_rate, Mapping) else dict.fromkeys(rules, learning_rate)
    if not isinstance(rule, Mapping) and isinstance(learning_rate, Mapping):
        raise TypeError(f"learning_rate must be a number for one rule, got {_checks.shown(learning_rate)}")
    if set(rates) != set(rules):
        got = _checks.shown(sorted(rates))
        raise ValueError(f"learning_rate must have the names of the rules, {_checks.shown(sorted(rules))}, got {got}")
    for name, rate in rates.items():
        _checks.number(f"learning_rate[{name!r}]" if rates is learning_rate else "learning_rate", rate, "(0, inf)")
    pairs = zip(rules.items(), _STYLES, strict=False)
    return [_make(str(name), one, float(rates[name]), style) for (name, one), style in pairs]


def _make(name: str, rule: Filter, rate: float, style: tuple[str, LineStyle]) -> _Drawn:
    try:
        repeated = phases(rule)
    except ValueError:  # depends on the step
        return _Drawn(name, rule, None, None, rate, style)
    settled = constant(rule) if len(repeated) == 1 else None
    return _Drawn(name, rule, settled, settled or rule, rate, style)


def _length(one: _Drawn, mu: float) -> int:
    if one.converges is None:
        return 200
    radius = float(spectral_radius(one.converges, one.rate, mu))
    run = 1 / max(1 - radius, 1e-6)
    remembered = _memory(one.settled, 0.9) if one.settled is not None else 0
    return int(min(max(10 * run, remembered if np.isfinite(remembered) else 0, 20), 2000))


def _memory(rule: Filter, fraction: float) -> float:
    """The `memory` of a rule; infinite where that is too long to count."""
    try:
        return memory(rule, fraction)
    except ValueError:
        return np.inf


def _draw_impulse(axes: "Axes", drawn: list[_Drawn], n: int) -> None:
    lengths = [max(2 * _memory(one.settled, 0.95), 10) for one in drawn if one.settled is not None]
    shown = int(min(max(lengths, default=n), n))
    for one in drawn:
        weights = impulse_response(one.rule, shown)
        if len(drawn) == 1:
            axes.vlines(np.arange(shown), 0, weights, color=one.style[0], linewidth=1)
            axes.plot(np.arange(shown), weights, ".", color=one.style[0])
        else:
            axes.plot(np.arange(shown), weights, **one.line())
    axes.set(title="impulse response", xlabel="steps later", ylabel="weight in the update")
    if len(drawn) > 1:
        axes.legend(frameon=False)


def _draw_frequency(axes: "Axes", drawn: list[_Drawn]) -> None:
    axes.set(title="frequency response", xlabel="frequency (radians per step)", ylabel="gain")
    omega = np.geomspace(1e-4, np.pi, _POINTS)
    for one in drawn:
        if one.settled is not None:
            axes.loglog(omega, abs(frequency_response(one.settled, omega)), **one.line())
    _note(axes, [one.name for one in drawn if one.settled is None], len(drawn))


def _draw_contraction(axes: "Axes", drawn: list[_Drawn], L: float, mu: float) -> None:
    axes.set(title="contraction per step", xlabel="curvature", ylabel="spectral radius")
    curvature = np.geomspace(mu / 10, 10 * L, _POINTS)
    known = [(one, one.converges) for one in drawn if one.converges is not None]
    for one, rule in known:
        axes.semilogx(curvature, spectral_radius(rule, one.rate, curvature), **one.line())
    _note(axes, [one.name for one in drawn if one.converges is None], len(drawn))
    if not known:
        return
    axes.axvspan(mu, L, color="0.93", label="the loss")
    if len(drawn) == 1:
        limit = float(stability_limit(known[0][1], 1.0)) / drawn[0].rate
        if mu / 10 < limit < 10 * L:
            axes.axvline(limit, color=_STYLES[1][0], linestyle=_STYLES[1][1], label="unstable beyond")
    axes.axhline(1.0, color="0.4", linewidth=0.8)
    axes.set_ylim(top=min(axes.get_ylim()[1], 2.0))
    axes.legend(frameon=False)


def _errors(one: _Drawn, ends: tuple[float, float], n: int) -> np.ndarray:
    """The errors of a run at the curvatures mu, between and L, of shape (n + 1, 3)."""
    mu, L = ends
    with np.errstate(over="ignore", invalid="ignore"):
        return abs(error_curve(one.rule, one.rate, np.array([mu, np.sqrt(mu * L), L]), n))


def _draw_run(axes: "Axes", drawn: list[_Drawn], ends: tuple[float, float], n: int) -> None:
    errors = _errors(drawn[0], ends, n)
    for error, (color, dashes), label in zip(errors.T, _STYLES, ("mu", "between", "L"), strict=False):
        axes.semilogy(error, color=color, linestyle=dashes, label=f"curvature {label}")
    _finish_run(axes, "a run from rest")


def _draw_runs(axes: "Axes", drawn: list[_Drawn], ends: tuple[float, float], n: int) -> None:
    for one in drawn:
        axes.semilogy(_errors(one, ends, n).max(1), **one.line())
    _finish_run(axes, "a run from rest, the largest of three errors")


def _finish_run(axes: "Axes", title: str) -> None:
    axes.set(title=title, xlabel="step", ylabel="error over its start")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-16))
    axes.legend(frameon=False)


def _note(axes: "Axes", missing: list[str], of: int) -> None:
    """Name the rules that have no line here, above each other: in the middle, or below the lines of the others."""
    bottom = 0.5 if len(missing) == of else 0.05
    for i, name in enumerate(missing):
        text = f"{name} depends on the step".strip()
        axes.text(0.5, bottom + 0.08 * i, text, ha="center", transform=axes.transAxes)
