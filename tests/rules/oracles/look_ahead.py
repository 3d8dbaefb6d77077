"""Oracles of `rules/look_ahead.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

import math

from tests.rules.oracles.row import AVERAGE_DECAY, FINITE, SUM_DECAY, Row


def nesterov(grad, y, steps, lr, h):
    # Two sequences: a gradient step from y gives x, extrapolating x gives y.
    x = y
    for t in range(steps):
        before, x = x, y - lr * grad(y)
        y = x + h(t)["decay"] * (x - before)
        yield y, x


def torch_nesterov(grad, y, steps, lr, h):
    # torch.optim.SGD(nesterov=True); its buffer is None before the first gradient.
    buffer = None
    for t in range(steps):
        g, p = grad(y), h(t)
        buffer = g if buffer is None else p["decay"] * buffer + (1 - p["dampening"]) * g
        y = y - lr * (g + p["decay"] * buffer)
        yield y


def nadam_mix(grad, x, steps, lr, h):
    # torch.optim.NAdam with the running product of the momenta.
    m, product = 0.0, 1.0
    for t in range(1, steps + 1):
        g, b, psi = grad(x), h(t - 1)["decay"], h(t - 1)["psi"]
        mu, mu_next = (b * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        product *= mu
        m = b * m + (1 - b) * g
        x = x - lr * (g * (1 - mu) / (1 - product) + m * mu_next / (1 - product * mu_next))
        yield x


def schedule_free(grad, y, steps, lr, h):
    # Three sequences: z moves, x averages z, y lies between them. The code's running sum of weights: its scheduled rate
    # during the warm-up, to a power.
    z = x = y
    total, warmup, power = 0.0, h(0)["warmup_steps"], h(0)["weight_power"]
    for t in range(steps):
        weight = ((t + 1) / warmup if t < warmup else 1.0) ** power
        total += weight
        z = z - lr * grad(y)
        x = (1 - weight / total) * x + weight / total * z
        y = (1 - h(t + 1)["beta"]) * z + h(t + 1)["beta"] * x
        yield y, x


def overshoot(grad, y, steps, lr, h):
    # The base weights move by the heavy ball's step; the gradient is taken where they would be gamma steps on.
    base, m = y, 0.0
    for t in range(steps):
        m = h(t)["decay"] * m + grad(y)
        base = base - lr * m
        y = base - lr * h(t + 1)["overshoot"] * m
        yield y, base


def optimized_gradient(grad, y, steps, lr, h):
    # Kim and Fessler's OGM1; after its N steps the last theta stays.
    x, theta, N = y, 1.0, h(0)["steps"]
    for t in range(steps):
        root = 8 if t == N - 1 else 4
        later = (1 + math.sqrt(1 + root * theta**2)) / 2 if t < N else theta
        before, x = x, y - lr * grad(y)
        y = x + (theta - 1) / later * (x - before) + theta / later * (x - y)
        theta = later
        yield y, x


ROWS = [
    Row("nesterov", nesterov, {"decay": 0.9}, {"decay": (0.0, 0.97)}, evaluates=True),
    Row("torch_nesterov", torch_nesterov, {"decay": 0.9, "dampening": 0.0}, {"decay": (0.5, 0.95)}),
    Row(
        "torch_nesterov",
        torch_nesterov,
        {"decay": 0.9, "dampening": 0.4},
        {"decay": (0.5, 0.95), "dampening": (0.1, 0.9)},
        variant="dampened",
    ),
    Row("nadam_mix", nadam_mix, {"decay": 0.9, "psi": 0.004}, {}),
    Row("nadam_mix", nadam_mix, {"decay": 0.99, "psi": 3.0}, {}, variant="fast"),
    Row(
        "schedule_free",
        schedule_free,
        {"beta": 0.9, "warmup_steps": 20, "weight_power": 2.0},
        {"beta": (0.0, 1.0)},
        0.5,
        evaluates=True,
    ),
    Row(
        "overshoot",
        overshoot,
        {"decay": 0.9, "overshoot": 3.0},
        {"decay": (0.5, 0.93), "overshoot": (0.0, 4.0)},
        0.1,
        evaluates=True,
    ),
    Row("optimized_gradient", optimized_gradient, {"steps": 150}, {}, 0.5, evaluates=True),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "nesterov": SUM_DECAY,
    "torch_nesterov": SUM_DECAY | {"dampening": "[0, 1)"},
    "nadam_mix": AVERAGE_DECAY | {"psi": "(0, inf)"},
    "schedule_free": {"beta": "[0, 1]", "warmup_steps": "at least 0", "weight_power": "[0, inf)"},
    "overshoot": {"decay": "(-1, 1]", "overshoot": FINITE},
    "optimized_gradient": {"steps": "at least 1"},
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "nesterov": lambda decay: {"mu": decay},
    "torch_nesterov": lambda decay: {"mu": decay},
    "overshoot": lambda decay, overshoot: {"mu": decay, "gamma": overshoot},
}
