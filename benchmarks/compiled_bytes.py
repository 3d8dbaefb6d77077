"""Bytes that a compiled momentum step moves, on accelerators that need not be here.

    make compiled-bytes          # TPU v5e, H200 and CPU
    python -m benchmarks.compiled_bytes --targets tpu cpu

The update is memory-bound, so the bytes that its compiled program moves to and from main memory are its cost. They are
exact and do not depend on load: see `_moved_bytes`.

The compiled program: optimizer -> apply_updates on one float32 leaf, parameters and state donated. The floor reads
gradient, parameter and velocities and writes parameter and velocities: 12 + 2 x (bytes of the velocities). Prints a
table and writes benchmarks/compiled_bytes.json.
"""

# First: compilers read the settings in it when JAX is loaded.
from . import _moved_bytes  # isort: skip

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import choice
from momentum_optax.optimizers.arguments import with_raw_gradient

from . import _run
from ._moved_bytes import LARGE

TARGETS = ("tpu", "h200", "cpu")
SHAPES = ((8191, 4097), (3, 3, 256, 512), (50257, 768), (1024, 3, 16, 64))

RULES = {
    "heavy_ball": mo.heavy_ball(0.9),
    "ema": mo.ema(0.99),
    "nesterov": mo.nesterov(0.9),
    "quasi_hyperbolic": mo.quasi_hyperbolic(0.999, 0.7),
    "aggregated": mo.aggregated(),
}
STORAGES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
BEHIND = {
    "primal_averaging": mo.primal_averaging(),
    "ema_nesterov": mo.ema_nesterov(),
    "outer_nesterov": mo.outer_nesterov(),
    "lookahead": mo.lookahead(),
}
# Four bits are too few for sums of steps that nothing lets fade.
WIDE_ENOUGH = ("float32", "bfloat16", "int8")


class Row(NamedTuple):
    """One program to count: its name, how to build the optimizer, the leaf's shape, and the floor in bytes."""

    name: str
    build: Callable[[], optax.GradientTransformation]
    shape: tuple[int, ...]
    floor: float


def plain(momentum: optax.GradientTransformation) -> optax.GradientTransformation:
    """The usual chain."""
    return optax.chain(momentum, optax.scale_by_learning_rate(0.1))


def decayed(momentum: optax.GradientTransformation) -> optax.GradientTransformation:
    """As in `mo.sgd`: weight decay through the momentum, which makes the gradient a computed one; a scheduled rate."""
    rate = optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, 1000))
    return with_raw_gradient(optax.chain(optax.add_decayed_weights(1e-4), momentum, rate))


def _chained(
    chain: Callable[[optax.GradientTransformation], optax.GradientTransformation],
    momentum: Callable[[], optax.GradientTransformation],
) -> optax.GradientTransformation:
    return chain(momentum())


def rows() -> list[Row]:
    """Every program that is counted."""
    found = [Row("optax.trace", lambda: plain(optax.trace(0.9)), LARGE, 20.0)]
    for name, rule in RULES.items():
        for storage, width in STORAGES.items():
            floor = 12.0 + 2 * width * rule.pruned().order

            momentum = functools.partial(mo.scale_by_momentum, rule, storage=storage)
            found.append(Row(f"{name}, {storage}", functools.partial(_chained, plain, momentum), LARGE, floor))
            if storage in ("int8", "int4") and name in ("heavy_ball", "nesterov"):
                label = f"{name}, {storage}, weight decay and schedule"
                build = functools.partial(_chained, decayed, momentum)
                found += [Row(label, build, shape, floor) for shape in (LARGE, *SHAPES)]
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
    return found + behind() + averages()


def behind() -> list[Row]:
    """Rules behind AdamW, which moves 28 bytes itself."""

    def build(rule: mo.Filter, storage: str) -> optax.GradientTransformation:
        return mo.with_momentum(optax.adamw(1e-3), rule, storage=storage)

    return [
        Row(
            f"adamw, {name} in {storage}",
            functools.partial(build, rule, storage),
            LARGE,
            28.0 + 2 * STORAGES[storage] * rule.order,
        )
        for name, rule in BEHIND.items()
        for storage in WIDE_ENOUGH
    ]


def averages() -> list[Row]:
    """Averages of the weights behind SGD with momentum, which moves 20 bytes itself, written often and rarely."""

    def build(every: int, storage: str) -> optax.GradientTransformation:
        return optax.chain(optax.sgd(0.1, 0.9), mo.average_params(0.999, every=every, storage=storage))

    return [
        Row(f"sgd, average in {storage}, every={n}", functools.partial(build, n, storage), LARGE, 20.0 + 2 * width)
        for storage, width in ((name, STORAGES[name]) for name in WIDE_ENOUGH)
        for n in (1, 100)
    ]


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    targets: tuple[Annotated[str, choice(TARGETS)], ...] = TARGETS
    """devices to compile for"""
    rows: str = ""
    """only rows in whose name this regular expression is found"""


def available(names: tuple[str, ...]) -> dict[str, jax.Device]:
    """The targets whose compilers are installed; what is missing is said."""
    found = {}
    for name in names:
        try:
            found[name] = _moved_bytes.target(name)
        except Exception as error:
            print(f"{name}: left out, no compiler for it here ({type(error).__name__})")
    return found


def main() -> None:
    """Count every row for every target, print the table and write the file."""
    run = _run.Run("compiled_bytes", __doc__, Options)
    targets = available(run.options.targets)
    chosen = [row for row in rows() if re.search(run.options.rows, row.name)]
    results = []
    with tqdm(total=len(chosen) * len(targets), desc="compiling", leave=False) as bar:
        for row in chosen:
            result: _run.Row = {"row": row.name, "shape": row.shape, "floor": row.floor}
            for name, device in targets.items():
                program = _moved_bytes.compiled(row.build(), row.shape, device)
                result[name] = {
                    k: round(v, 3) for k, v in _moved_bytes.count(program, math.prod(row.shape))._asdict().items()
                }
                bar.update()
            results.append(result)
    report(results, list(targets))
    versions = {}
    if "tpu" in targets:
        import libtpu  # noqa: PLC0415  only where it was used

        versions["libtpu"] = libtpu.__version__
    run.write({"unit": "bytes per parameter", "rows": results}, versions=versions)


def report(results: list[_run.Row], targets: list[str]) -> None:
    """Print the table: bytes, passes, kernels and temporaries for each target."""
    print(
        f"{'bytes per parameter (passes of kernels; temporaries)':58}{'floor':>7}"
        + "".join(f"{t:>20}" for t in targets)
    )
    for row in results:
        name = f"{row['row']} {tuple(row['shape'])}"
        cells = [
            f"{row[t]['bytes']:.2f} ({row[t]['passes']} of {row[t]['kernels']}; {row[t]['temporaries']:.2f})"
            for t in targets
        ]
        print(f"{name:58}{row['floor']:7.1f}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
