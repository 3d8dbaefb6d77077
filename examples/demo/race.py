"""The race: every rule at every learning rate from every seed, on the autoencoder of `autoencoder`."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_optax as mo

from . import autoencoder
from .data import flat_digits
from .rules import RULES

Carry: TypeAlias = tuple[autoencoder.Weights, optax.OptState]

# Learning rate times gain at zero frequency. Rules of one effective rate go equally far along a gradient that stays, so
# a grid of it is as fair to one rule as to another.
EFFECTIVE_RATES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
# The squared error where each of the 64 pixels is off by one.
WORST = 64


class RaceResult(NamedTuple):
    """Errors of one rule: squared error per image, mean over held-out images; `WORST` for a run that diverged.

    Attributes:
      rule: Its name.
      rates: Learning rates tried, shape (R,).
      gain: The rule's gain at zero frequency; an effective rate is a rate times this.
      validation: Errors after the last epoch, by which the rate is chosen, shape (R, S) for S seeds.
      test: Errors on images that neither training nor choice has seen, after each of E epochs, shape (R, S, E).
    """

    rule: str
    rates: np.ndarray
    gain: float
    validation: np.ndarray
    test: np.ndarray

    @property
    def choice(self) -> int:
        """Index of the rate of the least mean validation error; a mean, so that one failed seed counts."""
        return int(np.argmin(self.validation.mean(axis=1)))

    @property
    def curves(self) -> np.ndarray:
        """Test errors at the chosen rate, shape (S, E)."""
        return np.asarray(self.test[self.choice])


def race(
    *, seeds: int = 5, epochs: int = 120, seed: int = 0, effective_rates: Sequence[float] = EFFECTIVE_RATES
) -> list[RaceResult]:
    """Train a deep autoencoder of the 8x8 digits with every rule, at every rate, from every seed.

    Each rule tries as many learning rates, `effective_rates` divided by its gain. All rates and seeds of a rule train
    at once in one compiled program. A seed stands for the initial weights, the split and the order.
    """
    from tqdm import tqdm  # noqa: PLC0415

    images, _ = flat_digits()
    problems = autoencoder.stacked([autoencoder.problem(images, epochs, (seed, s)) for s in range(seeds)])
    results = []
    for name, rule in tqdm(RULES.items(), desc="race", unit="rule", leave=False):
        rates = np.asarray([rate / rule.dc_gain() for rate in effective_rates], np.float32)
        run = jax.jit(jax.vmap(jax.vmap(partial(_train, rule), (None, 0)), (0, None)))
        errors = jax.device_get(run(rates, problems))
        validation, test = (np.nan_to_num(x, nan=WORST) for x in errors)
        results.append(RaceResult(name, rates, rule.dc_gain(), validation, test))
    return results


def _train(rule: mo.Filter, rate: jax.Array, problem: autoencoder.Problem) -> tuple[jax.Array, jax.Array]:
    """Validation error at the end and test error after each epoch, for one rate and one seed."""
    tx = optax.chain(mo.scale_by_momentum(rule), optax.scale_by_learning_rate(rate))

    def step(carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
        weights, state = carry
        gradients = jax.grad(autoencoder.cross_entropy)(weights, problem.train[rows])
        updates, state = tx.update(gradients, state)
        return (optax.apply_updates(weights, updates), state), None

    def epoch(carry: Carry, batches: jax.Array) -> tuple[Carry, jax.Array]:
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, autoencoder.squared_error(carry[0], problem.test)

    (weights, _), errors = jax.lax.scan(epoch, (problem.weights, tx.init(problem.weights)), jnp.asarray(problem.order))
    return autoencoder.squared_error(weights, problem.validation), errors


def table(results: Sequence[RaceResult]) -> str:
    """The race in words: chosen rates, test errors, and what their ranges do and do not show."""
    lines = [f"  {'rule':16} {'rate':>8} {'effective':>9}   test error: median (range)"]
    for result in results:
        rate, final = float(result.rates[result.choice]), result.curves[:, -1]
        edge = " *" if result.choice in (0, len(result.rates) - 1) else ""
        errors = f"{np.median(final):.3f} ({final.min():.3f} to {final.max():.3f})"
        lines.append(f"  {result.rule:16} {rate:8.4g} {rate * result.gain:9.4g}   {errors}{edge}")
    if any(line.endswith("*") for line in lines):
        lines.append("  * the first or last rate of its grid: a wider grid might serve this rule better.")
    best = min(results, key=lambda result: float(np.median(result.curves[:, -1])))
    apart = [result.rule for result in results if best.curves[:, -1].max() < result.curves[:, -1].min()]
    mixed = [result.rule for result in results if result.rule not in (best.rule, *apart)]
    lines.append(f"  Least median: {best.rule}.")
    if apart:
        lines.append(f"  All of its seeds end below all seeds of: {', '.join(apart)}.")
    if mixed:
        lines.append(f"  Its range overlaps that of: {', '.join(mixed)}; these runs do not separate them.")
    return "\n".join(lines)
