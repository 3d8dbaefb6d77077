"""Accumulation inside the velocity against `optax.MultiSteps`: bytes saved, and the error of rounding k times.

    python -m benchmarks.accumulation

Compiles one micro-step of heavy ball -> learning rate -> apply_updates on a float32 leaf of 8192 x 4096, parameters and
state donated, of `accumulated` and of MultiSteps around the same chain. Per parameter: bytes of the state; bytes held
at the peak (parameters, state, gradient and temporaries), by the compiler for the machine's default backend; and bytes
moved by the program for TPU v5e, where its compiler is installed. All are exact and do not depend on load.

The error of a narrow storage: that of the stored velocity after a cycle against one in float32 fed the same k
micro-gradients, each of independent standard normal numbers, in norm; the median of 50 cycles. Prints two tables and
writes benchmarks/accumulation.json.
"""

# First: compilers read the settings in it when JAX is loaded.
from . import _moved_bytes  # isort: skip

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo

from . import _run

SHAPE = _moved_bytes.LARGE
STORAGES = ("float32", "bfloat16", "int8")
MICRO_BATCHES, DECAYS = (1, 2, 5), (0.9, 0.99)
REST = optax.scale_by_learning_rate(0.1)


def optimizers(storage: str) -> dict[str, optax.GradientTransformation]:
    """Ours and Optax's, the same result."""
    rule = mo.heavy_ball(0.9)
    chain = optax.chain(mo.scale_by_momentum(rule, storage=storage), REST)
    return {
        "accumulated": mo.accumulated(rule, 4, REST, storage=storage),
        "MultiSteps": optax.MultiSteps(chain, 4).gradient_transformation(),
    }


def sizes(tx: optax.GradientTransformation, tpu: jax.Device | None) -> dict[str, float | None]:
    """Bytes per parameter: of the state, held at the peak, and moved on TPU."""
    n = math.prod(SHAPE)
    program = _moved_bytes.compiled(tx, SHAPE, jax.devices()[0])
    memory: Any = program.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    state = jax.eval_shape(tx.init, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    return {
        "state": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / n,
        "peak": (held + memory.temp_size_in_bytes) / n,
        "moved_tpu": tpu and _moved_bytes.count(_moved_bytes.compiled(tx, SHAPE, tpu), n).bytes,
    }


def error(storage: str, decay: float, k: int, cycles: int = 50) -> float:
    """Relative error of the stored velocity at the ends of cycles."""
    kept, exact = (mo.accumulated(mo.heavy_ball(decay), k, storage=name) for name in (storage, "float32"))
    like = jnp.zeros((64, 1024))

    def cycle(
        states: tuple[optax.OptState, optax.OptState], key: jax.Array
    ) -> tuple[tuple[optax.OptState, optax.OptState], jax.Array]:
        for g in jax.random.normal(key, (k, *like.shape)):
            states = kept.update(g, states[0])[1], exact.update(g, states[1])[1]
        (v,), (w,) = (mo.velocity(state) for state in states)
        return states, jnp.linalg.norm(v - w) / jnp.linalg.norm(w)

    keys = jax.random.split(jax.random.key(0), 2 * cycles)
    _, errors = jax.jit(lambda s: jax.lax.scan(cycle, s, keys))((kept.init(like), exact.init(like)))
    return float(np.median(errors[cycles:]))


def main() -> None:
    """Count and measure, print the tables and write the file."""
    run = _run.Run("accumulation", __doc__, _run.Options)
    tpu = _moved_bytes.target("tpu") if importlib.util.find_spec("libtpu") else None
    rows = []
    for storage in tqdm(STORAGES, desc="compiling", leave=False):
        rows += [{"storage": storage, "optimizer": n} | sizes(tx, tpu) for n, tx in optimizers(storage).items()]
    errors = [
        {"storage": storage, "decay": decay, "micro_batches": k, "error": error(storage, decay, k)}
        for storage in tqdm(STORAGES[1:], desc="rounding", leave=False)
        for decay in DECAYS
        for k in MICRO_BATCHES
    ]
    print(f"{'bytes per parameter':28}{'state':>8}{'peak':>8}{'moved, TPU v5e':>16}")
    for row in rows:
        moved = "" if row["moved_tpu"] is None else f"{row['moved_tpu']:16.2f}"
        print(f"{row['optimizer'] + ', ' + row['storage']:28}{row['state']:8.2f}{row['peak']:8.2f}{moved}")
    print(f"\n{'error of the velocity':28}" + "".join(f"{f'k = {k}':>8}" for k in MICRO_BATCHES))
    for storage in STORAGES[1:]:
        for decay in DECAYS:
            found = [row["error"] for row in errors if (row["storage"], row["decay"]) == (storage, decay)]
            print(f"{f'{storage}, decay {decay}':28}" + "".join(f"{x:8.4f}" for x in found))
    run.write({"rows": rows, "errors": errors})


if __name__ == "__main__":
    main()
