"""AggMo, accelerated SGD and MaSS against the lines of their reference implementations."""

import numpy as np
import pytest
from interop.dialect_calls import START, STEPS, descend, gradient, rate

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("aggmo", {"lr": 0.1, "betas": (0.9, 0.9)}, ValueError, r"betas must be distinct, got \(0.9, 0.9\)"),
        ("aggmo", {"lr": 0.1, "betas": (lambda t: 0.9,)}, TypeError, r"betas\[0\] must be a number"),
        ("aggmo", {"lr": 0.1, "betas": 0.9}, TypeError, "betas must be a tuple or list of numbers, got 0.9"),
        ("aggmo", {"lr": 0.1, "betas": ("0.9",)}, TypeError, r"betas\[0\] must be a number, got '0.9'"),
        ("aggmo", {"lr": 0.1, "betas": ()}, ValueError, "betas must have at least one entry, got none"),
        ("accsgd", {"lr": 0.1, "smallConst": 1.5}, ValueError, r"smallConst must be in \(0, 1\], got 1.5"),
        ("mass", {"kappa_t": 0.5}, ValueError, r"kappa_t must be in \[1, inf\), got 0.5"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


def test_mass_is_the_three_lines_of_its_reference(x64):
    u, w_and_v, expected = START, START, []
    for t in range(STEPS):
        g = gradient(u, t)
        w = u - rate(t) * g
        w_and_v = (1 - 0.1) * w_and_v + 0.1 * u - rate(t) / 0.1 / 5 * g
        u = 0.1 / (1 + 0.1) * w_and_v + 1 / (1 + 0.1) * w
        expected.append(u)
    np.testing.assert_allclose(descend(interop.mass(rate, alpha=0.1, kappa_t=5.0)), expected, rtol=1e-12)


def test_accsgd_keeps_its_point_when_the_rate_changes(x64):
    kappa, xi, eps = 100.0, 5.0, 0.6
    x, b, expected = START, START, []
    beta = xi * eps**2 / kappa
    for t in range(STEPS):
        g = gradient(x, t)
        b = (1 - beta) * b + beta * (x - rate(t) * kappa / eps * g)
        zeta = eps / (eps + beta)
        x = zeta * (x - rate(t) * g) + (1 - zeta) * b
        expected.append(x)
    np.testing.assert_allclose(descend(interop.accsgd(rate, kappa, xi, eps)), expected, rtol=1e-12)
