"""Oracles of `rules/after_optimizer.py`: loops in the papers' forms, hyperparameters, intervals, symbols.

`grad` may be the step of any optimizer, learning rate included; `lr` is then 1.
"""

from tests.rules.oracles.row import Row


def primal_averaging(grad, y, steps, lr, h):
    # GPA: z is stepped, x averages z, y lies between them.
    x = z = y
    for t in range(steps):
        z = z - lr * grad(y)
        x = h(t)["mu_x"] * x + (1 - h(t)["mu_x"]) * z
        y = h(t + 1)["mu_y"] * x + (1 - h(t + 1)["mu_y"]) * z
        yield y, x


def ema_nesterov(grad, theta, steps, lr, h):
    # The wrapper's order: look ahead, step there, average the displacement of theta.
    m = 0.0
    for t in range(steps):
        y = theta + h(t)["lookahead"] * m
        before, theta = theta, y - lr * grad(y)
        m = h(t)["decay"] * m + (1 - h(t)["decay"]) * (theta - before)
        yield theta + h(t + 1)["lookahead"] * m, theta


def outer_nesterov(grad, inner, steps, lr, h):
    # SNOO's outer optimizer is torch.optim.SGD(nesterov=True) on outer - inner.
    outer, buffer = inner, 0.0
    for t in range(steps):
        p, inner = h(t), inner - lr * grad(inner)
        if (t + 1) % p["period"] == 0:
            gap = outer - inner
            buffer = p["decay"] * buffer + gap
            inner = outer = outer - p["learning_rate"] * (gap + p["decay"] * buffer)
        yield inner, outer


def lookahead(grad, fast, steps, lr, h):
    # Two loops: k fast steps, then the slow weights go a part of the way.
    slow, t = fast, 0
    while True:
        for _ in range(h(t)["period"] - 1):
            fast = fast - lr * grad(fast)
            yield fast, slow
            t += 1
            if t == steps:
                return
        fast = fast - lr * grad(fast)
        slow = slow + h(t)["step_size"] * (fast - slow)
        fast = slow
        yield fast, slow
        t += 1
        if t == steps:
            return


ROWS = [
    Row(
        "primal_averaging",
        primal_averaging,
        {"mu_x": 0.95, "mu_y": 0.7},
        {"mu_x": (0.3, 0.97), "mu_y": (0.0, 1.0)},
        0.5,
        evaluates=True,
    ),
    Row(
        "ema_nesterov",
        ema_nesterov,
        {"decay": 0.95, "lookahead": 0.6},
        {"decay": (0.3, 0.99), "lookahead": (0.0, 0.8)},
        evaluates=True,
    ),
    Row(
        "outer_nesterov",
        outer_nesterov,
        {"period": 7, "learning_rate": 0.7, "decay": 0.5},
        {"learning_rate": (0.3, 0.9), "decay": (0.0, 0.7)},
        0.5,
        evaluates=True,
    ),
    Row("lookahead", lookahead, {"period": 6, "step_size": 0.5}, {"step_size": (0.2, 1.0)}, 0.5, evaluates=True),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "primal_averaging": {"mu_x": "[0, 1)", "mu_y": "[0, 1]"},
    "ema_nesterov": {"decay": "[0, 1)", "lookahead": "[0, 1)"},
    "outer_nesterov": {"period": "at least 1", "learning_rate": "(0, inf)", "decay": "[0, 1)"},
    "lookahead": {"period": "at least 1", "step_size": "(0, 1]"},
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "primal_averaging": lambda mu_x, mu_y: {"mu_x": mu_x, "mu_y": mu_y},
    "ema_nesterov": lambda decay, lookahead: {"c": decay, "b": lookahead},
}
