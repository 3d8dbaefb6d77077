"""`muon` against Optax's, within derived rounding, and against the reference code's iteration in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from stepping import HUNDRED, MATRICES, final

import momentum_optax as mo


def newton_schulz_rounding(rows, columns):
    """The largest error in Frobenius norm, in units of the rounding u, of five computed steps a X + (b A + c A A) X.

    Here A = X X^T, and X has no more rows than columns. A product of inner dimension k is off by at most
    k u |X| |Y|, so that one step adds what `added` holds; before that, the steps multiply errors by the largest slope
    of their polynomial, the Lipschitz constant of the step in this norm.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    s = np.linspace(0, 1.21, 1001)  # singular values: at most 1 at first, then at most the polynomial's maximum
    assert abs(a * s + b * s**3 + c * s**5).max() < s[-1]
    slope = abs(a + 3 * b * s**2 + 5 * c * s**4).max()
    size = np.sqrt(rows) * s[-1]
    added = 3 * a * size + abs(b) * (columns + rows + 3) * size**3 + c * (2 * columns + 2 * rows + 4) * size**5
    error = 2.0 * rows * columns  # the gradients' average and its division by its norm, a sum of as many squares
    for _ in range(5):
        error = slope * error + added
    return error


def test_muon_with_optax_s_debiasing_is_optax_s_over_a_hundred_steps(x64):
    params = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float64), MATRICES)
    ours = final(mo.muon(0.02, mo.nadam_mix(0.9, psi=1e6), weight_decay=0.1), params)
    theirs = final(optax.contrib.muon(0.02, beta=0.9, weight_decay=0.1), params)
    for name, (inputs, outputs) in (("tall", (16, 5)), ("wide", (6, 12))):
        # Directions do not depend on the parameters, so that the errors of a hundred steps of both add up, beside the
        # roundings of parameters below 2.
        direction = max(1, outputs / inputs) ** 0.5 * newton_schulz_rounding(*sorted((inputs, outputs)))
        atol = 2 * 100 * (0.02 * direction + 2 * 2) * 2.0**-53
        assert ours[name].dtype == jnp.float64
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=atol)


def newton_schulz(G):
    """The reference code's iteration, for (outputs, inputs), in float64."""
    X = G / (np.linalg.norm(G) + 1e-7)
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def test_muon_is_the_reference_code_s_on_transposed_weights():
    params = final(mo.muon(0.02))
    for name in MATRICES:
        weight, buffer = np.ones(MATRICES[name].shape[::-1]), 0.0
        for g in HUNDRED:
            G = np.float64(g[name]).T
            buffer = 0.95 * buffer + 0.05 * G
            update = newton_schulz(0.05 * G + 0.95 * buffer)
            weight -= 0.02 * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * update
        np.testing.assert_allclose(params[name], weight.T, rtol=0, atol=5e-6)
