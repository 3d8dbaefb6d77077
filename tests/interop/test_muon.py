"""The two momenta of Muon, of which `test_golden.py` has PyTorch's own."""

import jax.numpy as jnp
import numpy as np
import pytest
from interop.dialect_calls import START, gradient

import momentum_optax as mo

interop = mo.interop


@pytest.mark.parametrize(
    ("name", "arguments", "error", "match"),
    [
        ("muon_average", {"momentum": 0.0}, ValueError, "nesterov needs a momentum above 0"),
        ("muon_average", {"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\)"),
        ("muon_sum", {"momentum": 1.1}, ValueError, r"momentum must be in \[0, 1\]"),
    ],
)
def test_what_the_library_refuses_or_ignores_is_refused(name, arguments, error, match):
    with pytest.raises(error, match=match):
        getattr(interop, name)(**arguments)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_two_conventions_of_muon_differ_by_the_sum_of_their_weights(nesterov, x64):
    one, two = interop.muon_average(0.9, nesterov), interop.muon_sum(0.9, nesterov)
    p = jnp.asarray(START)
    s, z, v = one.init(p), two.init(p), 0.0
    for t in range(20):
        g = gradient(START, t)
        v = 0.9 * v + g
        a, s = one.update(jnp.asarray(g), s)
        b, z = two.update(jnp.asarray(g), z)
        np.testing.assert_allclose(b, g + 0.9 * v if nesterov else v, rtol=1e-13)
        np.testing.assert_allclose(a, 0.1 * np.asarray(b), rtol=1e-12)
