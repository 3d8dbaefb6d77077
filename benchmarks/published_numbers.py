"""Do the numbers that are known about momentum come out of this package?

    python -m benchmarks.published_numbers

Four experiments, every rule taken from the package and run in float64, each row beside the number that is known:

- restarts: Nesterov's rule with FISTA's momentum on a quadratic of 200 curvatures between 1e-4 and 1, steps until the
  loss is 1e-10 of its start; without restarts, with those of O'Donoghue and Candes (2015, arXiv:1204.3982), with a
  constant decay, and plain descent. Other starts than the first differ by a third, so their range is given too.
- aggregated momentum: steps per factor e on quadratics at the best constant rate, for AggMo (Lucas et al., 2019,
  arXiv:1804.00325), heavy balls of fixed decay and the optimal one.
- regression: batches of one in the two-point model of Kidambi et al. (2018, arXiv:1803.05591): steps per factor e of
  the mean square error at the best coefficients, from the exact operator on second moments, and its slope over the
  condition number.
- local minima: f(x) = x^2/20 + 1 - cos 2x from 4000 starts on [-12, 12], the same final descent for all: the share that
  ends in the lowest basin. Fixed rate, matched effective rate and matched number of gradients against random restarts.

Prints a table and writes benchmarks/published_numbers.json. Takes half a minute.
"""

import argparse
import itertools
import json
import math
import pathlib
import platform
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

import momentum_optax as mo
from momentum_optax import analysis

Row = dict[str, Any]
STARTS = 4000


def row(experiment: str, case: str, measured: float, known: float, tolerance: float, **more: Any) -> Row:
    """One line of the table; `tolerance` is the allowed distance from the known number."""
    return {
        "experiment": experiment,
        "case": case,
        "measured": round(float(measured), 6),
        "known": known,
        "tolerance": tolerance,
        **more,
    }


# Restarts.


def steps_to_converge(rule: mo.Filter, seed: int, restart: str = "never", condition: float = 1e4) -> tuple[int, int]:
    """Steps until the loss is 1e-10 of its start, and the restarts on the way.

    A restart begins the rule's schedule anew; Nesterov's, whose first momentum is zero, then forgets its velocity. The
    loss that counts, and that the function test looks at, is the one at the evaluation point x.
    """
    curvature = np.geomspace(1 / condition, 1, 200)
    y = np.random.default_rng(seed).normal(size=200)
    v, age, restarts = np.zeros(200), 0, 0
    start = before = _loss(curvature, y)
    for step in itertools.count(1):
        g = curvature * y
        # The next x is y - g, and x + v is y: the move from x to it is -(v + g).
        loss = _loss(curvature, y - g)
        if (restart == "gradient" and g @ (v + g) < 0) or (restart == "function" and loss > before):
            age, restarts = 0, restarts + 1
        (((a,),), (b,), (c,), d) = (getattr(rule.at(age), name) for name in "ABCD")
        y, v = y - (c * v + d * g), a * v + b * g
        age, before = age + 1, loss
        if loss <= 1e-10 * start:
            return step, restarts


def _loss(curvature: np.ndarray, x: np.ndarray) -> float:
    return 0.5 * float(curvature @ (x * x))


def restarts(bar: Any) -> Iterator[Row]:
    """Steps with and without restarts; the first start is compared, four more give the range."""
    fista, tuned = mo.nesterov(mo.schedules.fista()), mo.tuning.smooth_nesterov(1.0, 1e-4).rule
    cases: list[tuple[str, mo.Filter, str, int]] = [
        ("constant decay", tuned, "never", 799),
        ("no restart", fista, "never", 6414),
        ("restart by loss", fista, "function", 1351),
        ("restart by gradient", fista, "gradient", 1347),
        ("plain descent", mo.heavy_ball(0.0), "never", 49552),
    ]
    for name, rule, kind, known in cases:
        counts = []
        for seed in range(5):
            counts.append(steps_to_converge(rule, seed, kind))
            bar.update()
        steps = [count for count, _ in counts]
        yield row(
            "restarts", name, steps[0], known, 0.01 * known, restarts=counts[0][1], over_starts=[min(steps), max(steps)]
        )


# Aggregated momentum.


def steps_per_e(rule: mo.Filter, kappa: float) -> float:
    """Steps per factor e on quadratics, at the best of 2000 rates below the stability limit."""
    rates = analysis.stability_limit(rule, 1.0) * np.geomspace(1e-4, 1, 2000)[:-1]
    return -1 / math.log(analysis.contraction(rule, rates, 1 / kappa, 1.0).min())


def aggregated(bar: Any) -> Iterator[Row]:
    """Steps per factor e of AggMo, of heavy balls of fixed decay and of the optimal one."""
    kappas = (10.0, 100.0, 1e3, 1e4)
    cases = [
        ("AggMo 0, 0.9, 0.99", mo.aggregated((0.0, 0.9, 0.99)), (18.0, 31.9, 96.6, 179.8)),
        ("heavy ball 0.9", mo.heavy_ball(0.9), (19.0, 19.0, 19.0, 265.8)),
        ("heavy ball 0.99", mo.heavy_ball(0.99), (199.0, 199.0, 199.0, 199.0)),
    ]
    for name, rule, known in cases:
        for kappa, number in zip(kappas, known, strict=True):
            yield row("aggregated", f"{name}, kappa {kappa:g}", steps_per_e(rule, kappa), number, 0.05 * number)
            bar.update()
    for kappa, number in zip(kappas, (1.5, 5.0, 15.8, 50.0), strict=True):
        tuned = mo.tuning.optimal_heavy_ball(1.0, 1 / kappa)
        radius = analysis.contraction(tuned.rule, tuned.learning_rate, 1 / kappa, 1.0)
        yield row("aggregated", f"optimal heavy ball, kappa {kappa:g}", -1 / math.log(radius), number, 0.05 * number)
        bar.update()


# Regression with batches of one.


def mean_square_rate(rule: mo.Filter, rates: np.ndarray, kappa: float) -> np.ndarray:
    """Contraction per step of the second moments of (theta, v), for inputs e1 or sqrt(2/kappa) e2 with chance 1/2 each.

    A step moves one coordinate along its gradient; the other lets its velocity run on. The second moments follow the
    mean of M x M, whose spectral radius is the rate; coordinates do not mix.
    """
    idle = analysis.closed_loop(rule, rates, 0.0)
    worst = np.zeros(rates.shape)
    for curvature in (1.0, 2 / kappa):
        hit = analysis.closed_loop(rule, rates, curvature)
        operator = sum(np.einsum("nij,nkl->nikjl", M, M) for M in (hit, idle)) / 2
        size = hit.shape[-1] ** 2
        worst = np.maximum(worst, abs(np.linalg.eigvals(operator.reshape(-1, size, size))).max(-1))
    return worst


Build = Callable[..., tuple[mo.Filter, float]]


def best_rate(build: Build, box: list[tuple[float, float]], kappa: float, points: int = 11, rounds: int = 6) -> float:
    """The least rate, by zooming, in a box of logarithms of parameters, the first of which scales the learning rate."""
    best, low, high = np.inf, *(np.array(ends) for ends in zip(*box, strict=True))
    for _ in range(rounds):
        axes = [np.linspace(a, b, points) for a, b in zip(low, high, strict=True)]
        center = (low + high) / 2
        for rest in itertools.product(*axes[1:]):
            rule, unit = build(*np.exp(rest))
            rates = mean_square_rate(rule, np.exp(axes[0]) * unit, kappa)
            if rates.min() < best:
                best, center = float(rates.min()), np.array([axes[0][rates.argmin()], *rest])
        span = (high - low) / (points - 1) * 1.5
        low, high = np.maximum(center - span, [a for a, _ in box]), np.minimum(center + span, [b for _, b in box])
    return best


def _average(forget: float, direct: float) -> tuple[mo.Filter, float]:
    """A quasi-hyperbolic rule whose raw gradient has the share `direct`, and the rate that gives its D the value 1."""
    rule = mo.quasi_hyperbolic(1 - forget, 1 - direct)
    return rule, 1 / rule.D


def regression(bar: Any) -> Iterator[Row]:
    """Slope of the logarithm of steps per factor e over that of the condition number."""
    forget, rate = (math.log(1e-4), math.log(0.999)), (math.log(0.02), math.log(3.999))
    cases: list[tuple[str, Build, list[tuple[float, float]], float]] = [
        ("plain descent", lambda: (mo.heavy_ball(0.0), 1.0), [rate], 0.989),
        ("heavy ball", lambda f: (mo.heavy_ball(1 - f), f), [rate, forget], 0.898),
        ("Nesterov", lambda f: (mo.nesterov(1 - f), 1.0), [rate, forget], 0.487),
        ("quasi-hyperbolic", _average, [rate, forget, forget], 0.505),
    ]
    kappas = 4.0 ** np.arange(2, 7)
    for name, build, box, known in cases:
        steps = []
        for kappa in kappas:
            steps.append(-1 / math.log(best_rate(build, box, kappa, points=41 if len(box) < 3 else 13)))
            bar.update()
        slope = float(np.polyfit(np.log(kappas), np.log(steps), 1)[0])
        last = float(np.diff(np.log(steps))[-1] / np.log(4.0))
        yield row(
            "regression", name, slope, known, 0.035, steps=[round(s, 2) for s in steps], last_slope=round(last, 4)
        )


# Local minima.


def slope(x: np.ndarray) -> np.ndarray:
    """The derivative of x^2/20 + 1 - cos 2x."""
    return 0.1 * x + 2 * np.sin(2 * x)


def travel(rule: mo.Filter, rate: float, x: np.ndarray, steps: int, noise: Any = None) -> np.ndarray:
    """Where a run from rest is after so many steps; `noise` draws what is added to the gradient."""
    A, B, C, D = rule.pruned().matrices()
    v = np.zeros((len(B), *x.shape))
    for _ in range(steps):
        g = slope(x) if noise is None else slope(x) + noise(x.shape)
        x, v = x - rate * (np.tensordot(C, v, 1) + D * g), np.tensordot(A, v, 1) + np.multiply.outer(B, g)
    return x


def settle(x: np.ndarray) -> np.ndarray:
    """The minimum that plain descent finds from here."""
    return travel(mo.heavy_ball(0.0), 0.1, x, 500)


def share(x: np.ndarray) -> float:
    """The share of points in the basin of the lowest minimum, at 0."""
    return float(np.mean(abs(settle(x)) < 0.5))


DECAYS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
MINIMA: dict[str, tuple[Callable[[float], mo.Filter], Callable[[float], float], float, tuple[float, ...]]] = {
    "rate 0.1, heavy ball": (mo.heavy_ball, lambda b: 0.1, 0.0, (0.134, 0.134, 0.134, 0.222, 0.206, 0.192, 0.232)),
    "rate 0.1, Nesterov": (mo.nesterov, lambda b: 0.1, 0.0, (0.134, 0.134, 0.134, 0.134, 0.134, 0.178, 0.154)),
    "effective rate 0.1": (
        mo.heavy_ball,
        lambda b: 0.1 * (1 - b),
        0.0,
        (0.134, 0.134, 0.134, 0.134, 0.134, 0.134, 0.228),
    ),
    "effective rate 0.45": (
        mo.heavy_ball,
        lambda b: 0.45 * (1 - b),
        0.0,
        (0.134, 0.134, 0.134, 0.134, 0.203, 0.280, 0.235),
    ),
    "noise 3, rate 0.01": (mo.heavy_ball, lambda b: 0.01, 3.0, (0.135, 0.134, 0.144, 0.464, 0.415, 0.269, 0.184)),
    "noise 3, effective rate 0.1": (
        mo.heavy_ball,
        lambda b: 0.1 * (1 - b),
        3.0,
        (0.562, 0.543, 0.500, 0.470, 0.436, 0.425, 0.391),
    ),
}


def local_minima(bar: Any) -> Iterator[Row]:
    """Shares that reach the lowest basin. Both numbers have a standard error of at most 0.008: twice that of both."""
    allowed = 2 * math.sqrt(2) * 0.008
    for name, (build, rate, sigma, known) in MINIMA.items():
        for decay, number in zip(DECAYS, known, strict=True):
            rng = np.random.default_rng(0)
            x = rng.uniform(-12, 12, STARTS)
            noise = (lambda shape, rng=rng, sigma=sigma: sigma * rng.standard_normal(shape)) if sigma else None
            end = travel(build(decay), rate(decay), x, 2000 if sigma else 500, noise)
            yield row("local minima", f"{name}, decay {decay:g}", share(end), number, allowed)
            bar.update()
    # 500 gradients: one run of 500 steps above, or restarts from elsewhere, the best of which is kept.
    for count, steps, number in ((10, 50, 0.763), (20, 25, 0.944)):
        x = np.random.default_rng(1).uniform(-12, 12, (count, STARTS))
        ends = travel(mo.heavy_ball(0.0), 0.1, x, steps)
        best = np.take_along_axis(ends, np.argmin(ends**2 / 20 + 1 - np.cos(2 * ends), 0)[None], 0)[0]
        yield row("local minima", f"{count} random restarts of {steps} steps of descent", share(best), number, allowed)
        bar.update()
    x = np.random.default_rng(0).uniform(-12, 12, STARTS)
    ball, descent = (abs(settle(travel(mo.heavy_ball(b), 0.1, x, 500))) for b in (0.9, 0.0))
    yield row("local minima", "ends lower than descent, decay 0.9", float(np.mean(ball < descent - 1)), 0.168, allowed)
    yield row("local minima", "ends higher than descent, decay 0.9", float(np.mean(ball > descent + 1)), 0.0, 0.0)


EXPERIMENTS = {"restarts": restarts, "aggregated": aggregated, "regression": regression, "local minima": local_minima}
_RUNS = 25 + 16 + 20 + 7 * len(MINIMA) + 2


def table(rows: list[Row]) -> str:
    """The rows in print."""
    lines = [f"{'experiment':14}{'case':48}{'measured':>12}{'known':>10}{'allowed':>10}"]
    for entry in rows:
        verdict = "" if abs(entry["measured"] - entry["known"]) <= entry["tolerance"] else "  differs"
        lines.append(
            f"{entry['experiment']:14}{entry['case']:48}{entry['measured']:12.5g}{entry['known']:10.5g}"
            f"{entry['tolerance']:10.2g}{verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = pathlib.Path(__file__).with_suffix(".json")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="where to write the JSON")
    arguments = parser.parse_args()
    with tqdm(total=_RUNS, unit="run", leave=False) as bar:
        rows = [entry for experiment in EXPERIMENTS.values() for entry in experiment(bar)]
    print(table(rows))
    versions = {"python": platform.python_version(), "numpy": np.__version__, "momentum_optax": mo.__version__}
    command = f"python -m benchmarks.{pathlib.Path(__file__).stem}"
    arguments.output.write_text(json.dumps({"command": command, "versions": versions, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
