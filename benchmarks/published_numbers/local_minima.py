"""Local minima of x^2/20 + 1 - cos 2x: the share of starts from which momentum finds the lowest."""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

import momentum_optax as mo

from .._run import Row
from .row import Bar, row

STARTS = 4000
DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


# From a shape.
Noise: TypeAlias = Callable[[tuple[int, ...]], np.ndarray]


def slope(x: np.ndarray) -> np.ndarray:
    """The derivative of x^2/20 + 1 - cos 2x."""
    return np.asarray(0.1 * x + 2 * np.sin(2 * x))


def travel(rule: mo.Filter, rate: float, x: np.ndarray, steps: int, noise: Noise | None = None) -> np.ndarray:
    """The point that a run from rest reaches after `steps` steps; `noise` draws an addition to the gradient."""
    A, B, C, D = rule.pruned().matrices()
    v = np.zeros((len(B), *x.shape))
    for _ in range(steps):
        g = slope(x) if noise is None else slope(x) + noise(x.shape)
        x, v = x - rate * (np.tensordot(C, v, 1) + D * g), np.tensordot(A, v, 1) + np.multiply.outer(B, g)
    return x


def settle(x: np.ndarray) -> np.ndarray:
    """The minimum that plain descent finds from here."""
    return travel(mo.heavy_ball(0.0), 0.1, x, 500)


def share(x: np.ndarray) -> float:
    """The share of points in the basin of the lowest minimum, at 0."""
    return float(np.mean(abs(settle(x)) < 0.5))


MINIMA: dict[str, tuple[Callable[[float], mo.Filter], Callable[[float], float], float, tuple[float, ...]]] = {
    "rate 0.1, heavy ball": (mo.heavy_ball, lambda b: 0.1, 0.0, (0.134, 0.134, 0.134, 0.222, 0.206, 0.192, 0.232)),
    "rate 0.1, Nesterov": (mo.nesterov, lambda b: 0.1, 0.0, (0.134, 0.134, 0.134, 0.134, 0.134, 0.178, 0.154)),
    "effective rate 0.1": (
        mo.heavy_ball,
        lambda b: 0.1 * (1 - b),
        0.0,
        (0.134, 0.134, 0.134, 0.134, 0.134, 0.134, 0.228),
    ),
    "effective rate 0.45": (
        mo.heavy_ball,
        lambda b: 0.45 * (1 - b),
        0.0,
        (0.134, 0.134, 0.134, 0.134, 0.203, 0.280, 0.235),
    ),
    "noise 3, rate 0.01": (mo.heavy_ball, lambda b: 0.01, 3.0, (0.135, 0.134, 0.144, 0.464, 0.415, 0.269, 0.184)),
    "noise 3, effective rate 0.1": (
        mo.heavy_ball,
        lambda b: 0.1 * (1 - b),
        3.0,
        (0.562, 0.543, 0.500, 0.470, 0.436, 0.425, 0.391),
    ),
}


def local_minima(bar: Bar) -> Iterator[Row]:
    """Shares that reach the lowest basin. Both numbers have a standard error of at most 0.008: twice that of both."""
    allowed = 2 * math.sqrt(2) * 0.008
    for name, (build, rate, sigma, known) in MINIMA.items():
        for decay, number in zip(DECAYS, known, strict=True):
            rng = np.random.default_rng(0)
            x = rng.uniform(-12, 12, STARTS)
            noise = (lambda shape, rng=rng, sigma=sigma: sigma * rng.standard_normal(shape)) if sigma else None
            end = travel(build(decay), rate(decay), x, 2000 if sigma else 500, noise)
            yield row("local minima", f"{name}, decay {decay:g}", share(end), number, allowed)
            bar.update()
    # 500 gradients: one run of 500 steps above, or restarts from elsewhere, the best of which is kept.
    for count, steps, number in ((10, 50, 0.763), (20, 25, 0.944)):
        x = np.random.default_rng(1).uniform(-12, 12, (count, STARTS))
        ends = travel(mo.heavy_ball(0.0), 0.1, x, steps)
        best = np.take_along_axis(ends, np.argmin(ends**2 / 20 + 1 - np.cos(2 * ends), 0)[None], 0)[0]
        yield row("local minima", f"{count} random restarts of {steps} steps of descent", share(best), number, allowed)
        bar.update()
    x = np.random.default_rng(0).uniform(-12, 12, STARTS)
    ball, descent = (abs(settle(travel(mo.heavy_ball(b), 0.1, x, 500))) for b in (0.9, 0.0))
    yield row("local minima", "ends lower than descent, decay 0.9", float(np.mean(ball < descent - 1)), 0.168, allowed)
    yield row("local minima", "ends higher than descent, decay 0.9", float(np.mean(ball > descent + 1)), 0.0, 0.0)
