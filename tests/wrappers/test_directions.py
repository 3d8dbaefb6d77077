"""Directions by norm against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conformance import assert_bit_equal
from stepping import SIGNAL

import momentum_optax as mo


@pytest.mark.one_in(9)
@pytest.mark.parametrize("scope", ["tree", "leaf"])
@pytest.mark.parametrize(
    ("tx", "form"),
    [
        (mo.scale_to_unit_norm, lambda u, n: u / n),
        (lambda scope: mo.contrib.saturate(0.3, scope), lambda u, n: u / np.sqrt(1 + 0.3 * n * n)),
    ],
    ids=["unit", "saturated"],
)
def test_directions_by_norm_are_their_formulas_at_any_scale(tx, form, scope):
    update = jax.jit(tx(scope).update)
    for size in (1.0, 1e-30, 1e30):
        u = {"a": SIGNAL[0]["a"] * size, "b": SIGNAL[0]["b"] * size, "c": None, "d": jnp.zeros((0, 2))}
        got, _ = update(u, optax.EmptyState())
        exact = {name: np.float64(u[name]) for name in ("a", "b")}
        norms = {name: np.sqrt(np.sum(x * x)) for name, x in exact.items()}
        for name, x in exact.items():
            norm = norms[name] if scope == "leaf" else np.hypot(*norms.values())
            np.testing.assert_allclose(np.float64(got[name]), form(x, norm), rtol=1e-6, atol=0)
        assert got["c"] is None
    zero, _ = tx(scope).update({"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.complex64)}, optax.EmptyState())
    assert_bit_equal(zero, {"a": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(2, jnp.complex64)})
    mixed, _ = tx(scope).update({"a": jnp.ones(1), "b": jnp.array([2j], jnp.complex64)}, optax.EmptyState())
    np.testing.assert_allclose(mixed["b"], [1j * form(2.0, 2.0 if scope == "leaf" else 5**0.5)], rtol=1e-6)
    half = jnp.array([3e4, 4e4], jnp.float16)
    got, _ = tx(scope).update(half, optax.EmptyState())
    assert got.dtype == jnp.float16
    np.testing.assert_allclose(np.float64(got), form(np.array([3e4, 4e4]), 5e4), rtol=2e-3)


def test_what_is_no_direction_is_refused():
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got 'row'"):
        mo.scale_to_unit_norm("row")
