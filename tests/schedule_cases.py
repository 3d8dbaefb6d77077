"""The table of schedules: a call of each, and its values by the papers' own recurrences and case distinctions."""

import math

import numpy as np

from momentum_optax import schedules


def sutskever(t, limit=0.99):
    return min(1 - 2 ** (-1 - math.log2(t // 250 + 1)), limit)


def fista_sequence(n):
    t, out = 1.0, []
    for _ in range(n):
        after = (1 + math.sqrt(1 + 4 * t**2)) / 2
        out.append((t - 1) / after)
        t = after
    return out


def demon(t, b=0.9, T=50):
    left = max(1 - t / T, 0)
    return b * left / ((1 - b) + b * left)


def srsgd(t, periods=(40, 100)):
    k = 1 + t - max(p for p in (0, *periods) if p <= t)
    return (k - 1) / (k + 2)


def one_cycle(t, T=100, low=0.85, high=0.95):
    return np.interp(t, [0, 30, 100], [high, low, high])


def alpha(t, T=10):
    return 5.0 * (t + 1) / T if t + 1 < T else 5.0


def half_life(t, start=0.9, end=0.9999, T=20):
    def f(b):
        return math.log(0.5) / math.log(b) - 1

    a = min((t + 1) / T, 1)
    return 0.5 ** (1 / ((1 - a) * f(start) + a * f(end) + 1))


def fsgdm(t, sigma=1050, stages=300, c=0.033):
    # The code's counter is a float that begins at 1.0.
    length = sigma // stages
    stage = ((t + 1.0) // length) * length
    return stage / (stage + c * sigma)


def muon_momentum(t, total=1000, low=0.85, high=0.95):
    if t < 300:
        return low + t / 300 * (high - low)
    if t > total - 50:
        return max(high - (t - (total - 50)) / 50 * (high - low), low)
    return high


FISTA = fista_sequence(200_001)
# Of each schedule its arguments and the paper's value at a step.
CASES = {
    "sutskever": ((0.99,), sutskever),
    "fista": ((), lambda t: FISTA[t]),
    "nesterov_convex": ((), lambda t: t / (t + 3)),
    "demon": ((0.9, 50), demon),
    "restarted": ((schedules.nesterov_convex(), (40, 100)), srsgd),
    "cyclical": ((0.85, 0.95, 20), lambda t: np.interp(t % 20, [0, 10, 20], [0.95, 0.85, 0.95])),
    "one_cycle": ((100,), one_cycle),
    "ramp": ((5.0, 10), alpha),
    "half_life_ramp": ((0.9, 0.9999, 20), half_life),
    "fsgdm": ((1050,), fsgdm),
    "muon_momentum": ((1000,), muon_momentum),
    "power_average": ((2.0, 10), lambda t: math.prod([(t - 10) / (t - 9)] * 3) if t >= 10 else 0.0),
    "momentum_correction": (
        (0.9, lambda t: 1 / (t + 1.0)),
        lambda t: 0.9 * (t + 1) / max(t, 1),
    ),
}
