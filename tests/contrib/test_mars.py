"""Exact MARS against loops written from the paper."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from two_gradients import BEFORE, LIKE, SIGNAL, assert_close, flat, run

import momentum_optax as mo


def mars(signal, before, beta, gamma, parts):
    """The corrected gradients c_t of the paper, clipped to norm 1 part by part."""
    out = []
    for g, p in zip(signal, before, strict=True):
        c = g + gamma * beta / (1 - beta) * (g - p)
        out.append(np.concatenate([c[part] / max(1, np.linalg.norm(c[part])) for part in parts]))
    return out


PARTS = {"tree": [slice(0, 10)], "leaf": [slice(0, 6), slice(6, 10)]}

# Norms from a third of the clip's to three times it.
SIZES = np.geomspace(0.03, 0.3, 8)
SIZED = [[jax.tree.map(lambda g, s=s: s * g, g) for g, s in zip(x, SIZES, strict=True)] for x in (SIGNAL, BEFORE)]


@pytest.mark.parametrize("scope", PARTS)
def test_mars_chains_are_the_paper_s_algorithms(scope):
    beta, b2, gamma, eps, decay, rate = 0.9, 0.8, 0.3, 1e-3, 0.1, 0.01
    params = jax.tree.map(lambda x: x + 2.0, LIKE)
    corrected = mars(*(list(map(flat, x)) for x in SIZED), beta, gamma, PARTS[scope])
    assert 2 <= sum(np.linalg.norm(c) > 1 - 1e-9 for c in corrected) <= 7
    m = v = 0.0
    adamw, lion = [], []
    for t, c in enumerate(corrected, 1):
        m, v = beta * m + (1 - beta) * c, b2 * v + (1 - b2) * c * c
        adamw.append(-rate * (m / (1 - beta**t) / (np.sqrt(v / (1 - b2**t)) + eps) + decay * 2.0))
        lion.append(-rate * (np.sign(m) + decay * 2.0))
    tx = mo.contrib.mars_adamw(rate, beta, b2, gamma=gamma, eps=eps, weight_decay=decay, scope=scope)
    np.testing.assert_allclose(run(tx, *SIZED, params)[0], adamw, rtol=2e-5, atol=1e-8)
    tx = mo.contrib.mars_lion(rate, beta, gamma=gamma, weight_decay=decay, scope=scope)
    np.testing.assert_allclose(run(tx, *SIZED, params)[0], lion, rtol=1e-6)
    if scope == "tree":
        in_bytes = mo.compress(
            mo.contrib.mars_adamw(rate, beta, b2, gamma=gamma, eps=eps), {"mu": "int8", "nu": "uint8"}
        )
        assert {x.dtype for x in jax.tree.leaves(in_bytes.init({"a": jnp.zeros((64, 64))}))} >= {jnp.dtype("int8")}


def test_scheduled_arguments_of_mars_follow_the_step():
    tx = mo.contrib.mars_correction(lambda t: 0.5 + 0.05 * t, lambda t: 0.1 * t, "leaf")
    out, state = run(tx, *SIZED)
    for t, (u, g, p) in enumerate(zip(out, *SIZED, strict=True)):
        (expected,) = mars([flat(g)], [flat(p)], 0.5 + 0.05 * t, 0.1 * t, PARTS["leaf"])
        assert_close(u, expected)
    assert state.step == len(SIGNAL)


def test_with_gamma_1_and_no_clip_the_average_is_storm_but_for_its_start():
    beta = 0.9
    small = [[jax.tree.map(lambda g: 0.01 * g, g) for g in x] for x in (SIGNAL, [SIGNAL[0], *BEFORE[1:]])]
    averaged, _ = run(optax.chain(mo.contrib.mars_correction(beta, 1.0), mo.scale_by_momentum(mo.ema(beta))), *small)
    d, _ = run(mo.contrib.scale_by_storm(1 - beta), *small)
    # The average starts from zero: the first time it lacks beta g, and of that a share of beta remains in each step.
    lack = np.array([beta ** (t + 1) * flat(small[0][0]) for t in range(len(d))])
    np.testing.assert_allclose(d - averaged, lack, rtol=1e-4, atol=1e-8)


def test_what_is_no_argument_is_refused():
    with pytest.raises(ValueError, match="scope must be one of 'tree', 'leaf', got 'row'"):
        mo.contrib.mars_lion(0.1, scope="row")
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        mo.contrib.mars_correction(1.0)
    with pytest.raises(TypeError, match="decay must be a number or a scalar array"):
        mo.contrib.mars_adamw(0.1, optax.constant_schedule(0.9))
