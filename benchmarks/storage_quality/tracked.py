"""An optimizer whose velocity is compared with the exact one of the same gradients."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

import momentum_optax as mo
from momentum_optax.storage import Storage

# Of an optimizer, and of the exact velocity.
States: TypeAlias = tuple[optax.OptState, optax.OptState]


class Tracked:
    """An optimizer in some storage, and beside it the exact velocity of the same gradients."""

    def __init__(self, storage: str | Storage, decay: float, rate: float) -> None:
        rule = mo.nesterov(decay)
        self.tx = optax.chain(mo.scale_by_momentum(rule, storage=storage), optax.scale_by_learning_rate(rate))
        self.exact = mo.scale_by_momentum(rule)

    def init(self, params: optax.Params) -> States:
        """The states of both."""
        return self.tx.init(params), self.exact.init(params)

    def step(
        self, params: optax.Params, state: States, gradients: optax.Updates
    ) -> tuple[optax.Params, States, jax.Array]:
        """New parameters and states, and the relative errors: mean over leaves, and of the whole tree."""
        updates, stored = self.tx.update(gradients, state[0], params)
        _, exact = self.exact.update(gradients, state[1])
        errors = relative_errors(mo.velocity(stored)[0], mo.velocity(exact)[0])
        return optax.apply_updates(params, updates), (stored, exact), errors

    def bytes_per_parameter(self, params: optax.Params) -> float:
        """Size of the stored velocity."""
        state = jax.eval_shape(self.tx.init, params)[0]
        # An accelerator packs two of int4 into a byte.
        width = {jnp.dtype(jnp.int4): 0.5}
        total = sum(x.size * width.get(x.dtype, x.dtype.itemsize) for x in jax.tree.leaves(state.velocity))
        return float(total / sum(x.size for x in jax.tree.leaves(params)))


def relative_errors(stored: optax.Updates, exact: optax.Updates) -> jax.Array:
    """|stored - exact| / |exact|: mean over leaves, and of the whole tree; 0 where nothing has a velocity yet."""
    norms = jax.tree.map(lambda s, e: jnp.stack([jnp.sum(jnp.square(s - e)), jnp.sum(jnp.square(e))]), stored, exact)
    squares = jnp.stack(jax.tree.leaves(norms))
    squares = jnp.concatenate([squares, squares.sum(0, keepdims=True)])
    ratios = jnp.sqrt(jnp.where(squares[:, 1] > 0, squares[:, 0] / squares[:, 1], 0))
    return jnp.stack([ratios[:-1].mean(), ratios[-1]])
