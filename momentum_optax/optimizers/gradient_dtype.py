"""`in_gradient_dtype`: updates in the dtypes of the gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..state.mismatch import explained


def in_gradient_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with updates of the gradients' dtypes: Optax multiplies by wider hyperparameters as they are.

    For that it needs JAX's usual promotion of dtypes, also where the user's own code may do without.
    """
    run = explained(optax.with_extra_args_support(tx).update, tx.init)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            new, state = run(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
