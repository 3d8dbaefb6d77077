"""What an optimizer costs on the trees of real models besides bytes: tracing, compiling, kernels, `init`, temporaries.

    make real-models             # TPU v5e, H200 and CPU; the accelerators need not be here
    python -m benchmarks.real_models --targets cpu --trees 'GPT-2 small'

Trees are shapes alone and nothing is allocated: GPT-2 small, ResNet-50, a language model of 1.1 billion parameters
whose layers are stacked for a scan (the shapes of TinyLlama), and 300 and 1000 leaves of 64 x 64, which the storages in
bytes compress here (`min_size=1024`).

The program is optimizer -> apply_updates, parameters and state donated. Tracing is `jit(...).lower`, compiling what
follows it, in seconds of process time, all threads together; both begin with empty caches. Each is done again until ten
seconds are over, five times at most, and the median counts. Ratios are to `optax.sgd(momentum=)`, for AdamW to
`optax.adamw`, in the same run. `init` is traced and compiled as one program, its
ratio is to tracing and compiling the step of Optax. Kernels are the operations of the program's entry, launches on a
GPU. Prints a table and writes benchmarks/real_models.json.
"""

# First: compilers read the settings in it when JAX is loaded.
from . import _moved_bytes  # isort: skip

import dataclasses
import functools
import itertools
import math
import statistics
import time
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import choice

from . import _programs, _run
from ._run import Row
from .compiled_bytes import TARGETS, available
from .step_time import Shapes, norm, transformer

SGD, ADAMW = "optax.sgd", "optax.adamw"
COMPRESSED = "adamw, int8 and uint8"
STORAGES = ("float32", "bfloat16", "int8", "int4")
# Leaves of 64 x 64 have 4096 elements, as many as a storage in bytes compresses by default.
SMALL = 1024
# How often and for how long an optimizer is traced and compiled.
RUNS, SECONDS = 5, 10.0


class Cost(NamedTuple):
    """Of one optimizer on one tree for one target.

    Attributes:
      trace_seconds: Of tracing and lowering the step.
      compile_seconds: Of compiling it.
      init_seconds: Of tracing and compiling `init`.
      kernels: Operations of the compiled step.
      init_kernels: Operations of the compiled `init`.
      temporaries: Bytes per parameter that the step allocates beside its arguments and results.
      state_bytes: Bytes per parameter of the optimizer's state.
    """

    trace_seconds: float
    compile_seconds: float
    init_seconds: float
    kernels: int
    init_kernels: int
    temporaries: float
    state_bytes: float


def trees(quick: bool) -> dict[str, Shapes]:
    """Shapes of the parameters, tree by tree."""
    return {
        "GPT-2 small": transformer(1, 64, 512) if quick else transformer(12, 768, 50257),
        "ResNet-50": resnet((1, 1), 16) if quick else resnet((3, 4, 6, 3), 64),
        "1B, scanned": scanned(2, 64, 16, 160, 512) if quick else scanned(22, 2048, 256, 5632, 32000),
        "300 leaves": {f"leaf {i}": (64, 64) for i in range(3 if quick else 300)},
        "1000 leaves": {f"leaf {i}": (64, 64) for i in range(5 if quick else 1000)},
    }


def resnet(depths: tuple[int, ...], width: int) -> Shapes:
    """A residual network with bottlenecks, for 1000 classes; a norm has a scale and a shift."""
    tree: dict[str, Shapes] = {"stem": {"kernel": (7, 7, 3, width), "norm": norm(width)}}
    rows = width
    for stage, depth in enumerate(depths):
        middle, columns = width * 2**stage, 4 * width * 2**stage
        for i in range(depth):
            sizes = {"down": (1, 1, rows, middle), "middle": (3, 3, middle, middle), "up": (1, 1, middle, columns)}
            if i == 0:
                sizes["shortcut"] = (1, 1, rows, columns)
            tree[f"stage {stage}, block {i}"] = {
                name: {"kernel": shape, "norm": norm(shape[-1])} for name, shape in sizes.items()
            }
            rows = columns
    return tree | {"classes": {"kernel": (rows, 1000), "bias": (1000,)}}


def scanned(layers: int, width: int, keys: int, hidden: int, vocabulary: int) -> Shapes:
    """A language model with grouped keys and gated layers, in one array for each matrix of all layers."""
    sizes = {
        "queries": (width, width),
        "keys": (width, keys),
        "values": (width, keys),
        "output": (width, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "norm 1": (width,),
        "norm 2": (width,),
    }
    stacked = {name: (layers, *shape) for name, shape in sizes.items()}
    return {"tokens": (vocabulary, width), "layers": stacked, "norm": (width,), "logits": (width, vocabulary)}


def shapes_of(tree: Shapes) -> optax.Params:
    """The tree as JAX knows shapes."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def optimizers(small_leaves: bool) -> dict[str, optax.GradientTransformation]:
    """The optimizers that are compared, each baseline before those that it is one for."""
    options = {"min_size": SMALL} if small_leaves else {}
    narrow = {name: getattr(mo.storage, name)(**options) for name in ("int8", "int4", "uint8")}
    kept = {name: narrow.get(name, name) for name in STORAGES}
    return {
        SGD: optax.sgd(0.1, momentum=0.9),
        **{name: mo.sgd(0.1, 0.9, storage=storage) for name, storage in kept.items()},
        ADAMW: optax.adamw(0.001),
        COMPRESSED: mo.compress(optax.adamw(0.001), {"mu": narrow["int8"], "nu": narrow["uint8"]}),
    }


def baseline_of(optimizer: str) -> str:
    """The optimizer of Optax that one is compared with."""
    return ADAMW if "adamw" in optimizer else SGD


def cost_of(tx: optax.GradientTransformation, shapes: optax.Params, device: jax.Device, runs: int) -> Cost:
    """Trace and compile `init` and step for a device, up to `runs` times; of the seconds the medians."""
    costs: list[Cost] = []
    end = time.monotonic() + SECONDS
    while len(costs) < runs and (not costs or time.monotonic() < end):
        costs.append(cost_once(tx, shapes, device))
    seconds = [name for name in Cost._fields if name.endswith("seconds")]
    medians = {name: statistics.median(getattr(cost, name) for cost in costs) for name in seconds}
    return costs[0]._replace(**medians)


def cost_once(tx: optax.GradientTransformation, shapes: optax.Params, device: jax.Device) -> Cost:
    """Trace and compile `init` and step for a device."""
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    jax.clear_caches()
    start = time.process_time()
    lowered = _moved_bytes.lowered(tx, shapes, device)
    traced = time.process_time()
    program = lowered.compile()
    compiled = time.process_time()
    jax.clear_caches()
    begin = time.process_time()
    init = jax.jit(functools.partial(tx.init)).lower(_moved_bytes.placed(shapes, device)).compile()
    memory: Any = program.memory_analysis()
    return Cost(
        trace_seconds=traced - start,
        compile_seconds=compiled - traced,
        init_seconds=time.process_time() - begin,
        kernels=_programs.kernels_of(program),
        init_kernels=_programs.kernels_of(init),
        temporaries=memory.temp_size_in_bytes / parameters,
        state_bytes=mo.state_bytes(tx, shapes).total / parameters,
    )


def measure(devices: dict[str, jax.Device], chosen: tuple[str, ...], names: tuple[str, ...], quick: bool) -> list[Row]:
    """One row for each target, tree and optimizer."""
    rows = []
    cases = list(itertools.product(devices, chosen))
    with tqdm(total=len(cases) * len(names), unit="row", leave=False) as bar:
        for target, tree in cases:
            shapes = shapes_of(trees(quick)[tree])
            table = optimizers(tree.endswith("leaves"))
            # Once before anything is timed: compilers start up.
            cost_once(table[SGD], {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}, devices[target])
            costs: dict[str, Cost] = {}
            for name in names:
                bar.set_description(f"{target}, {tree}, {name}")
                costs[name] = cost_of(table[name], shapes, devices[target], 1 if quick else RUNS)
                base = costs.get(baseline_of(name))
                rows.append(
                    {"target": target, "tree": tree, **size_of(shapes), "optimizer": name, **costs[name]._asdict()}
                )
                rows[-1] |= ratios(costs[name], base) if base else {}
                bar.update()
    return rows


def size_of(shapes: optax.Params) -> dict[str, int]:
    """The numbers of leaves and parameters."""
    leaves = jax.tree.leaves(shapes)
    return {"leaves": len(leaves), "parameters": sum(math.prod(x.shape) for x in leaves)}


def ratios(cost: Cost, base: Cost) -> dict[str, float]:
    """A cost against that of Optax."""
    whole = base.trace_seconds + base.compile_seconds
    return {
        "trace_ratio": cost.trace_seconds / base.trace_seconds,
        "compile_ratio": cost.compile_seconds / base.compile_seconds,
        "trace_and_compile_ratio": (cost.trace_seconds + cost.compile_seconds) / whole,
        "init_ratio": cost.init_seconds / whole,
        "kernels_ratio": cost.kernels / base.kernels,
    }


def table(rows: list[Row]) -> str:
    """The rows in print."""
    columns = {
        "target": "{target}",
        "tree": "{tree}",
        "optimizer": "{optimizer}",
        "trace s": "{trace_seconds:.2f}",
        "compile s": "{compile_seconds:.2f}",
        "ratio": "{ratio:>}",
        "init": "{init:>}",
        "kernels": "{kernels:d}",
        "per leaf": "{per_leaf:.2f}",
        "temp. B": "{temporaries:.2f}",
        "state B": "{state_bytes:.3f}",
    }
    shown = []
    for row in rows:
        ratio, init = (f"{row[key]:.1f}" if key in row else "" for key in ("trace_and_compile_ratio", "init_ratio"))
        shown.append(row | {"ratio": ratio, "init": init, "per_leaf": row["kernels"] / row["leaves"]})
    return _run.table(columns, shown)


def markdown(rows: list[Row]) -> list[str]:
    """The rows of the table in docs/storage.md: for each tree and optimizer, ratios on CPU and kernels on H200."""
    found = {(row["target"], row["tree"], row["optimizer"]): row for row in rows}
    lines = []
    for tree, name in dict.fromkeys((row["tree"], row["optimizer"]) for row in rows):
        cpu, gpu = found.get(("cpu", tree, name)), found.get(("h200", tree, name))
        if cpu is None or name == baseline_of(name) or "trace_and_compile_ratio" not in cpu:
            continue
        kernels = f"{gpu['kernels'] / gpu['leaves']:.1f}" if gpu else "not counted"
        cells = (f"{cpu[key]:.1f}" for key in ("trace_ratio", "trace_and_compile_ratio", "init_ratio"))
        ends = f"{kernels} | {cpu['temporaries']:.2f} | {cpu['state_bytes']:.2f}"
        lines.append(f"| {tree} ({cpu['leaves']}) | {name} | {' | '.join(cells)} | {ends} |")
    return lines


TREES, OPTIMIZERS = tuple(trees(quick=True)), tuple(optimizers(small_leaves=True))


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    targets: tuple[Annotated[str, choice(TARGETS)], ...] = TARGETS
    """devices to compile for"""
    trees: tuple[Annotated[str, choice(TREES)], ...] = TREES
    """models"""
    optimizers: tuple[Annotated[str, choice(OPTIMIZERS)], ...] = OPTIMIZERS
    """which ones; ratios need the baselines"""
    quick: bool = False
    """small trees, CPU alone: to see that it runs"""


def main() -> None:
    """Compile every row, print the table and write the file."""
    run = _run.Run("real_models", __doc__, Options)
    options = run.options
    devices = available(("cpu",) if options.quick else options.targets)
    rows = measure(devices, options.trees, options.optimizers, options.quick)
    print(table(rows))
    print("\n".join(["", "For docs/storage.md:", *markdown(rows)]))
    run.write({"rows": rows})


if __name__ == "__main__":
    main()
