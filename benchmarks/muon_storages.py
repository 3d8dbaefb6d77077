"""What is left of Muon's direction where the velocity is kept in few bits.

    python -m benchmarks.muon_storages

A matrix of 64 x 256 whose singular values fall from 1 to 1/1000 is the gradient of 60 steps, with white noise. The
velocity of `muon_mix(0.95)` is kept in each storage; the row holds the error of the momentum, relative to float32's,
and the cosine between the two orthogonalised momenta. Noise is given as its size over the mean size of the gradient's
elements: 0.01 is the low-noise case, where singular values below the rounding of a storage are turned, and then become
as large as all others. Prints a table and writes benchmarks/muon_storages.json.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_optax as mo

from . import _run

ROWS, COLUMNS, STEPS, SMALLEST = 64, 256, 60, 1e-3
NOISES = (1.0, 0.1, 0.01)
STORAGES = {
    "bfloat16": mo.storage.bfloat16(),
    "bfloat16, nearest": mo.storage.bfloat16("nearest"),
    "int8": mo.storage.int8(min_size=1),
    "int4": mo.storage.int4(min_size=1),
}
# Codes by their bits.
IDEAL = {"8 bits, ideally used": 8, "9 bits": 9, "10 bits": 10}


def gradients(noise: float) -> jax.Array:
    """One matrix for each step."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(ROWS, COLUMNS)), full_matrices=False)
    signal = u * np.geomspace(1, SMALLEST, ROWS) @ v
    white = rng.normal(size=(STEPS, ROWS, COLUMNS))
    return jnp.asarray(signal + noise * np.abs(signal).mean() * white, jnp.float32)


def momentum(storage: Any, steps: jax.Array) -> jax.Array:
    """What is orthogonalised at the last step."""
    tx = mo.scale_by_momentum(mo.muon_mix(0.95), storage=storage)

    def step(state: Any, g: jax.Array) -> Any:
        u, state = tx.update(g, state)
        return state, u

    last: jax.Array = jax.lax.scan(step, tx.init(steps[0]), steps)[1][-1]
    return last


def ideal_momentum(bits: int, steps: jax.Array) -> jax.Array:
    """The same with the velocity in that many bits, ideally used."""
    levels = 2 ** (bits - 1) - 1

    def step(velocity: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        g, key = now
        velocity = 0.95 * velocity + 0.05 * g
        unit = jnp.max(jnp.abs(velocity), axis=1, keepdims=True) / levels
        dither = jax.random.uniform(key, g.shape, minval=-0.5, maxval=0.5)
        return (jnp.round(velocity / unit + dither) - dither) * unit, 0.95 * velocity + 0.05 * g

    keys = jax.random.split(jax.random.key(0), len(steps))
    last: jax.Array = jax.lax.scan(step, jnp.zeros_like(steps[0]), (steps, keys))[1][-1]
    return last


def compared(kept_in: Any, noise: float) -> tuple[float, float]:
    """The relative error of the momentum in a storage, or in so many bits, and the cosine between directions."""
    run, steps = ideal_momentum if isinstance(kept_in, int) else momentum, gradients(noise)
    exact = jax.jit(momentum, static_argnums=0)("float32", steps)
    kept = jax.jit(run, static_argnums=0)(kept_in, steps)
    one, other = (np.float64(mo.orthogonalize().update(u, optax.EmptyState())[0]) for u in (exact, kept))
    error = np.linalg.norm(kept - exact) / np.linalg.norm(exact)
    return float(error), float(np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other))


def main() -> None:
    """Measure every row, print the table and write the file."""
    run = _run.Run("muon_storages", __doc__, _run.Options)
    rows = []
    for name, kept_in in (STORAGES | IDEAL).items():
        for noise in NOISES:
            error, cosine = compared(kept_in, noise)
            rows.append({"storage": name, "noise": noise, "error": round(error, 4), "cosine": round(cosine, 3)})
            print(f"{name:22} noise {noise:5.2f}: error {error:6.3f}, cosine {cosine:6.3f}")
    run.write({"rows": rows})


if __name__ == "__main__":
    main()
