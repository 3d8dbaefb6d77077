"""Filters simulated from their definition, and filters to simulate."""

import numpy as np

import momentum_optax as mo

AGGMO = mo.aggregated((0.0, 0.9, 0.99))


def simulate(rule, gradients):
    """The definition of a filter, written out for numbers."""
    A, B, C, D = rule.matrices()
    v, out = np.zeros(rule.order), []
    for g in gradients:
        out.append(C @ v + D * g)
        v = A @ v + B * g
    return np.array(out)


def random_rule(order, seed):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(order, order))
    A *= 0.9 / max(1e-9, abs(np.linalg.eigvals(A)).max())
    return mo.Filter(A, rng.normal(size=order), rng.normal(size=order), rng.normal())
