"""Regression with batches of one: contraction of second moments, and its dependence on the condition number."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

import momentum_optax as mo
from momentum_optax import analysis

from .._run import Row
from .row import Bar, row

Build = Callable[..., tuple[mo.Filter, float]]


def mean_square_rate(rule: mo.Filter, rates: np.ndarray, kappa: float) -> np.ndarray:
    """Contraction per step of the second moments of (theta, v), for inputs e1 or sqrt(2/kappa) e2 with chance 1/2 each.

    A step moves one coordinate along its gradient; the other lets its velocity run on. The second moments follow the
    mean of M x M, whose spectral radius is the rate; coordinates do not mix.
    """
    idle = analysis.closed_loop(rule, rates, 0.0)
    worst = np.zeros(rates.shape)
    for curvature in (1.0, 2 / kappa):
        hit = analysis.closed_loop(rule, rates, curvature)
        operator = sum(np.einsum("nij,nkl->nikjl", M, M) for M in (hit, idle)) / 2
        size = hit.shape[-1] ** 2
        worst = np.maximum(worst, abs(np.linalg.eigvals(operator.reshape(-1, size, size))).max(-1))
    return worst


def best_rate(build: Build, box: list[tuple[float, float]], kappa: float, points: int = 11, rounds: int = 6) -> float:
    """The least rate, by zooming, in a box of logarithms of parameters, the first of which scales the learning rate."""
    best, low, high = np.inf, *(np.array(ends) for ends in zip(*box, strict=True))
    for _ in range(rounds):
        axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
        center = (low + high) / 2
        for rest in itertools.product(*axes[1:]):
            rule, unit = build(*np.exp(rest))
            rates = mean_square_rate(rule, np.exp(axes[0]) * unit, kappa)
            if rates.min() < best:
                best, center = float(rates.min()), np.array([axes[0][rates.argmin()], *rest])
        span = (high - low) / (points - 1) * 1.5
        low, high = np.maximum(center - span, [a for a, _ in box]), np.minimum(center + span, [b for _, b in box])
    return best


def _average(forget: float, direct: float) -> tuple[mo.Filter, float]:
    """A quasi-hyperbolic rule whose raw gradient has the share `direct`, and the rate that gives its D the value 1."""
    rule = mo.quasi_hyperbolic(1 - forget, 1 - direct)
    return rule, 1 / rule.matrices()[3]


def regression(bar: Bar) -> Iterator[Row]:
    """Slope of the logarithm of steps per factor e over that of the condition number."""
    forget, rate = (math.log(1e-4), math.log(0.999)), (math.log(0.02), math.log(3.999))
    cases: list[tuple[str, Build, list[tuple[float, float]], float]] = [
        ("plain descent", lambda: (mo.heavy_ball(0.0), 1.0), [rate], 0.989),
        ("heavy ball", lambda f: (mo.heavy_ball(1 - f), f), [rate, forget], 0.898),
        ("Nesterov", lambda f: (mo.nesterov(1 - f), 1.0), [rate, forget], 0.487),
        ("quasi-hyperbolic", _average, [rate, forget, forget], 0.505),
    ]
    kappas = 4.0 ** np.arange(2, 7)
    for name, build, box, known in cases:
        steps = []
        for kappa in kappas:
            steps.append(-1 / math.log(best_rate(build, box, kappa, points=41 if len(box) < 3 else 13)))
            bar.update()
        slope = float(np.polyfit(np.log(kappas), np.log(steps), 1)[0])
        last = float(np.diff(np.log(steps))[-1] / np.log(4.0))
        yield row(
            "regression", name, slope, known, 0.035, steps=[round(s, 2) for s in steps], last_slope=round(last, 4)
        )
