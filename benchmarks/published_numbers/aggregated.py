"""Aggregated momentum against heavy balls on quadratics: steps per factor e at the best constant rate."""

import math
from collections.abc import Iterator

import numpy as np

import momentum_optax as mo
from momentum_optax import analysis

from .._run import Row
from .row import Bar, row


def steps_per_e(rule: mo.Filter, kappa: float) -> float:
    """Steps per factor e on quadratics, at the best of 2000 rates below the stability limit."""
    rates = analysis.stability_limit(rule, 1.0) * np.geomspace(1e-4, 1, 2000)[:-1]
    return -1 / math.log(analysis.contraction(rule, rates, 1 / kappa, 1.0).min())


def aggregated(bar: Bar) -> Iterator[Row]:
    """Steps per factor e of AggMo, of heavy balls of fixed decay and of the optimal one."""
    kappas = (10.0, 100.0, 1e3, 1e4)
    cases = [
        ("AggMo 0, 0.9, 0.99", mo.aggregated((0.0, 0.9, 0.99)), (18.0, 31.9, 96.6, 179.8)),
        ("heavy ball 0.9", mo.heavy_ball(0.9), (19.0, 19.0, 19.0, 265.8)),
        ("heavy ball 0.99", mo.heavy_ball(0.99), (199.0, 199.0, 199.0, 199.0)),
    ]
    for name, rule, known in cases:
        for kappa, number in zip(kappas, known, strict=True):
            yield row("aggregated", f"{name}, kappa {kappa:g}", steps_per_e(rule, kappa), number, 0.05 * number)
            bar.update()
    for kappa, number in zip(kappas, (1.5, 5.0, 15.8, 50.0), strict=True):
        tuned = mo.tuning.optimal_heavy_ball(1.0, 1 / kappa)
        radius = analysis.contraction(tuned.rule, tuned.learning_rate, 1 / kappa, 1.0)
        yield row("aggregated", f"optimal heavy ball, kappa {kappa:g}", -1 / math.log(radius), number, 0.05 * number)
        bar.update()
