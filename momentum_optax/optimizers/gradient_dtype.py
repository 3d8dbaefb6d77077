"""Dtypes that a wider injected hyperparameter must not change: those of updates and of states."""

import jax
import jax.numpy as jnp
import optax

from .._typing import PyTree
from ..state.mismatch import explained
from ..storage.protocol import in_dtype


def in_gradient_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with updates of the gradients' dtypes: Optax multiplies by wider hyperparameters without a cast.

    For that it needs JAX's standard promotion of dtypes, also where the user's own code does not.
    """
    run = explained(optax.with_extra_args_support(tx).update, tx.init)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        with jax.numpy_dtype_promotion("standard"):
            new, state = run(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: in_dtype(u, jnp.result_type(g)), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def keeping_state_dtypes(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with a state that keeps its dtypes: wider injected decays would widen Optax's moments."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new = tx.update(updates, state, params)
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(tx.init, update)
