"""Oracles of `rules/sums_and_averages.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

from tests.rules.oracles.row import AVERAGE_DECAY, FINITE, SUM_DECAY, Row


def heavy_ball(grad, x, steps, lr, h):
    # Polyak's two-point form: no velocity.
    before = x
    for t in range(steps):
        x, before = x - lr * grad(x) + h(t)["decay"] * (x - before), x
        yield x


def sgd_buffer(grad, x, steps, lr, h):
    # torch.optim.SGD, whose buffer is None before the first gradient, and the textbook's, which is zero.
    buffer = None
    for t in range(steps):
        g, p = grad(x), h(t)
        if buffer is None and p["first_step"] == "gradient":
            buffer = g
        else:
            buffer = p["decay"] * (0.0 if buffer is None else buffer) + (1 - p["dampening"]) * g
        x = x - lr * buffer
        yield x


def ema(grad, x, steps, lr, h):
    # The first moment of Adam, without its correction.
    m = 0.0
    for t in range(steps):
        m = h(t)["decay"] * m + (1 - h(t)["decay"]) * grad(x)
        x = x - lr * m
        yield x


def quasi_hyperbolic(grad, x, steps, lr, h):
    # Ma and Yarats' algorithm 1 (QHM).
    buffer = 0.0
    for t in range(steps):
        g, p = grad(x), h(t)
        buffer = p["decay"] * buffer + (1 - p["decay"]) * g
        x = x - lr * ((1 - p["nu"]) * g + p["nu"] * buffer)
        yield x


def simplified_ademamix(grad, x, steps, lr, h):
    # The code of Simplified AdEMAMix: a sum of gradients, plus alpha times this one.
    m = 0.0
    for t in range(steps):
        g = grad(x)
        m = h(t)["decay"] * m + g
        x = x - lr * (m + h(t)["alpha"] * g)
        yield x


ROWS = [
    Row("heavy_ball", heavy_ball, {"decay": 0.9}, {"decay": (-0.5, 0.95)}),
    Row("heavy_ball", heavy_ball, {"decay": -0.3}, {"decay": (-0.9, -0.1)}, variant="negative"),
    Row(
        "heavy_ball",
        sgd_buffer,
        {"decay": 0.9, "dampening": 0.4, "first_step": "zero"},
        {"decay": (0.5, 0.95), "dampening": (0.0, 0.9)},
        variant="dampened",
    ),
    Row(
        "heavy_ball",
        sgd_buffer,
        {"decay": 0.9, "dampening": 0.4, "first_step": "gradient"},
        {"decay": (0.5, 0.95), "dampening": (0.1, 0.9)},
        variant="torch",
    ),
    Row("ema", ema, {"decay": 0.95}, {"decay": (0.3, 0.99)}, 0.5),
    Row("quasi_hyperbolic", quasi_hyperbolic, {"decay": 0.95, "nu": 0.7}, {"decay": (0.5, 0.99), "nu": (-0.3, 1.2)}),
    Row(
        "simplified_ademamix",
        simplified_ademamix,
        {"decay": 0.9, "alpha": 2.0},
        {"decay": (0.5, 0.95), "alpha": (0, 4)},
    ),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "heavy_ball": {"decay": "(-1, 1]", "dampening": "[0, 1)"},
    "ema": AVERAGE_DECAY,
    "quasi_hyperbolic": {"decay": "(-1, 1)", "nu": FINITE},
    "simplified_ademamix": SUM_DECAY | {"alpha": "[0, inf)"},
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "heavy_ball": lambda decay: {"mu": decay},
    "ema": lambda decay: {"beta": decay},
    "simplified_ademamix": lambda decay, alpha: {"beta": decay, "alpha": alpha},
}
