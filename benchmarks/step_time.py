"""The time of a momentum step against that of `optax.sgd` with float32 momentum.

    python -m benchmarks.step_time

Times the jitted step, parameters and state donated, of each optimizer through to the new parameters. Optimizers take
turns with the baseline, A B A B, in one process; a ratio is that of neighbours in time, and its median and quartiles
are given, since a machine's speed drifts more than two neighbours differ. The baseline measured against itself shows
what the method resolves. Every timing lasts as many steps as the baseline needs for 20 ms. Gradients are constant.

The trees: one leaf of 4000x4000, and one of 4096x4096, where a copy of bfloat16's codes is as large as what glibc maps
anew in every step (32 MiB); three blocks of GPT-2 small with its positions and a vocabulary of 8192 (28.3 million
parameters, width 768: biases, norms and matrices as in the model, the vocabulary cut to a sixth); 1000 leaves of 64x64,
whose step XLA's CPU backend takes minutes to compile in the narrow storages.

GB/s counts what a step cannot avoid: gradient and old values read, new ones written. The share is that of a plain
elementwise copy of 4096x4096 float32 into a donated buffer, on the same device. Runs on any backend of JAX; PyTorch's
fused SGD is timed where torch is installed. Prints a table and writes benchmarks/step_time.json.
"""

import dataclasses
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import choice, whole_number

from . import _run
from ._run import Row

STORAGES = ("float32", "bfloat16", "int8", "int4")
BASELINE = "optax.sgd"
TORCH = "torch.optim.SGD(fused)"
LEAST_SECONDS = 0.02

# A function from a number of steps to the seconds that they take.
Timer = Callable[[int], float]
# A tree of shapes.
Shapes: TypeAlias = Mapping[str, "tuple[int, ...] | Shapes"]


class Subject(NamedTuple):
    """An optimizer ready to be timed; bytes of its state, what tracing and compiling took, and the compiled step."""

    timer: Timer
    state_bytes: float
    compile_seconds: float
    program: jax.stages.Compiled | None = None


def trees(quick: bool) -> dict[str, Shapes]:
    """Shapes of the parameters, tree by tree."""
    smaller, larger, leaves = (250, 256, 20) if quick else (4000, 4096, 1000)
    sizes = (1, 64, 256) if quick else (3, 768, 8192)
    return {
        "4000 x 4000": {"leaf": (smaller, smaller)},
        "4096 x 4096": {"leaf": (larger, larger)},
        "transformer": transformer(*sizes),
        "small leaves": {f"leaf {i}": (64, 64) for i in range(leaves)},
    }


def transformer(blocks: int, width: int, vocabulary: int) -> Shapes:
    """GPT-2, whose output shares the embedding of tokens."""
    ends: Shapes = {"tokens": (vocabulary, width), "positions": (1024, width), "norm": norm(width)}
    return {**ends, **{f"block {i}": block(width) for i in range(blocks)}}


def block(width: int) -> Shapes:
    """One block of GPT-2, whose attention has one matrix for queries, keys and values."""

    def dense(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (rows, columns), "bias": (columns,)}

    return {
        "norm 1": norm(width),
        "attention": dense(width, 3 * width),
        "projection": dense(width, width),
        "norm 2": norm(width),
        "up": dense(width, 4 * width),
        "down": dense(4 * width, width),
    }


def norm(width: int) -> dict[str, tuple[int, ...]]:
    """Scale and shift of a layer norm."""
    return {"scale": (width,), "bias": (width,)}


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The optimizers that are timed, the baseline first."""
    table = {
        BASELINE: optax.sgd(0.1, momentum=0.9),
        f"{BASELINE} again": optax.sgd(0.1, momentum=0.9),
        "optax.sgd, nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
        "optax.sgd, bfloat16": optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.bfloat16),
        "optax.adamw": optax.adamw(0.001),
    }
    for nesterov in (False, True):
        for storage in STORAGES:
            name = f"mo.sgd, {storage}" + (", nesterov" if nesterov else "")
            table[name] = mo.sgd(0.1, 0.9, nesterov=nesterov, storage=storage)
    return table


def gradients_of(shapes: Shapes) -> optax.Updates:
    """Normal numbers of a hundredth, as NumPy arrays."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32) / 100, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def jax_subject(tx: optax.GradientTransformation, gradients: optax.Updates) -> Subject:
    """Optimizer, gradients and parameters, compiled and warmed up."""

    def step(
        params: optax.Params, state: optax.OptState, gradients: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.ones_like, gradients)
    carry = (params, tx.init(params))
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, gradients).compile()
    compile_seconds = time.perf_counter() - start

    def timer(steps: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(steps):
            carry = compiled(*carry, gradients)
        jax.block_until_ready(carry)
        return time.perf_counter() - start

    timer(3)
    return Subject(timer, mo.state_bytes(tx, gradients).total, compile_seconds, compiled)


def torch_subject(gradients: optax.Updates, make: Callable[[list[Any]], Any]) -> Subject:
    """The same for `make(params)`, an optimizer of PyTorch's kind, on the GPU where JAX has one and torch too."""
    import torch  # noqa: PLC0415

    on_gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    params = []
    for gradient in jax.tree.leaves(gradients):
        params.append(torch.ones(gradient.shape, device="cuda" if on_gpu else "cpu", requires_grad=True))
        params[-1].grad = torch.tensor(np.asarray(gradient), device=params[-1].device)
    optimizer = make(params)

    def timer(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timer(3)
    state = [x for entries in optimizer.state.values() for x in entries.values() if torch.is_tensor(x)]
    return Subject(timer, sum(x.numel() * x.element_size() for x in state), 0.0)


def fused_sgd(params: list[Any]) -> Any:
    """PyTorch's fused SGD."""
    import torch  # noqa: PLC0415

    return torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True)


def pairs_of(first: Timer, second: Timer, pairs: int) -> np.ndarray:
    """Seconds per step of both in turn, shape (pairs, 2)."""
    once = min(first(1) for _ in range(3))
    steps = max(1, round(LEAST_SECONDS / once))
    return np.array([[timer(steps) / steps for timer in (first, second)] for _ in range(pairs)])


def copy_speed(side: int, pairs: int) -> float:
    """Bytes per second of an elementwise copy into a buffer that exists; reads and writes both count."""
    # Negated, so that no backend can hand the old buffer on; the target is given so that none is allocated.
    copy = jax.jit(lambda source, target: -source, donate_argnums=1, keep_unused=True)
    source, target = jnp.ones((side, side)), jnp.zeros((side, side))

    def timer(steps: int) -> float:
        nonlocal target
        start = time.perf_counter()
        for _ in range(steps):
            target = copy(source, target)
        jax.block_until_ready(target)
        return time.perf_counter() - start

    timer(3)
    seconds = pairs_of(timer, timer, pairs)
    return 2 * source.nbytes / float(np.median(seconds))


def names_of_all() -> list[str]:
    """The optimizers that can be timed on this machine."""
    return [*optimizers(), *([TORCH] if importlib.util.find_spec("torch") else [])]


def measure(shapes_of: dict[str, Shapes], names: list[str], pairs: int, copy: float) -> list[Row]:
    """One row for each tree and optimizer."""
    rows = []
    with tqdm(total=len(shapes_of) * len(names), unit="row", leave=False) as bar:
        for tree, shapes in shapes_of.items():
            gradients = jax.tree.map(jnp.asarray, gradients_of(shapes))
            baseline = jax_subject(optimizers()[BASELINE], gradients)
            for name in names:
                bar.set_description(f"{tree}, {name}")
                if name == BASELINE:
                    subject = baseline
                else:
                    subject = (
                        torch_subject(gradients, fused_sgd)
                        if name == TORCH
                        else jax_subject(optimizers()[name], gradients)
                    )
                seconds = pairs_of(baseline.timer, subject.timer, pairs)
                rows.append({"tree": tree, "optimizer": name} | summary(seconds, gradients, subject, copy))
                bar.update()
    return rows


def summary(seconds: np.ndarray, gradients: optax.Updates, subject: Subject, copy: float) -> Row:
    """Median time, ratio to the baseline with quartiles, and speed."""
    leaves = jax.tree.leaves(gradients)
    count = sum(leaf.size for leaf in leaves)
    low, ratio, high = np.quantile(seconds[:, 1] / seconds[:, 0], [0.25, 0.5, 0.75])
    middle = float(np.median(seconds[:, 1]))
    speed = (12 * count + 2 * subject.state_bytes) / middle
    return {
        "leaves": len(leaves),
        "parameters": count,
        "state_bytes_per_parameter": subject.state_bytes / count,
        "compile_seconds": subject.compile_seconds,
        "milliseconds": 1e3 * middle,
        "ratio": float(ratio),
        "ratio_quartiles": [float(low), float(high)],
        "gigabytes_per_second": speed / 1e9,
        "share_of_copy": speed / copy,
    }


# The columns in print of a row with a `summary`, besides those that only one benchmark has.
NAMED = {"tree": "{tree}", "optimizer": "{optimizer}", "state": "{state_bytes_per_parameter:.2f}"}
TIMES = {
    "ms": "{milliseconds:.3f}",
    "ratio (quartiles)": "{ratio:.2f} ({ratio_quartiles[0]:.2f} to {ratio_quartiles[1]:.2f})",
    "GB/s": "{gigabytes_per_second:.1f}",
    "of copy": "{share_of_copy:.0%}",
}


def table(rows: list[Row]) -> str:
    """The rows in print."""
    return _run.table({**NAMED, "compile": "{compile_seconds:.1f} s", **TIMES}, rows)


TREES, OPTIMIZERS = tuple(trees(quick=True)), tuple(names_of_all())


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    pairs: Annotated[int | None, whole_number(1, 10_000)] = None
    """timings of each row; None is 30, or 3 with --quick"""
    quick: bool = False
    """small trees, 3 pairs: to see that it runs"""
    trees: tuple[Annotated[str, choice(TREES)], ...] = TREES
    """what to time"""
    optimizers: tuple[Annotated[str, choice(OPTIMIZERS)], ...] = OPTIMIZERS
    """which ones"""


def main() -> None:
    """Time every row, print the table and write the file."""
    run = _run.Run("step_time", __doc__, Options)
    options = run.options
    pairs = options.pairs or (3 if options.quick else 30)
    shapes_of = {name: shapes for name, shapes in trees(options.quick).items() if name in options.trees}
    copy = copy_speed(256 if options.quick else 4096, pairs)
    rows = measure(shapes_of, list(options.optimizers), pairs, copy)
    print(table(rows))
    if TORCH not in names_of_all():
        print("torch is not installed: its fused SGD is left out.")
    print(f"An elementwise copy moves {copy / 1e9:.1f} GB/s on {jax.devices()[0].device_kind}.")
    run.write({"copy_gigabytes_per_second": copy / 1e9, "pairs": pairs, "rows": rows}, versions=torch_version())


def torch_version() -> dict[str, str]:
    """Of PyTorch, where it is installed."""
    if TORCH not in names_of_all():
        return {}
    import torch  # noqa: PLC0415

    return {"torch": torch.__version__}


if __name__ == "__main__":
    main()
