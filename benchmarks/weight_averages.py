"""The error of averages of weights in few bytes.

    python -m benchmarks.weight_averages

64 x 512 weights descend a quadratic of curvature 0.1 whose gradients have noise of variance 1, at a rate that falls
from 0.1 to 0 as a cosine. Beside them runs the average in float32, written at every step, and `average_params` in each
storage, written at every step or every hundredth; for comparison the average rounded to nearest bfloat16, as one
writes it by hand. The errors are norms of differences from the former: over the norm of the average, and over that of
its distance from the weights. Weights in bfloat16 are rounded stochastically. Prints a table and writes
benchmarks/weight_averages.json.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tqdm import tqdm

import momentum_optax as mo

from . import _run

SHAPE, CURVATURE, RATE = (64, 512), 0.1, 0.1
# Decay, number of steps between writes, number of steps, and the dtype of the weights.
CASES = [(0.999, 1, 4000, "float32"), (0.999, 1, 4000, "bfloat16")]
CASES += [(0.9999, every, 20_000, "float32") for every in (1, 100)]
STORAGES = ("float32", "bfloat16", "int8")
BY_HAND = "nearest bfloat16, by hand"


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def measure(decay: float, every: int, steps: int, dtype: str) -> dict[str, Any]:
    """For each way of keeping it the average's error over its norm, and over its distance from the weights."""
    keys = jax.random.split(jax.random.key(0), 3)
    target, start = (jax.random.normal(key, SHAPE) for key in keys[:2])
    txs = {storage: mo.average_params(decay, every=every, storage=storage) for storage in STORAGES}

    def step(carry: Any, t: jax.Array) -> Any:
        weights, states, exact, by_hand = carry
        rate = 0.5 * RATE * (1 + jnp.cos(jnp.pi * t / steps))
        noise = jax.random.normal(jax.random.fold_in(keys[2], t), SHAPE)
        u = -rate * (CURVATURE * (weights.astype(jnp.float32) - target) + noise)
        states = {name: tx.update(u, states[name], weights)[1] for name, tx in txs.items()}
        weights = mo.apply_updates(weights, u, rounding="stochastic", step=t)
        exact = optax.incremental_update(weights.astype(jnp.float32), exact, 1 - decay)
        mixed = optax.incremental_update(weights.astype(jnp.float32), by_hand.astype(jnp.float32), 1 - decay**every)
        by_hand = jnp.where((t + 1) % every == 0, mixed.astype(jnp.bfloat16), by_hand)
        return (weights, states, exact, by_hand), None

    weights = start.astype(dtype)
    wide = weights.astype(jnp.float32)
    first = weights, {name: tx.init(weights) for name, tx in txs.items()}, wide, wide.astype(jnp.bfloat16)
    (weights, states, exact, by_hand), _ = jax.lax.scan(step, first, jnp.arange(steps))
    wide = weights.astype(jnp.float32)
    found = {name: mo.averaged_params(state, wide) for name, state in states.items()} | {BY_HAND: by_hand}
    norm = jnp.linalg.norm
    return {name: (norm(x - exact) / norm(exact), norm(x - exact) / norm(wide - exact)) for name, x in found.items()}


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    quick: bool = False
    """a hundredth of the steps: to see that it runs"""


def main() -> None:
    """Measure every case, print the table and write the file."""
    run = _run.Run("weight_averages", __doc__, Options)
    found = []
    print(
        f"{'decay':>7}{'every':>6}{'steps':>7}  {'weights':10}{'average':27}{'of its norm':>12}{'of its distance':>17}"
    )
    for decay, every, steps, dtype in tqdm(CASES, leave=False):
        steps = max(steps // 100, 100) if run.options.quick else steps  # noqa: PLW2901  fewer of them
        for name, errors in measure(decay, every, steps, dtype).items():
            error, relative = map(float, errors)
            found.append(
                {
                    **{"decay": decay, "every": every, "steps": steps, "weights": dtype, "average": name},
                    **{"error": error, "error_over_distance": relative},
                }
            )
            print(f"{decay:7}{every:6}{steps:7}  {dtype:10}{name:27}{error:12.3%}{relative:17.1%}")
    run.write({"shape": SHAPE, "rows": found})


if __name__ == "__main__":
    main()
