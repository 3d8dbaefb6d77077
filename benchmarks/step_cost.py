"""The cost of a compiled momentum step, rule by rule, against that of `optax.trace`.

    python -m benchmarks.step_cost

Counts the flops and bytes of `scale_by_momentum -> scale_by_learning_rate -> apply_updates` on one float32 leaf with
donated buffers, as XLA reports them for the machine's default backend. They are exact and do not depend on its load.
Prints a table and writes benchmarks/step_cost.json.
"""

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import momentum_optax as mo

from . import _run

SHAPE = (2048, 2048)
RULES = {
    "heavy_ball(0.9)": mo.heavy_ball(0.9),
    "ema(0.9)": mo.ema(0.9),
    "nesterov(0.9)": mo.nesterov(0.9),
    "nesterov(fista())": mo.nesterov(mo.schedules.fista()),
    "quasi_hyperbolic(0.999, 0.7)": mo.quasi_hyperbolic(0.999, 0.7),
    "aggregated((0, 0.9, 0.99))": mo.aggregated(),
    "complex_heavy_ball(0.9, 0.3)": mo.complex_heavy_ball(0.9, 0.3),
    "adan_mix()": mo.adan_mix(),
}


def transformations() -> dict[str, optax.GradientTransformation]:
    """The transformations that are counted: Optax's momentum, then the rules of this package."""
    rows = {"optax.trace(0.9)": optax.trace(0.9), "optax.trace(0.9, nesterov=True)": optax.trace(0.9, nesterov=True)}
    rows |= {f"mo.{name}": mo.scale_by_momentum(rule) for name, rule in RULES.items()}
    rows["mo.heavy_ball(0.9), bfloat16"] = mo.scale_by_momentum(mo.heavy_ball(0.9), storage="bfloat16")
    rows["mo.ema(0.9), debiased"] = mo.scale_by_momentum(mo.ema(0.9), debias=True)
    return rows


def count(momentum: optax.GradientTransformation) -> dict[str, float]:
    """Flops, bytes moved, temporaries and state of one step, per parameter."""
    tx = optax.chain(momentum, optax.scale_by_learning_rate(0.1))

    def step(
        params: optax.Params, state: optax.OptState, gradients: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    if cost is None or memory is None:
        raise RuntimeError("this backend of JAX does not report what a program costs")
    size = SHAPE[0] * SHAPE[1]
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return {
        "flops": cost["flops"] / size,
        "bytes": cost["bytes accessed"] / size,
        "temporaries": memory.temp_size_in_bytes / size,
        "state": state_bytes / size,
    }


def main() -> None:
    """Count every row, print the table and write the file."""
    run = _run.Run("step_cost", __doc__, _run.Options)
    rows = {name: count(tx) for name, tx in tqdm(transformations().items(), desc="compiling", leave=False)}
    print(f"{'per parameter':34}{'flops':>8}{'bytes':>8}{'temp':>8}{'state':>8}")
    for name, row in rows.items():
        print(f"{name:34}" + "".join(f"{value:8.2f}" for value in row.values()))
    run.write({"shape": SHAPE, "rows": rows})


if __name__ == "__main__":
    main()
