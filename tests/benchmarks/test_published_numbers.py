"""The committed results that compare with known numbers, and cheap parts of them computed again."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

import momentum_optax as mo

pytest.importorskip("tqdm")
pytest.importorskip("tyro")

from benchmarks.published_numbers import local_minima, regression, restarts
from benchmarks.published_numbers.__main__ import EXPERIMENTS
from benchmarks.published_numbers.aggregated import steps_per_e
from benchmarks.published_numbers.row import row as line

NO_BAR = SimpleNamespace(update=lambda: None)

# What is known, written down apart from the script: value and allowed distance.
STANDARD_ERROR = 0.008
MINIMA = {
    "rate 0.1, heavy ball": (0.134, 0.134, 0.134, 0.222, 0.206, 0.192, 0.232),
    "rate 0.1, Nesterov": (0.134, 0.134, 0.134, 0.134, 0.134, 0.178, 0.154),
    "effective rate 0.1": (0.134, 0.134, 0.134, 0.134, 0.134, 0.134, 0.228),
    "effective rate 0.45": (0.134, 0.134, 0.134, 0.134, 0.203, 0.280, 0.235),
    "noise 3, rate 0.01": (0.135, 0.134, 0.144, 0.464, 0.415, 0.269, 0.184),
    "noise 3, effective rate 0.1": (0.562, 0.543, 0.500, 0.470, 0.436, 0.425, 0.391),
}
STEPS_PER_E = {
    "AggMo 0, 0.9, 0.99": (18, 31.9, 96.6, 179.8),
    "heavy ball 0.9": (19, 19, 19, 265.8),
    "heavy ball 0.99": (199, 199, 199, 199),
    "optimal heavy ball": (1.5, 5, 15.8, 50),
}
KNOWN = {
    ("restarts", "constant decay"): (799, 0.05 * 799),
    ("restarts", "no restart"): (6414, 0.05 * 6414),
    ("restarts", "restart by loss"): (1351, 0.05 * 1351),
    ("restarts", "restart by gradient"): (1347, 0.05 * 1347),
    ("restarts", "plain descent"): (49552, 0.05 * 49552),
    ("regression", "plain descent"): (0.989, 0.035),
    ("regression", "heavy ball"): (0.898, 0.035),
    ("regression", "Nesterov"): (0.487, 0.035),
    ("regression", "quasi-hyperbolic"): (0.505, 0.035),
    ("local minima", "10 random restarts of 50 steps of descent"): (0.763, 3 * STANDARD_ERROR),
    ("local minima", "20 random restarts of 25 steps of descent"): (0.944, 3 * STANDARD_ERROR),
    ("local minima", "ends lower than descent, decay 0.9"): (0.168, 3 * STANDARD_ERROR),
    ("local minima", "ends higher than descent, decay 0.9"): (0, 0),
}
KNOWN |= {
    ("local minima", f"{name}, decay {decay:g}"): (value, 3 * STANDARD_ERROR)
    for name, values in MINIMA.items()
    for decay, value in zip((0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99), values, strict=True)
}
KNOWN |= {
    ("aggregated", f"{name}, kappa {kappa:g}"): (value, 0.05 * value)
    for name, values in STEPS_PER_E.items()
    for kappa, value in zip((10, 100, 1000, 10000), values, strict=True)
}


def test_the_committed_numbers_are_the_known_ones(committed):
    rows = {(row["experiment"], row["case"]): row for row in committed("published_numbers")}
    assert set(rows) == set(KNOWN)
    for key, (known, allowed) in KNOWN.items():
        assert rows[key]["known"] == known, key
        assert abs(rows[key]["measured"] - known) <= rows[key]["tolerance"] <= allowed + 1e-9, key
    # Restarts are two each, and their counts depend on the start.
    for kind in ("loss", "gradient"):
        assert rows["restarts", f"restart by {kind}"]["restarts"] == 2
    # In regression with batches of one the heavy ball's exponent nears one, as for plain descent.
    assert rows["regression", "heavy ball"]["last_slope"] == pytest.approx(0.96, abs=0.035)
    assert rows["regression", "Nesterov"]["steps"][-1] == pytest.approx(47.8, rel=0.15)


def test_cheap_rows_come_out_again(committed):
    rows = {(row["experiment"], row["case"]): row["measured"] for row in committed("published_numbers")}
    ball = steps_per_e(mo.heavy_ball(0.9), 1e4)
    again = [line("aggregated", "heavy ball 0.9, kappa 10000", ball, 265.8, 13)]
    steps, restarted = restarts.steps_to_converge(mo.tuning.smooth_nesterov(1.0, 1e-4).rule, 0)
    again.append(line("restarts", "constant decay", steps, 799, 8))
    x = np.random.default_rng(0).uniform(-12, 12, local_minima.STARTS)
    end = local_minima.travel(mo.heavy_ball(0.9), 0.1, x, 500)
    again.append(line("local minima", "rate 0.1, heavy ball, decay 0.9", local_minima.share(end), 0.222, 0.02))
    slow = regression.best_rate(lambda: (mo.heavy_ball(0.0), 1.0), [(math.log(0.02), math.log(3.999))], 16.0, 41)
    assert restarted == 0
    assert -1 / math.log(slow) == pytest.approx(4.54, abs=5e-3)
    for row in again:
        assert row["measured"] == pytest.approx(rows[row["experiment"], row["case"]], rel=1e-6), row["case"]


def test_the_mean_square_operator_is_that_of_sampled_runs():
    # Plain descent has it in closed form; for the heavy ball the exact mean over all 2^8 sequences of inputs.
    rate, kappa = 1.3, 16.0
    descent = regression.mean_square_rate(mo.heavy_ball(0.0), np.array([rate]), kappa)
    assert descent[0] == pytest.approx(max((1 + (1 - rate * c) ** 2) / 2 for c in (1.0, 2 / kappa)), rel=1e-12)
    rule, steps = mo.heavy_ball(0.6), 8
    moments = np.zeros(steps)
    for sequence in range(2**steps):
        theta, v = 1.0, 0.0
        for t in range(steps):
            g = theta * 0.9 if sequence >> t & 1 else 0.0
            v = 0.6 * v + g
            theta -= 0.5 * v
            moments[t] += theta**2 / 2**steps
    hit, idle = (mo.analysis.closed_loop(rule, 0.5, c) for c in (0.9, 0.0))
    operator = (np.kron(hit, hit) + np.kron(idle, idle)) / 2
    state = np.array([1.0, 0.0, 0.0, 0.0])
    for t in range(steps):
        state = operator @ state
        assert state[0] == pytest.approx(moments[t], rel=1e-12)


@pytest.mark.slow
def test_every_published_number_comes_out_again(committed):
    rows = {(row["experiment"], row["case"]): row for row in committed("published_numbers")}
    for experiment in EXPERIMENTS.values():
        for row in experiment(NO_BAR):
            expected = rows[row["experiment"], row["case"]]
            assert row["measured"] == pytest.approx(expected["measured"], rel=1e-4, abs=1e-3), row["case"]
