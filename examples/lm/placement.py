"""Where parameters, optimizer states and batches are: over all devices, in one of three ways."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import momentum_optax as mo

from .config import CONFIGS
from .model import init, matrices
from .optimizers import build
from .settings import Settings

# The one axis of the mesh.
AXIS = "devices"


class Placed(NamedTuple):
    """An optimizer, and the shardings of what it is about.

    Attributes:
      tx: The optimizer.
      params: Of the parameters, a tree like them.
      opt_state: Of its state, a tree like it.
      batch: Of a batch, of which every device has a share.
      batches: Of several batches, likewise.
      scalar: Of what is the same on every device.
    """

    tx: optax.GradientTransformation
    params: optax.Params
    opt_state: optax.OptState
    batch: NamedSharding
    batches: NamedSharding
    scalar: NamedSharding


def place(settings: Settings, devices: Sequence[jax.Device] | None = None) -> Placed:
    """The optimizer of these settings on devices, by default on all that there are.

    Raises:
      ValueError: As `build` does.
    """
    devices = jax.devices() if devices is None else devices
    mesh = jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    config = CONFIGS[settings.config]
    shapes = jax.eval_shape(partial(init, config), 0)
    whole = jax.tree.map(lambda _: PartitionSpec(), shapes)
    specs = jax.tree.map(partial(_split, mesh.size), shapes) if settings.mesh == "split" else whole
    shares = mo.sharding.zero1_specs(shapes, mesh, AXIS) if settings.mesh == "zero1" else specs
    tx = build(settings, matrices(config), *((mesh, shares) if mesh.size > 1 else ()))
    opt_state = mo.sharding.state_shardings(tx, shapes, _named(mesh, shares))
    if settings.mesh == "zero1":
        tx = mo.sharding.zero1(tx, mesh, AXIS)
    batch, batches, scalar = (PartitionSpec(*axes) for axes in ((AXIS,), (None, AXIS), ()))
    return Placed(tx, _named(mesh, specs), opt_state, *_named(mesh, (batch, batches, scalar)))


def _split(devices: int, param: jax.ShapeDtypeStruct) -> PartitionSpec:
    """Along the longest axis that the devices divide, but not that of layers, which the scan takes one by one."""
    lengths = {axis: n for axis, n in enumerate(param.shape) if n % devices == 0 and (axis or param.ndim < 3)}
    axis = max(lengths, key=lengths.__getitem__, default=None)
    return PartitionSpec(*(AXIS if i == axis else None for i in range(param.ndim)))


def _named(mesh: Mesh, specs: optax.Params) -> optax.Params:
    return jax.tree.map(partial(NamedSharding, mesh), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
