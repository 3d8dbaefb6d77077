"""Seconds to trace and to compile a step of Muon, for one layer and for forty of the same shape.

    python -m benchmarks.muon_compile

The step is `update` and `apply_updates` on matrices of 512 x 2048, with parameters and state donated, for a CPU.
`optax.sgd` with momentum shows what a step costs that does something to every leaf and no more. Seconds are those of
all threads of the process, the least of three runs. Prints a table and writes benchmarks/muon_compile.json.
"""

import dataclasses
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import whole_number

from . import _run

SHAPE = (512, 2048)
LAYERS = (1, 40)
OPTIMIZERS = {
    "optax.sgd, momentum": optax.sgd(0.1, 0.9),
    "optax.contrib.muon": optax.contrib.muon(0.02),
    "mo.muon": mo.muon(0.02),
    "mo.normuon": mo.normuon(0.02),
}


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    repeats: Annotated[int, whole_number(1, 100)] = 3
    """runs of each row"""


def seconds(tx: optax.GradientTransformation, layers: int) -> tuple[float, float]:
    """To trace the step, and to compile it."""
    params = {str(i): jax.ShapeDtypeStruct(SHAPE, jnp.float32) for i in range(layers)}
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    jax.clear_caches()
    start = time.process_time()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    traced = time.process_time()
    lowered.compile()
    return traced - start, time.process_time() - traced


def main() -> None:
    """Compile every row, print the table and write the file."""
    run = _run.Run("muon_compile", __doc__, Options)
    jax.config.update("jax_enable_compilation_cache", False)
    seconds(optax.sgd(0.1), 1)  # what the first compilation of a process takes in addition
    rows = []
    for name, tx in tqdm(OPTIMIZERS.items(), leave=False):
        for layers in LAYERS:
            runs = [seconds(tx, layers) for _ in range(run.options.repeats)]
            trace, compile_ = (round(min(times), 3) for times in zip(*runs, strict=True))
            rows.append({"optimizer": name, "layers": layers, "trace": trace, "compile": compile_})
            print(f"{name:24} {layers:3} layers: trace {trace:6.3f}, compile {compile_:6.3f}")
    run.write({"shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()
