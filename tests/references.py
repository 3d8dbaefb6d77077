"""Every rule once more, as a NumPy float64 loop in its paper's own form, and a table that pairs it with ours.

A reference is a generator `(grad, y, steps, lr, h)`. It yields the stored parameters after each step: the point where
the next gradient is taken. Those that also have a point to evaluate yield the pair (stored, evaluated). `h(t)` is the
dict of hyperparameters of step t, so that one loop serves numbers and schedules. None of our coefficients occur here;
comments name the form. A gradient is asked for once per step.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from conformance import rule_functions

import momentum_optax as mo


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


def quasi_hyperbolic(grad, x, steps, lr, h):
    # Ma and Yarats' algorithm 1 (QHM).
    buffer = 0.0
    for t in range(steps):
        g, p = grad(x), h(t)
        buffer = p["decay"] * buffer + (1 - p["decay"]) * g
        x = x - lr * ((1 - p["nu"]) * g + p["nu"] * buffer)
        yield x


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


def simplified_ademamix(grad, x, steps, lr, h):
    # The code of Simplified AdEMAMix: a sum of gradients, plus alpha times this one.
    m = 0.0
    for t in range(steps):
        g = grad(x)
        m = h(t)["decay"] * m + g
        x = x - lr * (m + h(t)["alpha"] * g)
        yield x


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


def mars_mix(grad, x, steps, lr, h):
    # MARS-approx as coded: last_grad is zero before the first step.
    m, last = 0.0, 0.0
    for t in range(steps):
        g, b = grad(x), h(t)["decay"]
        c = (g - last) * (h(t)["gamma"] * (b / (1 - b))) + g
        m, last = b * m + (1 - b) * c, g
        x = x - lr * m
        yield x


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


def schedule_free(grad, y, steps, lr, h):
    # Three sequences: z moves, x averages z, y lies between them.
    z = x = y
    for t in range(steps):
        z = z - lr * grad(y)
        x = (1 - 1 / (t + 1)) * x + 1 / (t + 1) * z
        y = (1 - h(t + 1)["beta"]) * z + h(t + 1)["beta"] * x
        yield y, x


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule, its reference, and the hyperparameters to compare them with.

    Attributes:
      rule: Name of the public function.
      reference: The loop.
      constants: Every argument of the rule, or of `build`.
      ranges: What can be scheduled, with the range of the random schedules.
      rate: The learning rate.
      variant: What tells two rows of one rule apart.
      build: The rule from its hyperparameters, where it is not the function itself.
      scheduled_reference: The loop for schedules, where `reference` is for numbers only.
      evaluates: Whether the reference yields (stored, evaluated).
    """

    rule: str
    reference: Callable[..., Iterator[Any]]
    constants: dict[str, Any]
    ranges: dict[str, tuple[float, float]]
    rate: float = 0.2
    variant: str = ""
    build: Callable[..., Any] | None = None
    scheduled_reference: Callable[..., Iterator[Any]] | None = None
    evaluates: bool = False

    def __str__(self):
        return f"{self.rule} {self.variant}".strip().replace(" ", "-")

    def make(self, **changes):
        """Our rule, with some hyperparameters replaced."""
        return (self.build or rule_functions()[self.rule])(**self.constants | changes)

    def run(self, grad, x, steps, h=None, *, rate=None):
        """Stored and evaluated points after each step, two arrays (steps, n); the second is None if there is none."""
        loop = self.reference if h is None else self.scheduled_reference or self.reference
        points = list(loop(grad, x, steps, self.rate if rate is None else rate, h or (lambda t: self.constants)))
        if not self.evaluates:
            return np.array(points), None
        stored, evaluated = zip(*points, strict=True)
        return np.array(stored), np.array(evaluated)


def _three(b0, b1, b2):
    return mo.aggregated((b0, b1, b2))


_L_MU = {"L": (1.8, 2.4), "mu": (0.02, 0.1)}

TABLE = [
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
    Row("nesterov", nesterov, {"decay": 0.9}, {"decay": (0.0, 0.97)}, evaluates=True),
    Row("torch_nesterov", torch_nesterov, {"decay": 0.9, "dampening": 0.0}, {"decay": (0.5, 0.95)}),
    Row(
        "torch_nesterov",
        torch_nesterov,
        {"decay": 0.9, "dampening": 0.4},
        {"decay": (0.5, 0.95), "dampening": (0.1, 0.9)},
        variant="dampened",
    ),
    Row("quasi_hyperbolic", quasi_hyperbolic, {"decay": 0.95, "nu": 0.7}, {"decay": (0.5, 0.99), "nu": (-0.3, 1.2)}),
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
        "simplified_ademamix",
        simplified_ademamix,
        {"decay": 0.9, "alpha": 2.0},
        {"decay": (0.5, 0.95), "alpha": (0, 4)},
    ),
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
    Row(
        "pid",
        pid,
        {"proportional": 0.4, "integral": 0.3, "derivative": 0.2, "decay": 0.8},
        {"proportional": (-0.1, 0.5), "integral": (0.1, 0.4), "derivative": (-0.2, 0.4), "decay": (0.3, 0.9)},
        1.0,
        scheduled_reference=pid_increments,
    ),
    Row(
        "recht_pid",
        recht_pid,
        {"proportional": -1.9, "integral": 0.3, "derivative": 17.0},
        {"proportional": (-2.2, -1.5), "integral": (0.2, 0.4), "derivative": (12, 20)},
        1.0,
        scheduled_reference=recht_pid_as_qhm,
    ),
    Row("optimistic", optimistic, {"alpha": 1.0, "beta": 0.8}, {"alpha": (0.5, 1.5), "beta": (-0.5, 1)}),
    Row(
        "complex_heavy_ball", complex_heavy_ball, {"decay": 0.8, "angle": 0.4}, {"decay": (0.2, 0.9), "angle": (-1, 1)}
    ),
    Row("lion_mix", lion_mix, {"b1": 0.9, "b2": 0.98}, {"b1": (0.5, 0.95), "b2": (0.8, 0.99)}),
    Row("muon_mix", muon_mix, {"decay": 0.95}, {"decay": (0.3, 0.98)}),
    Row(
        "grokfast",
        grokfast,
        {"decay": 0.95, "amplification": 2.0},
        {"decay": (0.8, 0.99), "amplification": (0.5, 3)},
        0.1,
    ),
    Row("grokfast_average", grokfast_average, {"window": 6, "amplification": 2.0}, {"amplification": (0, 3)}, 0.1),
    Row("mars_mix", mars_mix, {"decay": 0.95, "gamma": 0.1}, {"decay": (0.5, 0.97), "gamma": (-0.05, 0.2)}),
    Row("nadam_mix", nadam_mix, {"decay": 0.9, "psi": 0.004}, {}),
    Row("nadam_mix", nadam_mix, {"decay": 0.99, "psi": 3.0}, {}, variant="fast"),
    Row("adan_mix", adan_mix, {"b1": 0.95, "b2": 0.9}, {"b1": (0.5, 0.98), "b2": (0.3, 0.95)}),
    Row("chebyshev", chebyshev, {"L": 2.0, "mu": 0.05}, _L_MU, 1.0, scheduled_reference=chebyshev_polynomials),
    Row("schedule_free", schedule_free, {"beta": 0.9}, {"beta": (0.0, 1.0)}, 0.5, evaluates=True),
]

DIMENSION = 8
_RNG = np.random.default_rng(20240611)
_BASIS = np.linalg.qr(_RNG.normal(size=(DIMENSION, DIMENSION)))[0]
_SLOPES = np.geomspace(1e-3, 1.0, DIMENSION)
_TILT = _BASIS.T @ (_SLOPES * _RNG.uniform(-0.7, 0.7, DIMENSION))
START = _RNG.normal(size=DIMENSION)


def gradient(x):
    """Of sum a_i log cosh((Q x)_i) + c . x + 0.02 sum (x_i x_{i+1})^2.

    Smooth and convex enough that errors do not grow, far from quadratic, and too slow along some directions to have
    converged after a few hundred steps.
    """
    coupled = 0.04 * x * (np.roll(x, 1) ** 2 + np.roll(x, -1) ** 2)
    return _BASIS.T @ (_SLOPES * np.tanh(_BASIS @ x)) + _TILT + coupled
