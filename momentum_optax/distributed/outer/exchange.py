"""The mean of pseudo-gradients over the workers: exact, or one byte per parameter with error feedback."""

import jax
import jax.numpy as jnp
import numpy as np

from ..._tree import LEAF, Place, update_leaves
from ..._typing import AxisName, Number, PyTree
from ...storage.protocol import arithmetic_dtype, times


def total(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The sum over the workers; `x` for a single worker without an axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def share_of(weight: Number, axis_name: AxisName) -> jax.Array:
    """This worker's weight over the sum of all weights, as wide as types go; 0 where they sum to 0."""
    own = jnp.asarray(weight, float)
    whole = total(own, axis_name)
    return own / jnp.where(whole > 0, whole, 1)


def exact_mean(progress: PyTree, share: jax.Array, axis_name: AxisName) -> PyTree:
    """The weighted mean of all workers' progress, summed in its own dtype."""
    return jax.tree.map(lambda d: total(times(d, share), axis_name), progress)


def byte_mean(progress: PyTree, residual: PyTree, share: jax.Array, axis_name: AxisName) -> tuple[PyTree, PyTree]:
    """The weighted mean of what all workers send in bytes, and the residual that this one sends later.

    Complex leaves are sent in full.
    """

    def exchanged(_: Place, d: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        if jnp.iscomplexobj(d):
            return total(times(d, share), axis_name), r
        wanted = d + r
        codes, scale = _encoded(wanted)
        # Codes and scales are sent; each receiver decodes them.
        all_codes, all_scales = (_gathered(x, axis_name) for x in (codes, scale))
        shares = _gathered(share.astype(jnp.float32), axis_name).reshape(-1, *(1,) * d.ndim)
        mean = (all_codes.astype(jnp.float32) * (all_scales * shares)).sum(0).astype(d.dtype)
        sent = (codes.astype(jnp.float32) * scale).astype(d.dtype)
        # A missing worker has sent nothing.
        return mean, jnp.where(share > 0, wanted - sent, r)

    return update_leaves(exchanged, progress, residual, LEAF)


def _gathered(x: jax.Array, axis_name: AxisName) -> jax.Array:
    """One entry per worker along a first axis."""
    return x[None] if axis_name is None else jax.lax.all_gather(x, axis_name)


def _encoded(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whole multiples of one scale per row, rounded to nearest: error feedback sends the rest later."""
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axes, keepdims=True, initial=0) * np.float32(1 / 127)
    wide = x.astype(arithmetic_dtype(x.dtype))
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1).astype(wide.dtype)).astype(jnp.int8)
    return codes, scale
