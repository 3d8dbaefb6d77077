"""Nesterov's rule with restarts on a quadratic: steps until the loss is 1e-10 of its start."""

from collections.abc import Iterator

import numpy as np

import momentum_optax as mo

from .._run import Row
from .row import Bar, row


def steps_to_converge(rule: mo.Filter, seed: int, restart: str = "never", condition: float = 1e4) -> tuple[int, int]:
    """Steps until the loss is 1e-10 of its start, and the restarts on the way.

    A restart begins the rule's schedule anew; Nesterov's, whose first momentum is zero, then forgets its velocity. The
    loss that counts, and that the function test looks at, is the one at the evaluation point x.
    """
    curvature = np.geomspace(1 / condition, 1, 200)
    y = np.random.default_rng(seed).normal(size=200)
    v, age, restarts = np.zeros(200), 0, 0
    start = before = _loss(curvature, y)
    step = 0
    while True:
        step += 1
        g = curvature * y
        # The next x is y - g, and x + v is y: the move from x to it is -(v + g).
        loss = _loss(curvature, y - g)
        if (restart == "gradient" and g @ (v + g) < 0) or (restart == "function" and loss > before):
            age, restarts = 0, restarts + 1
        (((a,),), (b,), (c,), d) = (getattr(rule.at(age), name) for name in "ABCD")
        y, v = y - (c * v + d * g), a * v + b * g
        age, before = age + 1, loss
        if loss <= 1e-10 * start:
            return step, restarts


def _loss(curvature: np.ndarray, x: np.ndarray) -> float:
    return 0.5 * float(curvature @ (x * x))


def restarts(bar: Bar) -> Iterator[Row]:
    """Steps with and without restarts; the first start is compared, four more give the range."""
    fista, tuned = mo.nesterov(mo.schedules.fista()), mo.tuning.smooth_nesterov(1.0, 1e-4).rule
    cases: list[tuple[str, mo.Filter, str, int]] = [
        ("constant decay", tuned, "never", 799),
        ("no restart", fista, "never", 6414),
        ("restart by loss", fista, "function", 1351),
        ("restart by gradient", fista, "gradient", 1347),
        ("plain descent", mo.heavy_ball(0.0), "never", 49552),
    ]
    for name, rule, kind, known in cases:
        counts = []
        for seed in range(5):
            counts.append(steps_to_converge(rule, seed, kind))
            bar.update()
        steps = [count for count, _ in counts]
        yield row(
            "restarts", name, steps[0], known, 0.01 * known, restarts=counts[0][1], over_starts=[min(steps), max(steps)]
        )
