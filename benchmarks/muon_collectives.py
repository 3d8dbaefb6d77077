"""Bytes that devices send each other for one update of Muon, exactly, from compiled programs.

    python -m benchmarks.muon_collectives

As many matrices as there are devices, 512 x 2048, split over eight devices of a CPU, or over sixteen TPUs v5e for which
XLA compiles without having one. For each way to split them: what a device receives for each parameter, and the number
of collectives. Prints a table and writes benchmarks/muon_collectives.json.
"""

# First: compilers read the settings in it when JAX is loaded.
from ._moved_bytes import target  # isort: skip

import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import choice

from . import _run
from ._collectives import sent

TARGETS = ("cpu", "tpu")
SHAPE = (512, 2048)
P = PartitionSpec
# The split of each matrix, and the matrices for each device.
SPLITS = {
    "rows": (P(("data", "model")), 1.0),
    "columns": (P(None, ("data", "model")), 1.0),
    "rows and columns": (P("data", "model"), 1.0),
    "columns, copies over a data axis": (P(None, "model"), 1.0),
    "rows, five matrices for eight devices": (P(("data", "model")), 5 / 8),
}
# Left out for TPUs, whose compiler takes its time.
ONLY_CPU = tuple(SPLITS)[3:]
OPTIMIZERS = ("optax.contrib.muon", "mo.muon", "mo.muon, iterations in bfloat16")


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    targets: tuple[Annotated[str, choice(TARGETS)], ...] = TARGETS
    """devices to compile for"""


def mesh_of(name: str) -> Mesh:
    """Eight devices as 4 x 2, or sixteen as 8 x 2."""
    target(name)  # also turns off the cache of compiled programs
    if name == "cpu":
        devices = np.asarray(jax.devices("cpu")[:8]).reshape(4, 2)
    else:
        devices = np.asarray(topologies.get_topology_desc("v5e:4x4", platform="tpu").devices).reshape(8, 2)
    return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def optimizer(name: str, mesh: Mesh, spec: PartitionSpec) -> optax.GradientTransformation:
    """The optimizer of a row."""
    if name == "optax.contrib.muon":
        return optax.contrib.muon(0.02)
    return mo.muon(0.02, dtype=jnp.bfloat16 if "bfloat16" in name else None, mesh=mesh, specs=spec)


def compiled(tx: optax.GradientTransformation, count: int, sharding: Any) -> Any:
    """The update of so many matrices with this sharding."""

    def place(x: Any) -> Any:
        split = sharding if len(x.shape) == len(SHAPE) else NamedSharding(sharding.mesh, P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)

    params = {str(i): place(jax.ShapeDtypeStruct(SHAPE, jnp.float32)) for i in range(count)}
    state = jax.tree.map(place, jax.eval_shape(tx.init, params))
    out = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(tx.update, out_shardings=out).lower(params, state, params).compile()


def main() -> None:
    """Compile every row, print the table and write the file."""
    jax.config.update("jax_num_cpu_devices", 8)
    run = _run.Run("muon_collectives", __doc__, Options)
    rows: list[dict[str, Any]] = []
    with tqdm(leave=False) as bar:
        for name_of_target in run.options.targets:
            mesh = mesh_of(name_of_target)
            for split, (spec, each) in SPLITS.items():
                if name_of_target == "tpu" and split in ONLY_CPU:
                    continue
                count = round(each * mesh.size)
                for name in OPTIMIZERS:
                    program = compiled(optimizer(name, mesh, spec), count, NamedSharding(mesh, spec))
                    found = sent(program)
                    parameters = count * SHAPE[0] * SHAPE[1]
                    rows.append(
                        {
                            **{"target": name_of_target, "devices": mesh.size, "split": split, "optimizer": name},
                            **{"bytes": round(found.bytes / parameters, 3), "collectives": found.kinds},
                        }
                    )
                    bar.update()
    for row in rows:
        kinds = ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items())
        print(f"{row['target']:4} {row['split']:38} {row['optimizer']:32} {row['bytes']:7.2f}  {kinds}")
    run.write({"shape": SHAPE, "unit": "bytes received per parameter and device", "rows": rows})


if __name__ == "__main__":
    main()
