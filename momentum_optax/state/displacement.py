"""Points beside the parameters: the parameters plus a weighted sum of the velocities."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from .._tree import map_onto, path_name
from .._typing import KeyPath, Leaf, Number
from ..filters.step import weighted_sum
from ..storage.protocol import arithmetic_dtype
from ..transform import MomentumState
from .velocity import decoded


def displaced(
    params: optax.Params, state: MomentumState, weights: Sequence[Number], rate: Number = 1.0
) -> optax.Params:
    r"""The point $\theta + \eta\,w \cdot v$, in the boxes and dtypes of the parameters.

    Args:
      params: theta; leaves without a velocity stay.
      state: Of `scale_by_momentum`, with K velocities v.
      weights: w, K numbers or scalar arrays.
      rate: eta, a number or a scalar array.

    Raises:
      ValueError: If the parameters are not like the velocities, naming the first path that differs.
    """
    velocities = decoded(state.velocity)
    if not velocities:
        return params

    def move(path: KeyPath, p: Leaf, *v: jax.Array) -> jax.Array:
        if jnp.shape(p) != v[0].shape:
            name = path_name(path)
            raise ValueError(f"params must have the shapes of the state, {v[0].shape} for {name}, got {jnp.shape(p)}")
        far = weighted_sum(tuple(weights), v)
        dtype = jnp.result_type(p)
        wide = jnp.asarray(p, arithmetic_dtype(dtype, far.dtype))
        return (wide + jnp.asarray(rate, far.dtype) * far).astype(dtype)

    return map_onto(move, params, velocities)
