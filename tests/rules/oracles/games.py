"""Oracles of `rules/games.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

import math

from tests.rules.oracles.row import FINITE, SUM_DECAY, Row


def optimistic(grad, x, steps, lr, h):
    # With the last gradient stored; the first change is zero.
    last = None
    for t in range(steps):
        g = grad(x)
        last = g if last is None else last
        x, last = x - lr * h(t)["alpha"] * g - lr * h(t)["beta"] * (g - last), g
        yield x


def complex_heavy_ball(grad, x, steps, lr, h):
    # Python's complex numbers; the buffer points downhill as in the paper.
    buffer = 0j
    for t in range(steps):
        decay = h(t)["decay"] * complex(math.cos(h(t)["angle"]), math.sin(h(t)["angle"]))
        buffer = decay * buffer - grad(x)
        x = x + lr * buffer.real
        yield x


ROWS = [
    Row("optimistic", optimistic, {"alpha": 1.0, "beta": 0.8}, {"alpha": (0.5, 1.5), "beta": (-0.5, 1)}),
    Row(
        "complex_heavy_ball", complex_heavy_ball, {"decay": 0.8, "angle": 0.4}, {"decay": (0.2, 0.9), "angle": (-1, 1)}
    ),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "optimistic": {"alpha": FINITE, "beta": FINITE},
    "complex_heavy_ball": SUM_DECAY | {"angle": FINITE},
}

SYMBOLS = {}
