"""The time of row-sparse momentum against that of a dense step, by the share of active rows.

    python -m benchmarks.row_sparse

An embedding of 50,000 x 256 in float32, of which a share of the rows, drawn at random for each step, have gradients.
The dense step is `optax.sgd` with momentum and `optax.apply_updates` for a gradient of the whole table that is given,
so that what it takes to make one is not counted. Against it: reading the rows and a step for their gradients, the same
with a BCOO gradient, and a step for the dense gradient with a mask of its rows. All leave the same table. Everything is
jitted, table and state donated. They take turns with the dense step, in one process; a ratio is that of neighbours in
time. The dense step measured against itself shows what the method resolves. Prints a table and writes
benchmarks/row_sparse.json.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import sparse
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import whole_number
from momentum_optax.embeddings import RowSparseState

from . import _run
from ._run import Row

SHAPE = (50_000, 256)
SHARES = (0.001, 0.01, 0.03, 0.1, 0.2, 0.3, 1.0)
RATE, DECAY = 0.1, 0.9
# Steps until the rows repeat.
BATCHES = 20
LEAST_SECONDS = 0.02
# A table and the state of its optimizer.
Carry: TypeAlias = tuple[jax.Array, optax.OptState]
OPT, SGD = mo.row_sparse(mo.heavy_ball(DECAY), RATE), optax.sgd(RATE, DECAY)


def dense(table: jax.Array, state: optax.OptState, gradient: jax.Array) -> Carry:
    """The step that every row-sparse step is equal to."""
    updates, state = SGD.update(gradient, state)
    return optax.apply_updates(table, updates), state


def by_rows(table: jax.Array, state: RowSparseState, rows: jax.Array, gradient: jax.Array) -> Carry:
    """Read the rows and step; the gradient depends on what was read, as in training."""
    return OPT.update(table, state, gradient + 0 * OPT.read(table, state, rows), rows)


def by_bcoo(table: jax.Array, state: RowSparseState, rows: jax.Array, gradient: jax.Array) -> Carry:
    """The same with the gradient as a BCOO array."""
    gradient = gradient + 0 * OPT.read(table, state, rows)
    return OPT.update(table, state, sparse.BCOO((gradient, rows[:, None]), shape=table.shape))


def timer(
    step: Callable[..., Carry],
    init: Callable[..., optax.OptState],
    table: np.ndarray | jax.Array,
    batches: Sequence[tuple[jax.Array, ...]],
) -> Callable[[], float]:
    """Seconds per step of a compiled and warm step, over at least `LEAST_SECONDS`."""
    carry = (jnp.array(table), init(table))
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*carry, *batches[0]).compile()
    turn = itertools.cycle(batches)

    def run(steps: int) -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(steps):
            carry = compiled(*carry, *next(turn))
        jax.block_until_ready(carry)
        return (time.perf_counter() - start) / steps

    run(len(batches))
    steps = max(1, round(LEAST_SECONDS / min(run(1) for _ in range(3))))
    return lambda: run(steps)


def measure(share: float, shape: tuple[int, int], pairs: int) -> list[Row]:
    """One row for each way to step."""
    rng = np.random.default_rng(0)
    count = max(1, round(share * shape[0]))
    table = jnp.asarray(rng.standard_normal(shape, np.float32))
    gradient = jnp.asarray(rng.standard_normal((count, shape[1]), np.float32))
    whole = jnp.asarray(rng.standard_normal(shape, np.float32))
    picked = [np.sort(rng.permutation(shape[0])[:count]).astype(np.int32) for _ in range(BATCHES)]
    rows = [(jnp.asarray(rng.permutation(x)), gradient) for x in picked]
    masks = [(whole, jnp.zeros(shape[0], bool).at[x].set(True)) for x in picked]
    baseline = timer(dense, SGD.init, table, [(whole,)])
    steps: dict[str, Callable[[], Callable[[], float]]] = {
        "dense again": lambda: timer(dense, SGD.init, table, [(whole,)]),
        "rows": lambda: timer(by_rows, OPT.init, table, rows),
        "BCOO": lambda: timer(by_bcoo, OPT.init, table, rows),
        "dense gradient, mask": lambda: timer(
            lambda t, s, g, m: OPT.update(t, s, g, mask=m, size=min(count, 4096)), OPT.init, table, masks
        ),
    }
    found = []
    for name, make in steps.items():
        subject = make()
        seconds = np.array([[baseline(), subject()] for _ in range(pairs)])
        low, ratio, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
        found.append(
            {
                "share": share,
                "way": name,
                "dense_milliseconds": 1e3 * float(np.median(seconds[:, 0])),
                "milliseconds": 1e3 * float(np.median(seconds[:, 1])),
                "times_faster": float(ratio),
                "quartiles": [float(low), float(high)],
            }
        )
    return found


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    pairs: Annotated[int | None, whole_number(1, 10_000)] = None
    """timings of each row; None is 15, or 3 with --quick"""
    quick: bool = False
    """a small table, 3 pairs: to see that it runs"""


def main() -> None:
    """Time every share, print the table and write the file."""
    run = _run.Run("row_sparse", __doc__, Options)
    pairs = run.options.pairs or (3 if run.options.quick else 15)
    shape, shares = ((500, 16), (0.01, 1.0)) if run.options.quick else (SHAPE, SHARES)
    found = [row for share in tqdm(shares, leave=False) for row in measure(share, shape, pairs)]
    print(f"{'active rows':>11}  {'step':22}{'ms':>9}{'dense ms':>10}{'times faster (quartiles)':>28}")
    for row in found:
        low, high = row["quartiles"]
        faster = f"{row['times_faster']:.2f} ({low:.2f} to {high:.2f})"
        times = f"{row['milliseconds']:9.3f}{row['dense_milliseconds']:10.3f}"
        print(f"{row['share']:11.1%}  {row['way']:22}{times}{faster:>28}")
    run.write({"shape": shape, "pairs": pairs, "rows": found})


if __name__ == "__main__":
    main()
