"""How many bytes does a compiled momentum step move, on accelerators that need not be here?

    make compiled-bytes          # TPU v5e, H200 and CPU
    python -m benchmarks.compiled_bytes --targets tpu cpu

The update is memory-bound, so the bytes that its compiled program moves to and from main memory are its cost. They are
exact: JAX compiles ahead of time for a device that is absent (TPU: the package libtpu; H200: the CUDA plugin and nvcc,
without a driver), and the bytes are the operands and results of the fusions in the optimized program. A fused slice is
charged for the slice, an asynchronous copy once, buffers in on-chip memory not at all.

What is compiled: optimizer -> apply_updates on one float32 leaf, parameters and state donated. The floor reads
gradient, parameter and velocities and writes parameter and velocities: 12 + 2 x (bytes of the velocities). Prints a
table and writes benchmarks/compiled_bytes.json.
"""

import argparse
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
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
from tqdm import tqdm

import momentum_optax as mo

LARGE = (8192, 4096)
SHAPES = ((8191, 4097), (3, 3, 256, 512), (50257, 768), (1024, 3, 16, 64))

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

RULES = {
    "heavy_ball": mo.heavy_ball(0.9),
    "ema": mo.ema(0.99),
    "nesterov": mo.nesterov(0.9),
    "quasi_hyperbolic": mo.quasi_hyperbolic(0.999, 0.7),
    "aggregated": mo.aggregated(),
}
STORAGES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}


class Row(NamedTuple):
    """One program to count: its name, how to build the optimizer, the leaf's shape, and the floor in bytes."""

    name: str
    build: Callable[[], optax.GradientTransformation]
    shape: tuple[int, ...]
    floor: float


class Count(NamedTuple):
    """What one program moves, per parameter; `passes` counts the fusions that move a byte per parameter or more."""

    bytes: float
    branch: float
    temporaries: float
    passes: int


def plain(momentum: optax.GradientTransformation) -> optax.GradientTransformation:
    """The usual chain."""
    return optax.chain(momentum, optax.scale_by_learning_rate(0.1))


def decayed(momentum: optax.GradientTransformation) -> optax.GradientTransformation:
    """With what makes the gradient a computed one: weight decay through the momentum; and a scheduled rate."""
    rate = optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, 1000))
    return optax.chain(optax.add_decayed_weights(1e-4), momentum, rate)


def rows() -> list[Row]:
    """Every program that is counted."""
    found = [Row("optax.trace", lambda: plain(optax.trace(0.9)), LARGE, 20.0)]
    for name, rule in RULES.items():
        for storage, width in STORAGES.items():
            floor = 12.0 + 2 * width * rule.pruned().order

            def momentum(rule: mo.Filter = rule, storage: str = storage) -> Any:
                return mo.scale_by_momentum(rule, storage=storage)

            found.append(Row(f"{name}, {storage}", lambda m=momentum: plain(m()), LARGE, floor))
            if storage in ("int8", "int4") and name in ("heavy_ball", "nesterov"):
                label = f"{name}, {storage}, weight decay and schedule"
                found += [Row(label, lambda m=momentum: decayed(m()), shape, floor) for shape in (LARGE, *SHAPES)]
    found.append(Row("optax.adamw", lambda: optax.adamw(1e-3), LARGE, 28.0))
    found.append(Row("adamw, mu in int8", lambda: mo.compress(optax.adamw(1e-3), {"mu"}, "int8"), LARGE, 22.0))
    found.append(
        Row(
            "adamw, mu in int8, nu in uint8",
            lambda: mo.compress(optax.adamw(1e-3), {"mu": "int8", "nu": "uint8"}),
            LARGE,
            16.0,
        )
    )
    found.append(Row("adamw, nu in uint8", lambda: mo.compress(optax.adamw(1e-3), {"nu": "uint8"}), LARGE, 22.0))
    return found


def target(name: str) -> Any:
    """The device to compile for."""
    # Without its device a compiler can write a program to JAX's persistent cache and cannot read it there.
    jax.config.update("jax_enable_compilation_cache", False)
    if name == "cpu":
        return jax.devices("cpu")[0]
    if name == "tpu":
        return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]
    one = {"topology_name": "1x1x1", "topology": "1x1x1"}
    return topologies.get_topology_desc(platform="cuda", target_config=H200, **one).devices[0]


def compiled(tx: optax.GradientTransformation, shape: tuple[int, ...], device: Any) -> Any:
    """The step of `tx` for `device`, with parameters and state donated."""
    sharding = SingleDeviceSharding(device)

    def place(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = place(jax.ShapeDtypeStruct(shape, jnp.float32))
    state = jax.tree.map(place, jax.eval_shape(tx.init, params))
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


class Instruction(NamedTuple):
    """A line of an optimized program."""

    name: str
    kind: str
    op: str
    operands: list[str]
    called: str


_LINE = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_ARRAY = re.compile(r"(pred|bf16|f8\w+|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?")
# These name or regroup buffers; nothing is moved.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "partition-id"}


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of an optimized program, and the name of its entry."""
    computations: dict[str, list[Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            current = header.group(2)
            entry = current if header.group(1) else entry
            computations[current] = []
        elif current and (found := _LINE.match(line)):
            name, kind, op, rest = found.groups()
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            operands = [rest] if op == "parameter" else re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            computations[current].append(Instruction(name, kind, op, operands, called.group(1) if called else ""))
    return computations, entry


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
            users = [i for i in body if parameter.name in i.operands]
            sliced = users and all(
                u.op in ("slice", "dynamic-slice") and u.operands[0] == parameter.name for u in users
            )
            index = int(re.match(r"\d+", parameter.operands[0]).group())  # type: ignore[union-attr]  # always a number
            yield index, sum(size(u.kind) for u in users) if sliced else None


def count(program: Any, parameters: int) -> Count:
    """What a compiled program moves, per parameter."""
    computations, entry = parse(program.as_text())
    sizes = {i.name: size(i.kind) for i in computations[entry]}
    moved = branch = 0.0
    passes = 0
    for instruction in computations[entry]:
        if instruction.op in _FREE or instruction.op.endswith("-done"):
            continue
        part = dict(read_sizes(computations.get(instruction.called, [])))
        reads = [part.get(i) for i in range(len(instruction.operands))]
        operands = [
            sizes.get(name, 0.0) if read is None else read
            for name, read in zip(instruction.operands, reads, strict=True)
        ]
        # The start of an asynchronous copy has its source among its results.
        result = 0.0 if instruction.op.endswith("-start") else sizes[instruction.name]
        if instruction.op.endswith("-start"):
            operands, result = [size(instruction.kind)], 0.0
        cost = result + sum(operands)
        if instruction.op == "conditional":
            branch += cost
        else:
            moved += cost
            passes += cost >= parameters
    temporaries = program.memory_analysis().temp_size_in_bytes
    return Count(moved / parameters, branch / parameters, temporaries / parameters, passes)


def available(names: list[str]) -> dict[str, Any]:
    """The targets whose compilers are installed; what is missing is said."""
    found = {}
    for name in names:
        try:
            found[name] = target(name)
        except Exception as error:
            print(f"{name}: left out, no compiler for it here ({type(error).__name__})")
    return found


def main() -> None:
    """Count every row for every target, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["tpu", "h200", "cpu"], choices=["tpu", "h200", "cpu"])
    parser.add_argument("--rows", default="", help="only rows in whose name this regular expression is found")
    output = pathlib.Path(__file__).with_suffix(".json")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="where to write the JSON")
    arguments = parser.parse_args()
    targets = available(arguments.targets)
    chosen = [row for row in rows() if re.search(arguments.rows, row.name)]
    results = []
    with tqdm(total=len(chosen) * len(targets), desc="compiling", leave=False) as bar:
        for row in chosen:
            result: dict[str, Any] = {"row": row.name, "shape": row.shape, "floor": row.floor}
            for name, device in targets.items():
                program = compiled(row.build(), row.shape, device)
                result[name] = {k: round(v, 3) for k, v in count(program, math.prod(row.shape))._asdict().items()}
                bar.update()
            results.append(result)
    report(results, list(targets))
    versions = {"jax": jax.__version__, "optax": optax.__version__}
    if "tpu" in targets:
        import libtpu  # noqa: PLC0415  only where it was used

        versions["libtpu"] = libtpu.__version__
    command = "python -m benchmarks.compiled_bytes --targets " + " ".join(targets)
    document = {"command": command, "versions": versions, "unit": "bytes per parameter", "rows": results}
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")


def report(results: list[dict[str, Any]], targets: list[str]) -> None:
    """Print the table: bytes, passes and temporaries for each target."""
    print(f"{'bytes per parameter (passes; temporaries)':58}{'floor':>7}" + "".join(f"{t:>20}" for t in targets))
    for row in results:
        name = f"{row['row']} {tuple(row['shape'])}"
        cells = [f"{row[t]['bytes']:.2f} ({row[t]['passes']}; {row[t]['temporaries']:.2f})" for t in targets]
        print(f"{name:58}{row['floor']:7.1f}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
