"""Oracles of `rules/several_velocities.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

import math

import momentum_optax as mo
from tests.rules.oracles.row import AVERAGE_DECAY, FINITE, Row


def aggregated(grad, x, steps, lr, h):
    # AggMo's velocities point downhill: v_i = beta_i v_i - g, x = x + lr/K sum v_i.
    v = [0.0, 0.0, 0.0]
    for t in range(steps):
        g, p = grad(x), h(t)
        v = [p[name] * one - g for name, one in zip(("b0", "b1", "b2"), v, strict=True)]
        x = x + lr / 3 * sum(v)
        yield x


def aggregated_exponential(grad, x, steps, lr, h):
    # The same with beta_i = 1 - a^i, i = 0, ..., K - 1.
    v = [0.0] * h(0)["count"]
    for t in range(steps):
        g = grad(x)
        v = [(1 - h(t)["base"] ** i) * one - g for i, one in enumerate(v)]
        x = x + lr / len(v) * sum(v)
        yield x


def ademamix_mix(grad, x, steps, lr, h):
    # The AdEMAMix code: step counts from 1, only the fast average is corrected.
    fast = slow = 0.0
    for t in range(steps):
        g, p, step = grad(x), h(t), t + 1
        fast = p["fast"] * fast + (1 - p["fast"]) * g
        slow = p["slow"] * slow + (1 - p["slow"]) * g
        x = x - lr * (fast / (1 - p["fast"] ** step) + p["alpha"] * slow)
        yield x


def pid(grad, x, steps, lr, h):
    # The positional form: where the controller is follows from all errors so far; numbers only.
    start, total, last, w = x, 0.0, 0.0, 0.0
    for t in range(steps):
        e, p = -grad(x), h(t)
        total = total + e
        w, last = p["decay"] * w + (1 - p["decay"]) * (e - last), e
        x = start + lr * (p["proportional"] * e + p["integral"] * total + p["derivative"] * w)
        yield x


def pid_increments(grad, x, steps, lr, h):
    # The velocity form of a controller, which does not jump when a gain changes: each gain times its own increment.
    last, w = 0.0, 0.0
    for t in range(steps):
        e, p = -grad(x), h(t)
        filtered = p["decay"] * w + (1 - p["decay"]) * (e - last)
        x = x + lr * (p["proportional"] * (e - last) + p["integral"] * e + p["derivative"] * (filtered - w))
        last, w = e, filtered
        yield x


def adan_mix(grad, x, steps, lr, h):
    # Adan with the last gradient stored; the first change is zero.
    m, d, last = 0.0, 0.0, None
    for t in range(steps):
        g, p = grad(x), h(t)
        last = g if last is None else last
        m = p["b1"] * m + (1 - p["b1"]) * g
        d, last = p["b2"] * d + (1 - p["b2"]) * (g - last), g
        x = x - lr * (m + p["b2"] * d)
        yield x


def positive_negative(grad, x, steps, lr, h):
    # The code: two buffers that take the gradients of odd and of even steps.
    buffers = [0.0, 0.0]
    for t in range(steps):
        g, b, n = grad(x), h(t)["decay"], h(t)["beta0"]
        newest, other = t % 2, 1 - t % 2
        buffers[newest] = b**2 * buffers[newest] + (1 - b**2) * g
        noise_norm = math.sqrt((1 + n) ** 2 + n**2)
        x = x - lr / noise_norm * ((1 + n) * buffers[newest] - n * buffers[other])
        yield x


def _three(b0, b1, b2):
    return mo.aggregated((b0, b1, b2))


ROWS = [
    Row(
        "aggregated",
        aggregated,
        {"b0": 0.0, "b1": 0.9, "b2": 0.97},
        {"b0": (0.0, 0.3), "b1": (0.5, 0.95), "b2": (0.8, 0.97)},
        0.1,
        build=_three,
    ),
    Row("aggregated_exponential", aggregated_exponential, {"base": 0.3, "count": 4}, {"base": (0.3, 0.6)}, 0.1),
    Row(
        "ademamix_mix",
        ademamix_mix,
        {"fast": 0.8, "slow": 0.98, "alpha": 2.0},
        {"fast": (0.5, 0.95), "slow": (0.9, 0.999), "alpha": (0.0, 3.0)},
    ),
    Row(
        "pid",
        pid,
        {"proportional": 0.4, "integral": 0.3, "derivative": 0.2, "decay": 0.8},
        {"proportional": (-0.1, 0.5), "integral": (0.1, 0.4), "derivative": (-0.2, 0.4), "decay": (0.3, 0.9)},
        1.0,
        scheduled_reference=pid_increments,
    ),
    Row(
        "positive_negative",
        positive_negative,
        {"decay": 0.9, "beta0": 1.0},
        {"decay": (0.3, 0.95), "beta0": (0.0, 2.0)},
        0.5,
    ),
    Row("adan_mix", adan_mix, {"b1": 0.95, "b2": 0.9}, {"b1": (0.5, 0.98), "b2": (0.3, 0.95)}),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "aggregated": {"b0": "[0, 1]", "b1": "[0, 1]", "b2": "[0, 1]"},
    "aggregated_exponential": {"base": "(0, 1)", "count": "at least 1"},
    "ademamix_mix": {"fast": "[0, 1)", "slow": "[0, 1)", "alpha": "[0, inf)"},
    "pid": AVERAGE_DECAY | {"proportional": FINITE, "integral": FINITE, "derivative": FINITE},
    "adan_mix": {"b1": "[0, 1)", "b2": "[0, 1)"},
    "positive_negative": {"decay": "[0, 1)", "beta0": "[0, inf)"},
}

SYMBOLS = {}
