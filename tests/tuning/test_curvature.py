"""Estimates of curvature are those of known Hessians, and those of SciPy."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from momentum_optax import tuning
from tests.tuning.losses import ONES, bowl, square


def test_the_whole_spectrum_of_a_small_hessian(x64):
    loss, params = bowl(np.geomspace(0.01, 3.0, 20))
    found = tuning.estimate_curvature(loss, params, 2.0)
    assert (found.L, found.lowest, found.mu) == pytest.approx((6.0, 0.02, 0.02), rel=1e-9)
    assert found.exact
    assert found.products == 20
    assert found.L_error == found.lowest_error == 0


def test_the_ends_of_a_large_hessian(x64):
    eigenvalues = np.concatenate([np.linspace(0.5, 3.0, 199), [-2.0]])
    loss, params = bowl(eigenvalues)
    found = tuning.estimate_curvature(loss, params, 1.0, iterations=30)
    assert not found.exact
    assert found.products == 30
    assert found.L <= 3.0 + 1e-9
    assert found.L == pytest.approx(3.0, rel=0.01)
    assert abs(eigenvalues - found.L).min() <= found.L_error + 1e-9
    assert found.lowest == pytest.approx(-2.0, rel=1e-6)  # it stands apart
    assert found.lowest_error < 1e-3
    assert found.mu is None


@pytest.mark.one_in(2)
@pytest.mark.parametrize("spectrum", [np.geomspace(0.01, 3.0, 60), np.linspace(-1.0, 2.0, 150)])
def test_the_ends_are_those_that_scipys_lanczos_finds(spectrum, x64):
    loss, params = bowl(spectrum)
    found = tuning.estimate_curvature(loss, params, 1.0, iterations=100)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    product = jax.jit(lambda q: jax.jvp(jax.grad(lambda x: loss(unravel(x), 1.0)), (flat,), (q,))[1])
    operator = scipy.sparse.linalg.LinearOperator(
        (flat.size,) * 2, matvec=lambda q: np.asarray(product(q)), dtype=float
    )
    for got, error, which in ((found.lowest, found.lowest_error, "SA"), (found.L, found.L_error, "LA")):
        (expected,) = scipy.sparse.linalg.eigsh(operator, k=1, which=which, return_eigenvectors=False)
        assert abs(got - expected) <= error + 1e-9


def test_a_smallest_curvature_is_named_only_where_it_is_known(x64):
    dense = np.geomspace(1e-4, 1.0, 300)
    loss, params = bowl(dense)
    few = tuning.estimate_curvature(loss, params, 1.0, iterations=12)
    assert few.mu is None
    assert few.lowest > dense[0]  # never below the true one
    apart = np.concatenate([[0.1], np.linspace(0.5, 1.0, 299)])
    loss, params = bowl(apart)
    found = tuning.estimate_curvature(loss, params, 1.0, iterations=30)
    assert found.mu == found.lowest == pytest.approx(0.1, rel=1e-3)
    assert not found.exact


def test_curvature_below_rounding_is_not_named():
    loss, params = bowl(np.geomspace(1e-7, 1.0, 20), dtype=np.float32)
    found = tuning.estimate_curvature(loss, params, 1.0)
    assert found.L == pytest.approx(1.0, rel=1e-5)
    assert found.mu is None


def test_a_spectrum_of_few_values_is_exhausted_early(x64):
    loss, params = bowl(np.repeat([1.0, 4.0, 9.0], 10))
    found = tuning.estimate_curvature(loss, params, 1.0)
    assert found.products == 3
    assert found.exact
    assert (found.L, found.mu) == pytest.approx((9.0, 1.0), rel=1e-9)
    flat = tuning.estimate_curvature(lambda p, _: jnp.sum(p), jnp.ones(5))
    assert (flat.L, flat.lowest, flat.mu) == (0.0, 0.0, None)


def test_narrow_parameters_are_widened():
    loss, params = bowl(np.geomspace(0.1, 3.0, 20), dtype=np.float32)
    exact = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    found = tuning.estimate_curvature(loss, exact, 1.0)
    assert (found.L, found.mu) == pytest.approx((3.0, 0.1), rel=1e-3)


def test_the_curvature_is_that_of_the_place(x64):
    found = tuning.estimate_curvature(lambda p, _: jnp.sum(p**4) / 12, jnp.array([1.0, -2.0, 3.0]))
    assert (found.L, found.lowest) == pytest.approx((9.0, 1.0), rel=1e-9)


def test_a_batch_may_hold_more_than_arrays(x64):
    def loss(p, batch):
        return batch["scale"] * jnp.sum(p[: batch["count"]] ** 2) * (3.0 if batch["mode"] == "triple" else 1.0)

    batch = {"scale": jnp.float64(0.5), "count": 2, "mode": "triple"}
    found = tuning.estimate_curvature(loss, jnp.ones(4), batch)
    assert (found.L, found.lowest) == pytest.approx((3.0, 0.0), abs=1e-12)
    assert tuning.estimate_curvature(loss, jnp.ones(4), batch | {"scale": np.float64(1.0)}).L == pytest.approx(6.0)


def test_the_seed_starts_elsewhere_and_more_iterations_find_more(x64):
    loss, params = bowl(np.linspace(0.01, 1.0, 200))
    a, b, longer = (
        tuning.estimate_curvature(loss, params, 1.0, iterations=n, seed=s).L for n, s in ((8, 0), (8, 1), (16, 0))
    )
    assert a != b
    assert longer > max(a, b)


ERRORS = [
    (lambda: tuning.estimate_curvature(3.0, ONES), TypeError, "loss must be a function of params and batch, got 3.0"),
    (lambda: tuning.estimate_curvature(lambda p, _: p, ONES), ValueError, r"loss must give a scalar, got shape \(3,\)"),
    (lambda: tuning.estimate_curvature(lambda p, _: 3, ONES), TypeError, "loss must give a real floating-point scalar"),
    (
        lambda: tuning.estimate_curvature(square, {"w": jnp.arange(3)}),
        TypeError,
        r"params\['w'\] must be real floating point, got int32",
    ),
    (lambda: tuning.estimate_curvature(square, {}), ValueError, "params must have at least one element"),
    (lambda: tuning.estimate_curvature(square, ONES * jnp.nan), ValueError, "params must be finite"),
    (lambda: tuning.estimate_curvature(lambda p, _: jnp.sum(jnp.sqrt(p)), 0 * ONES), ValueError, "finite derivatives"),
    (lambda: tuning.estimate_curvature(square, ONES, iterations=1), ValueError, "iterations must be at least 2, got 1"),
    (lambda: tuning.estimate_curvature(square, ONES, seed=-1), ValueError, "seed must be at least 0, got -1"),
    (lambda: jax.jit(lambda p: tuning.estimate_curvature(square, p).L)(ONES), TypeError, "values that are known now"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument_and_what_is_allowed(call, error, message):
    with pytest.raises(error, match=message):
        call()
