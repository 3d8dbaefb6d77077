"""`state_bytes`: the size of an optimizer's state, before anything is allocated."""

import math
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._paths import slash_path
from .._typing import DType
from ..distributed.sharding import Shardings, state_shardings
from .stored import map_with_fields


class StateBytes(NamedTuple):
    """Bytes of an optimizer's state.

    Attributes:
      total: Bytes of all arrays of the state, over all devices and without replicas.
      per_device: Bytes on each device; `total` where no shardings were given.
      by_field: Bytes of each field over all devices, such as "0/velocity/codes" or "0/mu"; they add up to `total`.
      by_field_per_device: Bytes of each field on each device.
    """

    total: float
    per_device: float
    by_field: dict[str, float]
    by_field_per_device: dict[str, float]


def state_bytes(
    tx: optax.GradientTransformation, params: optax.Params, shardings: Shardings | None = None
) -> StateBytes:
    """Bytes of the state of an optimizer, by field and by device, from shapes alone.

        mo.state_bytes(tx, jax.eval_shape(model.init, key, x)).total / 2**30

    Four-bit integers count as half a byte, as GPUs and TPUs store them; XLA's CPU backend stores one per byte.

    Args:
      tx: The optimizer: any transformation of Optax or of this package.
      params: A tree of arrays or `ShapeDtypeStruct`; nothing is allocated.
      shardings: A tree of `NamedSharding` like `params`, on one mesh. The state is split as
        `sharding.state_shardings` says.

    Returns:
      A `StateBytes`.

    Raises:
      TypeError: If `tx` is not a transformation; as `sharding.state_shardings` for shardings that are not of that kind.
      ValueError: As `sharding.state_shardings`.
    """
    _checks.transformation("tx", tx)
    state = jax.eval_shape(tx.init, params)
    leaves = jax.tree.leaves(state)
    # The path up to the last field of a NamedTuple; what follows are velocities and parameters.
    fields = jax.tree.leaves(map_with_fields(lambda path, _: slash_path(path.up_to_field()), state))
    if shardings is None:
        local = [leaf.shape for leaf in leaves]
    else:
        placed = jax.tree.leaves(state_shardings(tx, params, shardings))
        local = [s.shard_shape(leaf.shape) for s, leaf in zip(placed, leaves, strict=True)]
    whole: Counter[str] = Counter()
    device: Counter[str] = Counter()
    for field, leaf, shape in zip(fields, leaves, local, strict=True):
        width = _bits(leaf.dtype) / 8
        whole[field] += math.prod(leaf.shape) * width
        device[field] += math.prod(shape) * width
    return StateBytes(sum(whole.values()), sum(device.values()), dict(whole), dict(device))


def _bits(dtype: DType) -> int:
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    # Of a random key too, for which NumPy has no dtype.
    return 8 * int(dtype.itemsize)
