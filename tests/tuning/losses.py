"""Losses of known curvature."""

import jax.numpy as jnp
import numpy as np

ONES = jnp.ones(3)


def bowl(eigenvalues, seed=0, dtype=np.float64):
    """A quadratic loss with a batch that scales it, its parameters in two leaves, and the Hessian's eigenvectors."""
    n = len(eigenvalues)
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    hessian = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T, dtype)

    def loss(params, batch):
        x = jnp.concatenate([params["a"].ravel(), params["b"]])
        return batch * (x @ hessian @ x) / 2

    start = np.random.default_rng(seed + 1).normal(size=n).astype(dtype)
    return loss, {"a": jnp.asarray(start[:4]).reshape(2, 2), "b": jnp.asarray(start[4:])}


def square(p, _):
    return jnp.sum(p**2)
