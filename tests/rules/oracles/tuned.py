"""Oracles of `rules/tuned.py`: loops in the papers' forms, hyperparameters, intervals, symbols."""

import math

from tests.rules.oracles.row import CURVATURES, FINITE, Row


def synthesized_nesterov(grad, y, steps, lr, h):
    # Lessard, Recht and Packard: x_{t+1} = x_t + b1 (x_t - x_{t-1}) - alpha g(y_t), y_t = x_t + b2 (x_t - x_{t-1}).
    x = before = y
    for t in range(steps):
        x, before = x + h(t)["decay"] * (x - before) - lr * grad(y), x
        y = x + h(t + 1)["lookahead"] * (x - before)
        yield y, x


def triple_momentum(grad, y, steps, lr, h):
    # Van Scoy, Freeman and Lynch: xi, y and the output x.
    def constants(t):
        p = h(t)
        rho = 1 - math.sqrt(p["mu"] / p["L"])
        alpha, beta = (1 + rho) / p["L"], rho**2 / (2 - rho)
        return alpha, beta, rho**2 / ((1 + rho) * (2 - rho)), rho**2 / (1 - rho**2)

    xi = before = y
    for t in range(steps):
        alpha, beta, _, _ = constants(t)
        xi, before = (1 + beta) * xi - beta * before - lr * alpha * grad(y), xi
        _, _, gamma, delta = constants(t + 1)
        y = (1 + gamma) * xi - gamma * before
        yield y, (1 + delta) * xi - delta * before


def robust_momentum(grad, y, steps, lr, h):
    # Cyrus, Hu, Van Scoy and Lessard: x and y.
    def constants(t):
        p = h(t)
        kappa = p["L"] / p["mu"]
        rho = 1 - 1 / math.sqrt(kappa) if p["rho"] is None else p["rho"]
        alpha = kappa * (1 - rho) ** 2 * (1 + rho) / p["L"]
        return alpha, kappa * rho**3 / (kappa - 1), rho**3 / ((kappa - 1) * (1 - rho) ** 2 * (1 + rho))

    x = before = y
    for t in range(steps):
        alpha, beta, _ = constants(t)
        x, before = x + beta * (x - before) - lr * alpha * grad(y), x
        y = x + constants(t + 1)[2] * (x - before)
        yield y, x


def accelerated(grad, x, steps, lr, h):
    # The AccSGD code, line by line; its buffer starts as a copy of the parameters.
    buffer = x
    for t in range(steps):
        g, p = grad(x), h(t)
        long_lr = lr * p["kappa"] / p["epsilon"]
        beta = p["epsilon"] ** 2 * p["xi"] / p["kappa"]
        zeta = p["epsilon"] / (p["epsilon"] + beta)
        buffer = ((1 / beta - 1) * buffer - long_lr * g + x) * beta
        x = zeta * (x - lr * g) + (1 - zeta) * buffer
        yield x


def mass(grad, u, steps, lr, h):
    # MaSS with three sequences: w after a gradient step, v the long steps, u where gradients are taken.
    v = u
    for t in range(steps):
        g, a = grad(u), h(t)["alpha"]
        w = u - lr * g
        v = (1 - a) * v + a * u - lr / (a * h(t)["kappa"]) * g
        u = a / (1 + a) * v + 1 / (1 + a) * w
        yield u, w


def chebyshev(grad, x, steps, lr, h):
    # Golub and Varga's recursion of omega = 2 s T_t(s)/T_{t+1}(s); numbers only.
    p = h(0)
    before, omega, sigma = x, 1.0, (p["L"] - p["mu"]) / (p["L"] + p["mu"])
    for t in range(steps):
        omega = (1.0, 1 / (1 - sigma**2 / 2), 1 / (1 - sigma**2 * omega / 4))[min(t, 2)]
        x, before = before + omega * (x - lr * 2 / (p["L"] + p["mu"]) * grad(x) - before), x
        yield x


def chebyshev_polynomials(grad, x, steps, lr, h):
    # The same from the polynomials themselves, T_{k+1}(s) = 2 s T_k(s) - T_{k-1}(s), those of the step's own interval.
    before = x
    for t in range(steps):
        L, mu = h(t)["L"], h(t)["mu"]
        s = (L + mu) / (L - mu)
        older, old, new = 0.0, 1.0, s
        for _ in range(t):
            older, old, new = old, new, 2 * s * new - old
        g = grad(x)
        change = 2 / (L + mu) if t == 0 else 4 / (L - mu) * old / new
        x, before = x + older / new * (x - before) - lr * change * g, x
        yield x


_L_MU = {"L": (1.8, 2.4), "mu": (0.02, 0.1)}


def _triple(L, rho):
    return {"rho": rho, "alpha": (1 + rho) / L, "beta": rho**2 / (2 - rho)}


ROWS = [
    Row(
        "synthesized_nesterov",
        synthesized_nesterov,
        {"decay": 0.85, "lookahead": 0.5},
        {"decay": (-0.3, 0.93), "lookahead": (-0.2, 0.9)},
        evaluates=True,
    ),
    Row("triple_momentum", triple_momentum, {"L": 2.0, "mu": 0.05}, _L_MU, 1.0, evaluates=True),
    Row(
        "robust_momentum",
        robust_momentum,
        {"L": 2.0, "mu": 0.05, "rho": 0.9},
        {"L": (1.8, 2.4), "mu": (0.05, 0.1), "rho": (0.86, 0.94)},
        1.0,
        evaluates=True,
    ),
    Row(
        "robust_momentum",
        robust_momentum,
        {"L": 2.0, "mu": 0.05, "rho": None},
        _L_MU,
        1.0,
        variant="fastest",
        evaluates=True,
    ),
    Row(
        "accelerated",
        accelerated,
        {"kappa": 200.0, "xi": 6.0, "epsilon": 0.7},
        {"kappa": (50, 400), "xi": (2, 8), "epsilon": (0.4, 1)},
        0.1,
    ),
    Row("mass", mass, {"alpha": 0.1, "kappa": 12.0}, {"alpha": (0.05, 0.5), "kappa": (3, 20)}, 0.1, evaluates=True),
    Row("chebyshev", chebyshev, {"L": 2.0, "mu": 0.05}, _L_MU, 1.0, scheduled_reference=chebyshev_polynomials),
]

# The allowed interval of every number; "at least n" for whole ones.
INTERVALS = {
    "synthesized_nesterov": {"decay": "(-1, 1]", "lookahead": FINITE},
    "triple_momentum": CURVATURES,
    "robust_momentum": CURVATURES | {"rho": "[1 - sqrt(mu/L), 1 - mu/L]"},
    "accelerated": {"kappa": "[1, inf)", "xi": "[1, inf)", "epsilon": "(0, 1]"},
    "mass": {"alpha": "(0, 1)", "kappa": "[1, inf)"},
    "chebyshev": CURVATURES,
}

# The symbols of the docstrings' normal forms.
SYMBOLS = {
    "synthesized_nesterov": lambda decay, lookahead: {"b1": decay, "b2": lookahead},
    "triple_momentum": lambda L, mu: _triple(L, 1 - math.sqrt(mu / L)),
    "robust_momentum": lambda L, mu, rho: {
        "alpha": L / mu * (1 - rho) ** 2 * (1 + rho) / L,
        "beta": L / mu * rho**3 / (L / mu - 1),
        "gamma": rho**3 / ((L / mu - 1) * (1 - rho) ** 2 * (1 + rho)),
    },
    "accelerated": lambda kappa, xi, epsilon: {"kappa": kappa, "xi": xi, "eps": epsilon},
    "mass": lambda alpha, kappa: {"alpha": alpha, "kappa": kappa, "s": (1 + 1 / (alpha * kappa)) / 2},
}
