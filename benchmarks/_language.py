"""Short runs of the language model of `examples.lm`, many at once: for benchmarks that compare optimizers.

A seed stands for the initial weights and for the places in the text of every batch.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.lm import data
from examples.lm.model import Config, init, loss

Carry: TypeAlias = tuple[optax.Params, optax.OptState]
# The point to evaluate, from the optimizer's state and the stored parameters.
Reader: TypeAlias = Callable[[optax.OptState, optax.Params], optax.Params]
# An optimizer, and its point to evaluate, for the numbers that a run is given.
Maker: TypeAlias = Callable[..., tuple[optax.GradientTransformation, Reader]]
# The loss of a model that knows nothing, which counts for runs that diverged.
WORST = math.log(data.VOCABULARY)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The model and its runs.

    Attributes:
      width: Of the model.
      layers: Of the model.
      heads: Of its attention.
      length: Tokens that a window predicts.
      batch: Windows of a step.
      steps: Of a run.
      marks: Number of times that the held-out loss is measured in a run, at equal distances.
      held_out: Windows to measure it on.
      together: Runs in one compiled program.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    length: int = 32
    batch: int = 8
    steps: int = 600
    marks: int = 10
    held_out: int = 128
    together: int = 1

    @property
    def config(self) -> Config:
        """The model."""
        return Config(data.VOCABULARY, self.width, self.layers, self.heads, self.length)


def schedule(rate: jax.Array | float, steps: int, decays: bool = True) -> optax.Schedule:
    """A learning rate that rises over a tenth of the run, and then falls to zero as a cosine, or stays."""
    warm = max(1, steps // 10)
    if decays:
        shape = optax.warmup_cosine_decay_schedule(1 / warm, 1.0, warm, steps)
    else:
        shape = optax.warmup_constant_schedule(1 / warm, 1.0, warm)
    return lambda step: rate * shape(step)


class Problem(NamedTuple):
    """What the seed of a run decides; several seeds are stacked.

    Attributes:
      weights: Initial weights.
      batches: Tokens of every batch, uint8, shape (steps, batch, length + 1).
    """

    weights: optax.Params
    batches: np.ndarray


def problems(setting: Setting, seeds: Sequence[int]) -> Problem:
    """The runs of these seeds, stacked."""
    text, shape = data.splits().train, (setting.batch, setting.length, setting.steps)
    weights = jax.vmap(functools.partial(init, setting.config))(jnp.asarray(seeds))
    return Problem(weights, np.stack([data.batches(text, *shape, seed) for seed in seeds]))


def held_out(setting: Setting, text: np.ndarray) -> np.ndarray:
    """Windows of a text at equal distances, shape (held_out, length + 1)."""
    windows = data.windows(text, setting.length)
    if len(windows) < setting.held_out:
        raise ValueError(f"held_out must be at most {len(windows)}, the windows of the text, got {setting.held_out}")
    chosen = np.linspace(0, len(windows) - 1, setting.held_out).round().astype(int)
    return np.take(windows, chosen, 0)


def curve(make: Maker, marks: int, numbers: optax.Params, problem: Problem, windows: jax.Array) -> jax.Array:
    """One run: the held-out losses at its marks, shape (marks,)."""
    tx, read = make(numbers)

    def step(carry: Carry, tokens: jax.Array) -> tuple[Carry, None]:
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights, tokens), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    def stretch(carry: Carry, batches: jax.Array) -> tuple[Carry, jax.Array]:
        (weights, state), _ = jax.lax.scan(step, carry, batches)
        return (weights, state), loss(read(state, weights), windows)

    batches = jnp.asarray(problem.batches)
    stretches = batches.reshape(marks, -1, *batches.shape[1:])
    return jax.lax.scan(stretch, (problem.weights, tx.init(problem.weights)), stretches)[1]


class Trainer:
    """Runs of one optimizer, compiled once."""

    def __init__(self, make: Maker, setting: Setting):
        self.together = setting.together
        self._run = jax.jit(jax.vmap(functools.partial(curve, make, setting.marks), (0, 0, None)))

    def curves(self, numbers: optax.Params, problem: Problem, windows: np.ndarray) -> np.ndarray:
        """Held-out losses, float64 of shape (runs, marks).

        Args:
          numbers: What the optimizer is made from, arrays with an axis of runs in front.
          problem: With such an axis too.
          windows: Of the text to measure on, shape (n, length + 1).
        """
        count = len(jax.tree.leaves(numbers)[0])
        found = []
        for first in range(0, count, self.together):
            # The last program is filled up with a run that is there already.
            rows = np.minimum(np.arange(first, first + self.together), count - 1)
            some = jax.tree.map(operator.itemgetter(rows), (numbers, problem))
            found.append(jax.device_get(self._run(*some, windows)))
        losses = np.concatenate(found)[:count].astype(np.float64)
        return np.where(np.isfinite(losses), np.minimum(losses, WORST), WORST)
