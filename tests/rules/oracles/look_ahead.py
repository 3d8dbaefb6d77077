"""Oracles of `rules/look_ahead.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

from tests.rules.oracles.row import AVERAGE_DECAY, SUM_DECAY, Row


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
    # Three sequences: z moves, x averages z, y lies between them.
    z = x = y
    for t in range(steps):
        z = z - lr * grad(y)
        x = (1 - 1 / (t + 1)) * x + 1 / (t + 1) * z
        y = (1 - h(t + 1)["beta"]) * z + h(t + 1)["beta"] * x
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
    Row("schedule_free", schedule_free, {"beta": 0.9}, {"beta": (0.0, 1.0)}, 0.5, evaluates=True),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "nesterov": SUM_DECAY,
    "torch_nesterov": SUM_DECAY | {"dampening": "[0, 1)"},
    "nadam_mix": AVERAGE_DECAY | {"psi": "(0, inf)"},
    "schedule_free": {"beta": "[0, 1]"},
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "nesterov": lambda decay: {"mu": decay},
    "torch_nesterov": lambda decay: {"mu": decay},
}
