"""Oracles of `rules/mixes.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

from tests.rules.oracles.row import AVERAGE_DECAY, FINITE, Row


def lion_mix(grad, x, steps, lr, h):
    # Lion's program without the sign: the update reads the average before the average is updated.
    m = 0.0
    for t in range(steps):
        g, p = grad(x), h(t)
        x = x - lr * (p["b1"] * m + (1 - p["b1"]) * g)
        m = p["b2"] * m + (1 - p["b2"]) * g
        yield x


def _lerp(a, b, weight):
    return a + weight * (b - a)


def muon_mix(grad, x, steps, lr, h):
    # Muon's code before the orthogonalisation: momentum.lerp_(grad, 1 - beta), grad.lerp(momentum, beta).
    m = 0.0
    for t in range(steps):
        g = grad(x)
        m = _lerp(m, g, 1 - h(t)["decay"])
        x = x - lr * _lerp(g, m, h(t)["decay"])
        yield x


def grokfast(grad, x, steps, lr, h):
    # gradfilter_ema: the dict of averages is filled with the first gradients, then updated at once.
    average = None
    for t in range(steps):
        g, p = grad(x), h(t)
        average = g if average is None else average
        average = average * p["decay"] + g * (1 - p["decay"])
        x = x - lr * (g + average * p["amplification"])
        yield x


def mars_mix(grad, x, steps, lr, h):
    # MARS-approx as coded: last_grad is zero before the first step.
    m, last = 0.0, 0.0
    for t in range(steps):
        g, b = grad(x), h(t)["decay"]
        c = (g - last) * (h(t)["gamma"] * (b / (1 - b))) + g
        m, last = b * m + (1 - b) * c, g
        x = x - lr * m
        yield x


ROWS = [
    Row("lion_mix", lion_mix, {"b1": 0.9, "b2": 0.98}, {"b1": (0.5, 0.95), "b2": (0.8, 0.99)}),
    Row("muon_mix", muon_mix, {"decay": 0.95}, {"decay": (0.3, 0.98)}),
    Row(
        "grokfast",
        grokfast,
        {"decay": 0.95, "amplification": 2.0},
        {"decay": (0.8, 0.99), "amplification": (0.5, 3)},
        0.1,
    ),
    Row("mars_mix", mars_mix, {"decay": 0.95, "gamma": 0.1}, {"decay": (0.5, 0.97), "gamma": (-0.05, 0.2)}),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "lion_mix": {"b1": "[0, 1)", "b2": "[0, 1)"},
    "muon_mix": AVERAGE_DECAY,
    "grokfast": AVERAGE_DECAY | {"amplification": "[0, inf)"},
    "mars_mix": AVERAGE_DECAY | {"gamma": FINITE},
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "lion_mix": lambda b1, b2: {"b1": b1, "b2": b2},
    "muon_mix": lambda decay: {"beta": decay},
    "grokfast": lambda decay, amplification: {"alpha": decay, "lambda_": amplification},
    "mars_mix": lambda decay, gamma: {"beta": decay, "gamma": gamma},
}
