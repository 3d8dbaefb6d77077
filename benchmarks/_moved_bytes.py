"""Bytes that a compiled optimizer step moves, exactly, for accelerators that need not be here.

JAX compiles ahead of time for a device that is absent (TPU: the package libtpu; H200: the CUDA plugin and nvcc, without
a driver). The bytes are the operands and results of the fusions in the optimized program. A fused slice is charged for
the slice, an asynchronous copy once, buffers in on-chip memory not at all.
"""

import functools
import itertools
import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The TPU compiler would ask a metadata server where it is, and allow one process only.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from ._programs import Instruction, parse, runs

# The leaf of most rows.
LARGE = (8192, 4096)

# From NVIDIA's data sheet and programming guide, in the format that XLA wants.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class Count(NamedTuple):
    """Bytes that a program moves, per parameter, and its operations.

    Attributes:
      bytes: Moved in every step.
      branch: Moved by conditionals.
      temporaries: Allocated beside arguments and results.
      passes: The operations that move a byte per parameter or more.
      kernels: All operations of the entry: on a GPU each is a launch.
    """

    bytes: float
    branch: float
    temporaries: float
    passes: int
    kernels: int


def target(name: str) -> jax.Device:
    """The device to compile for."""
    # Without its device a compiler can write a program to JAX's persistent cache and cannot read it there.
    jax.config.update("jax_enable_compilation_cache", False)
    if name == "cpu":
        return jax.devices("cpu")[0]
    if name == "tpu":
        return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    one = {"topology_name": "1x1x1", "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", target_config=H200, **one).devices[0]


def compiled(tx: optax.GradientTransformation, shape: tuple[int, ...], device: jax.Device) -> jax.stages.Compiled:
    """The step of `tx` on one leaf for `device`, with parameters and state donated."""
    return lowered(tx, jax.ShapeDtypeStruct(shape, jnp.float32), device).compile()


def lowered(tx: optax.GradientTransformation, params: optax.Params, device: jax.Device) -> jax.stages.Lowered:
    """The traced step of `tx` on a tree of shapes for `device`, with parameters and state donated; not compiled yet."""
    params = placed(params, device)
    state = placed(jax.eval_shape(functools.partial(tx.init), params), device)

    def step(
        params: optax.Params, state: optax.OptState, gradients: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)


def placed(tree: optax.Params, device: jax.Device) -> optax.Params:
    """The shapes of a tree, on one device."""
    sharding = SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


_ARRAY = re.compile(r"(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?")


def size(kind: str) -> float:
    """Bytes of a type in main memory; TPU layouts mark on-chip buffers with S(1) and up."""
    total = 0.0
    for dtype, dims, layout in _ARRAY.findall(kind):
        if "S(" not in layout:
            bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
            total += math.prod(int(d) for d in dims.split(",") if d) * bits / 8
    return total


def read_sizes(body: list[Instruction]) -> Iterator[tuple[int, float | None]]:
    """For each parameter of a fusion its index and what is read of it: None for all, or the sum of its slices."""
    for parameter in body:
        if parameter.op == "parameter":
            index = int(re.match(r"\d+", parameter.operands[0]).group())  # type: ignore[union-attr]  # always a number
            yield index, _sliced(parameter.name, body)


# A fusion computes of their results what it needs.
_ELEMENTWISE = {"bitcast", "convert", "abs", "negate", "sqrt", "rsqrt"}
_ELEMENTWISE |= {"add", "subtract", "multiply", "divide", "maximum", "minimum"}


def _sliced(name: str, body: list[Instruction]) -> float | None:
    """The sum of the slices that are read of a value, or of what is computed from it element by element; else None."""
    total = 0.0
    users = [i for i in body if name in i.operands]
    for user in users:
        if user.op in ("slice", "dynamic-slice") and user.operands[0] == name:
            part: float | None = size(user.kind)
        else:
            part = _sliced(user.name, body) if user.op in _ELEMENTWISE else None
        if part is None:
            return None
        total += part
    return total if users else None


def _started(instruction: Instruction) -> float:
    """The bytes of an asynchronous copy or slice, which has its source among its results."""
    if instruction.op != "slice-start":
        return size(instruction.kind)
    source, part = (found.group() for found in itertools.islice(_ARRAY.finditer(instruction.kind), 2))
    # As much is read as is kept, wherever that is.
    return size(part) + (size(part.replace("S(", "")) if size(source) else 0.0)


def count(program: jax.stages.Compiled, parameters: int) -> Count:
    """Count the bytes that a compiled program moves."""
    computations, entry = parse(program.as_text() or "")
    sizes = {i.name: size(i.kind) for i in computations[entry]}
    moved = branch = 0.0
    passes = 0
    for instruction in computations[entry]:
        if not runs(instruction):
            continue
        part = dict(read_sizes(computations.get(instruction.called, [])))
        reads = [part.get(i) for i in range(len(instruction.operands))]
        operands = [
            sizes.get(name, 0.0) if read is None else read
            for name, read in zip(instruction.operands, reads, strict=True)
        ]
        result = sizes[instruction.name]
        if instruction.op.endswith("-start"):
            operands, result = [_started(instruction)], 0.0
        cost = result + sum(operands)
        if instruction.op == "conditional":
            branch += cost
        else:
            moved += cost
            passes += cost >= parameters
    memory: Any = program.memory_analysis()
    kernels = sum(map(runs, computations[entry]))
    return Count(moved / parameters, branch / parameters, memory.temp_size_in_bytes / parameters, passes, kernels)
