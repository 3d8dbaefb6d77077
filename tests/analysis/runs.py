"""Runs of the transformation on given gradients, in float64, and what to run it on."""

import jax
import jax.numpy as jnp
import numpy as np

import momentum_optax as mo
from momentum_optax import analysis

# Curvatures of a quadratic loss.
SPECTRUM = np.array([1.0, 1.1, 1.7, 2.2, 3.1, 4.0])


def run(rule, rate, gradient, start, steps):
    """The stored and the evaluated points of a run of the transformation: after 0, 1, ..., `steps` steps."""
    tx = mo.scale_by_momentum(rule)
    start = jnp.asarray(start, jnp.float64)

    def step(carry, t):
        x, state = carry
        u, state = tx.update(gradient(x, t), state, x)
        x = mo.apply_updates(x, -rate * u)
        return (x, state), (x, x if state.lookahead is None else mo.eval_params(state, x, rate))

    _, points = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), jnp.arange(steps)))(start)
    return [np.concatenate([np.asarray(start)[None], np.asarray(p)]) for p in points]


def quadratic(curvature, seed=0):
    """A Hessian with these eigenvalues in a random basis, and the basis, one eigenvector per column."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(curvature),) * 2))[0]
    return basis @ np.diag(curvature) @ basis.T, basis


def one_velocity(a, h0, h1):
    """The filter (h0 + h1/z)/(1 - a/z)."""
    return mo.Filter(a, 1.0, h1 + a * h0, h0)


def half_of_the_limit(rule):
    """Half of the largest stable learning rate on `SPECTRUM`."""
    return 0.5 * analysis.stability_limit(rule, SPECTRUM.max(), step=1000 if rule.period in (None, 1) else None)
