"""Oracles of the rules of `contrib`: loops in the papers' forms, hyperparameters, intervals, symbols."""

import collections
import math

from tests.rules.oracles.row import Row
from tests.rules.oracles.several_velocities import pid


def _tied(h):
    """Recht's pole, which his gains decide."""
    return lambda t: h(t) | {"decay": h(t)["derivative"] / (h(t)["derivative"] - h(t)["proportional"])}


def recht_pid(grad, x, steps, lr, h):
    # The positional form with the tied pole; numbers only.
    yield from pid(grad, x, steps, lr, _tied(h))


def recht_pid_as_qhm(grad, x, steps, lr, h):
    # Scheduled gains mean QHM with the step's own conversion (Ma and Yarats, table 1), whose rate is k_I.
    buffer = 0.0
    for t in range(steps):
        g, p = grad(x), _tied(h)(t)
        nu = p["proportional"] ** 2 / (p["integral"] * p["derivative"])
        buffer = p["decay"] * buffer + (1 - p["decay"]) * g
        x = x - lr * p["integral"] * ((1 - nu) * g + nu * buffer)
        yield x


def grokfast_average(grad, x, steps, lr, h):
    # gradfilter_ma with filter_type="mean", warmup=True.
    queue = collections.deque(maxlen=h(0)["window"])
    for t in range(steps):
        g = grad(x)
        queue.append(g)
        if len(queue) == queue.maxlen:
            g = g + sum(queue) / len(queue) * h(t)["amplification"]
        x = x - lr * g
        yield x


def implicit_transport(grad, y, steps, lr, h):
    # torch_igt's MomentumIGT without momentum: true parameters, and transported ones for the next gradient.
    velocity, true = 0.0, y
    for t in range(steps):
        delta, delta_next = h(t)["delta"], h(t + 1)["delta"]
        gamma, future = t / (t + delta), (t + 1) / (t + 1 + delta_next)
        velocity = gamma * velocity + (1 - gamma) * grad(y)
        true = true - lr * velocity
        y = true - lr * future / (1 - future) * velocity
        yield y, true


def optimized_gradient_norm(grad, x, steps, lr, h):
    # OGM-G with its thetas counted down from N; plain descent after N steps.
    N, theta = h(0)["steps"], [1.0]
    for i in range(N):
        theta.append((1 + math.sqrt(1 + (8 if i == N - 1 else 4) * theta[i] ** 2)) / 2)
    theta.reverse()
    y = x
    for t in range(steps):
        before, y = y, x - lr * grad(x)
        if t < N:
            now, later = theta[t], theta[t + 1]
            first = (now - 1) * (2 * later - 1) / (now * (2 * now - 1))
            x = y + first * (y - before) + (2 * later - 1) / (2 * now - 1) * (y - x)
        else:
            x = y
        yield x, y


ROWS = [
    Row(
        "recht_pid",
        recht_pid,
        {"proportional": -1.9, "integral": 0.3, "derivative": 17.0},
        {"proportional": (-2.2, -1.5), "integral": (0.2, 0.4), "derivative": (12, 20)},
        1.0,
        scheduled_reference=recht_pid_as_qhm,
    ),
    Row("grokfast_average", grokfast_average, {"window": 6, "amplification": 2.0}, {"amplification": (0, 3)}, 0.1),
    Row("implicit_transport", implicit_transport, {"delta": 1.0}, {"delta": (1.0, 3.0)}, 0.1, evaluates=True),
    Row("optimized_gradient_norm", optimized_gradient_norm, {"steps": 150}, {}, 0.5, evaluates=True),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "recht_pid": {"proportional": "(-inf, 0)", "integral": "(0, inf)", "derivative": "(0, inf)"},
    "implicit_transport": {"delta": "(0, inf)"},
    "optimized_gradient_norm": {"steps": "at least 1"},
    "grokfast_average": {"window": "at least 2", "amplification": "[0, inf)"},
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "recht_pid": lambda proportional, integral, derivative: {
        "k_P": proportional,
        "k_I": integral,
        "k_D": derivative,
    },
}
