"""Contracts of every function of the analysis: NumPy in float64 without JAX, broadcasting, the argument `step`."""

import ast
import pathlib
import subprocess
import sys

import numpy as np
from conformance import RULES, every_rule

import momentum_optax as mo
from momentum_optax import analysis, rules

PACKAGE = pathlib.Path(mo.__file__).parent


def test_no_module_of_the_analysis_imports_jax():
    modules = sorted((PACKAGE / "analysis").glob("*.py"))
    assert len(modules) > 5
    for path in modules:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not {name.split(".")[0] for name in names} & {"jax", "jaxlib", "optax", "flax"}, path


def test_the_analysis_runs_where_jax_is_not_even_imported():
    # The package's own __init__ imports JAX; a bare namespace in its place does not.
    script = f"""
import sys, types
package = types.ModuleType("momentum_optax")
package.__path__ = [{str(PACKAGE)!r}]
sys.modules["momentum_optax"] = package
from momentum_optax import analysis, rules
analysis.report(rules.aggregated(), learning_rate=0.1, L=1.0, mu=0.01)
analysis.error_curve(rules.chebyshev(1.0, 0.1), 1.0, 1.0, 20)
assert not [name for name in sys.modules if name.startswith("jax")]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@every_rule
def test_everything_is_numpy_in_float64(rule):
    r = RULES[rule]()
    for value in (
        analysis.impulse_response(r, 4),
        analysis.step_response(r, 4),
        analysis.spectral_radius(r, [0.1, 0.2], [[1.0], [2.0]], step=3),
        analysis.stability_limit(r, [1.0, 2.0], step=3),
        analysis.error_curve(r, 0.1, [1.0, 2.0], 3),
        analysis.stationary_variance(r, 0.01, [1.0, 2.0], 1.0, step=3),
    ):
        assert type(value) is np.ndarray
        assert value.dtype == np.float64
    assert analysis.frequency_response(r, [0.1, 0.2], step=3).dtype == np.complex128
    assert type(analysis.spectral_radius(r, 0.1, 1.0, step=3)) is np.float64


def test_a_step_freezes_a_schedule():
    decay = mo.schedules.nesterov_convex()
    rule = rules.nesterov(decay)
    at_7 = rules.nesterov(float(decay(7)))
    for function in (
        analysis.dc_gain,
        analysis.half_life,
        analysis.mean_lag,
        analysis.memory,
        analysis.noise_gain,
        analysis.bandwidth,
        lambda r, **k: analysis.poles(r, **k)[0],
        lambda r, **k: analysis.effective_learning_rate(r, 0.1, **k),
        lambda r, **k: analysis.frequency_response(r, 0.3, **k),
        lambda r, **k: analysis.spectral_radius(r, 0.1, 1.0, **k),
        lambda r, **k: analysis.stability_limit(r, 1.0, **k),
        lambda r, **k: analysis.contraction(r, 0.1, 0.5, 1.0, **k),
        lambda r, **k: analysis.iterations(r, 0.1, 1.0, **k),
        lambda r, **k: analysis.transient_growth(r, 1.3, 1.0, **k),
        lambda r, **k: analysis.stationary_variance(r, 0.1, 1.0, **k),
        lambda r, **k: analysis.bilinear_game(r, 0.1, **k),
        lambda r, **k: analysis.precision(r, mo.storage.bfloat16(), **k),
        lambda r, **k: analysis.report(r, L=1.0, **k),
    ):
        assert function(rule, step=7) == function(at_7)
        assert function(rule, step=8) != function(at_7)
    first = rules.heavy_ball(0.9, dampening=0.5, first_step="gradient")
    assert analysis.closed_loop(first, 1.0, 1.0, step=0)[1, 0] == 1.0
    assert analysis.closed_loop(first, 1.0, 1.0, step=1)[1, 0] == 0.5


def test_arrays_broadcast_and_agree_with_single_calls():
    rule = rules.aggregated((0.0, 0.9, 0.99))
    rate, curvature = np.array([[0.01], [0.1], [5.0]]), np.array([0.2, 1.0])
    functions = {
        "spectral_radius": lambda r, c: analysis.spectral_radius(rule, r, c),
        "stationary_variance": lambda r, c: analysis.stationary_variance(rule, r, c, 2.0),
        "iterations": lambda r, c: analysis.iterations(rule, r, c, 1e-3),
        "transient_growth": lambda r, c: analysis.transient_growth(rule, r, c),
        "contraction": lambda r, c: analysis.contraction(rule, r, 0.1 * c, c),
        "error_curve": lambda r, c: analysis.error_curve(rule, r, c, 5)[5],
        "bilinear_game": lambda r, c: analysis.bilinear_game(rule, r, c),
    }
    for name, function in functions.items():
        got = function(rate, curvature)
        assert got.shape == (3, 2), name
        single = [[function(r, c) for c in curvature] for (r,) in rate]
        np.testing.assert_allclose(got, single, rtol=1e-10, err_msg=name)
    tolerances = analysis.iterations(rule, 0.1, 1.0, [0.1, 1e-3])
    assert list(tolerances) == [analysis.iterations(rule, 0.1, 1.0, t) for t in (0.1, 1e-3)]
    assert analysis.stability_limit(rule, np.ones((2, 3))).shape == (2, 3)
    assert analysis.frequency_response(rule, np.ones((2, 3))).shape == (2, 3)
    assert analysis.stationary_variance(rule, 0.1, 1.0, [1.0, 2.0]).shape == (2,)
