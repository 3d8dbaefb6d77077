"""`suggest`: a learning rate and a decay, measured on a loss and a batch."""

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from .. import _checks, rules
from .curvature import Curvature, curvature_at
from .objective import Loss, Objective
from .quadratics import Tuning, smooth_nesterov

if TYPE_CHECKING:
    from .._typing import PyTree

# Without a smallest curvature no decay follows from theory; this one is the usual default.
_DEFAULT_DECAY = 0.9
# How often a learning rate is halved and doubled at most.
_HALVINGS, _DOUBLINGS = 10, 4


def suggest(
    loss: Loss,
    params: "PyTree",
    batch: "PyTree" = None,
    *,
    iterations: int = 40,
    steps: int = 100,
    seed: int = 0,
) -> Tuning:
    r"""A learning rate and a decay to start from, for Nesterov's rule, with the reasons.

    The learning rate is 1/L, with L the largest curvature. The decay is that of `smooth_nesterov` where the smallest
    curvature can be determined, else 0.9: in a network it is negative or zero and says nothing about training.
    Curvature changes along the run, so that both are measured again half way and at the end of a trial of `steps` steps
    from `params` with the first settings; a second trial decides. Where curvature decreases under larger steps, as it
    does in networks, no measurement predicts how far: the learning rate is doubled as long as another trial ends
    clearly lower. Where curvature grows so fast that the first trial fails, it is halved.

    One batch is used: gradient noise may require a smaller learning rate. The cost is up to 3 times `iterations`
    Hessian-vector products and 6 times `steps` gradients, and as many as 10 times `steps` more where the first trial
    fails.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays, where training starts.
      batch: The second argument of `loss`, as large a batch as possible.
      iterations: Maximal number of Hessian-vector products per estimate, at least 2.
      steps: Length of a trial, at least 2.
      seed: Seed of the estimates.

    Returns:
      A `Tuning`; its `contraction` is None where the smallest curvature is not known.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, a leaf of `params` is not real floating
        point, or a value is traced.
      ValueError: If the loss does not curve upwards at `params`, no learning rate tried lowers it, or as in
        `estimate_curvature`.

    Reference:
      See `smooth_nesterov` and `estimate_curvature`.
    """
    _checks.integer("steps", steps, 2)
    steps = int(steps)
    objective = Objective(loss, params, batch)
    here = curvature_at(objective, objective.start, iterations, seed)
    if not here.L > 0:
        raise ValueError(f"loss must curve upwards somewhere at params, got a largest curvature of {here.L}")
    start_loss = objective.loss(objective.start)
    first = _halve_until_lower(objective, _from_curvature(here.L + here.L_error, here, "at params"), steps, start_loss)
    way = [curvature_at(objective, point, iterations, seed) for point in (first.half, first.end)]
    # A smaller gain is not significant: two runs that have converged differ in rounding.
    gain = 1e-3 * (start_loss - first.loss)
    best = first
    L = max(found.L + found.L_error for found in way)
    if L > 0:
        settings = _from_curvature(L, way[1], f"within {steps} steps of params")
        best = _better(first, _run(objective, settings, steps), gain)
    return _double_while_lower(objective, best, gain)


class _Trial(NamedTuple):
    """A run with suggested settings: its points half way and at the end, and its last loss, infinite if it diverged."""

    tuning: Tuning
    steps: int
    half: jax.Array
    end: jax.Array
    loss: float

    def because(self, reason: str) -> "_Trial":
        """The same trial with one more reason."""
        reasons = (*self.tuning.reasons, reason)
        return self._replace(tuning=dataclasses.replace(self.tuning, reasons=reasons))


def _run(objective: Objective, tuning: Tuning, steps: int) -> _Trial:
    half, v = objective.descend(objective.start, jnp.zeros_like(objective.start), tuning, steps // 2)
    end, _ = objective.descend(half, v, tuning, steps - steps // 2)
    loss = objective.loss(end)
    return _Trial(tuning, steps, half, end, loss if math.isfinite(loss) else math.inf)


def _halve_until_lower(objective: Objective, tuning: Tuning, steps: int, start_loss: float) -> _Trial:
    """A trial that ends below the loss of the start, at the largest of the learning rates tried."""
    trial = _run(objective, tuning, steps)
    for _ in range(_HALVINGS):
        if trial.loss < start_loss:
            break
        half = _with_learning_rate(trial.tuning, trial.tuning.learning_rate / 2)
        reason = f"halved, as {steps} steps at twice the learning rate did not lower the loss"
        trial = _run(objective, half, steps).because(reason)
    if trial.loss < start_loss:
        return trial
    tried = trial.tuning.learning_rate
    raise ValueError(f"{steps} steps must lower the loss, even at learning rate {tried:.4g} they did not")


def _better(first: _Trial, second: _Trial, gain: float) -> _Trial:
    """The trial to go on from; a draw goes to the second, whose curvature is that of the end of the run."""
    best = second if second.loss < first.loss + gain else first
    tried = [f"{trial.tuning.learning_rate:.4g} with decay {trial.tuning.decay:.4g}" for trial in (first, second)]
    return best.because(
        f"after {first.steps} steps from params the loss is {first.loss:.4g} at learning rate {tried[0]}, "
        f"{second.loss:.4g} at {tried[1]}"
    )


def _double_while_lower(objective: Objective, best: _Trial, gain: float) -> Tuning:
    """The settings at the largest of the doubled learning rates that clearly lower the loss."""
    for _ in range(_DOUBLINGS):
        tuning = _with_learning_rate(best.tuning, 2 * best.tuning.learning_rate)
        doubled = _run(objective, tuning, best.steps)
        if not doubled.loss < best.loss - gain:
            return best.because(f"twice the learning rate is no better: {doubled.loss:.4g}").tuning
        best = doubled.because(f"twice the learning rate is better: {doubled.loss:.4g}")
    return best.tuning


def _with_learning_rate(tuning: Tuning, learning_rate: float) -> Tuning:
    """The same rule at another learning rate, for which no contraction is predicted."""
    return dataclasses.replace(tuning, learning_rate=learning_rate, contraction=None)


def _from_curvature(L: float, found: Curvature, where: str) -> Tuning:
    """Nesterov's rule for a largest curvature of L, and the smallest one found, if that is known."""
    measured = f"largest curvature {where} {L:.4g}, so the learning rate is its inverse"
    if found.mu is None:
        why = "negative" if found.lowest < 0 else "not settled, or too small for rounding"
        reasons = (
            measured,
            f"smallest curvature {where} {found.lowest:.4g}: {why}, so no decay follows from it",
            f"decay {_DEFAULT_DECAY}, the usual default: a memory of ten gradients",
        )
        return Tuning(rules.nesterov(_DEFAULT_DECAY), 1 / L, _DEFAULT_DECAY, None, reasons)
    tuned = smooth_nesterov(L, min(found.mu, L))
    seen = "the whole spectrum was seen" if found.exact else "settled, but a smaller one may be hidden"
    reasons = (
        measured,
        f"smallest curvature {where} {found.mu:.4g} ({seen}), so the condition number is {L / found.mu:.4g}",
        f"decay {tuned.decay:.4g} = (sqrt(kappa) - 1)/(sqrt(kappa) + 1), for smooth strongly convex losses",
    )
    return dataclasses.replace(tuned, reasons=reasons)
