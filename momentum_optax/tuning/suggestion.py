"""`suggest`: a learning rate and a decay, measured on a loss and a batch."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks, rules
from .curvature import _DOUBLINGS, _HALVINGS, Curvature, _lanczos, _Problem
from .quadratics import Tuning, smooth_nesterov

# Without a smallest curvature there is no theory to take a decay from; this one is the usual default.
_DEFAULT_DECAY = 0.9


def suggest(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batch: Any = None,
    *,
    iterations: int = 40,
    steps: int = 100,
    seed: int = 0,
) -> Tuning:
    r"""A learning rate and a decay to start from, for Nesterov's rule, with the reasons.

    The rate is 1/L, L the largest curvature. The decay is the one of `smooth_nesterov` where the smallest curvature can
    be known, and 0.9 where it cannot: in a network it is negative or zero, and no estimate of it says anything about
    training. Curvature at the start need not be that on the way, so both are measured again, half way and at the end of
    a trial of `steps` steps from `params` with what was found there; a second trial decides. Where curvature gives way
    to larger steps, as it does in networks, no measurement tells how far: the rate is then doubled for as long as
    another trial ends clearly lower. Where it grows so fast that the first trial fails, the rate is halved.

    It looks at one batch: gradient noise may want a smaller rate. It costs up to 3 times `iterations` Hessian-vector
    products and 6 times `steps` gradients.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays, where training starts.
      batch: Whatever `loss` takes, as large as can be.
      iterations: Hessian-vector products per estimate at most, at least 2.
      steps: Length of a trial, at least 2.
      seed: Of the estimates.

    Returns:
      A `Tuning`; its `rate` is None where the smallest curvature is not known.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, a leaf of `params` is not real floating
        point, or a value is traced.
      ValueError: If the loss does not curve upwards at `params`, no rate tried lowers it, or for the reasons of
        `estimate_curvature`.

    Reference:
      See `smooth_nesterov` and `estimate_curvature`.
    """
    _checks.integer("steps", steps, 2)
    problem = _Problem(loss, params, batch)
    here = _lanczos(problem, problem.start, iterations, seed)
    if not here.L > 0:
        raise ValueError(f"loss must curve upwards somewhere at params, got a largest curvature of {here.L}")
    start_loss = problem.loss(problem.start)
    first = _from_curvature(here.L + here.L_error, here, "at params")
    half, end, first_loss = _trial(problem, first, int(steps))
    for _ in range(_HALVINGS):
        if first_loss < start_loss:
            break
        first = dataclasses.replace(first, learning_rate=first.learning_rate / 2, rate=None)
        first = _because(first, f"halved, as {steps} steps at twice the rate did not lower the loss")
        half, end, first_loss = _trial(problem, first, int(steps))
    else:
        raise ValueError(f"{steps} steps must lower the loss, even at rate {first.learning_rate:.4g} they did not")
    way = [_lanczos(problem, point, iterations, seed) for point in (half, end)]
    best, loss_there = first, first_loss
    L = max(found.L + found.L_error for found in way)
    # Less is no difference: two runs that have converged differ in rounding.
    clear = 1e-3 * (start_loss - first_loss)
    if L > 0:
        second = _from_curvature(L, way[1], f"within {steps} steps of params")
        _, _, second_loss = _trial(problem, second, int(steps))
        # What serves where the run arrives is better from there on, so a draw is in its favour.
        if second_loss < first_loss + clear:
            best, loss_there = second, second_loss
        tried = [f"{other.learning_rate:.4g} with decay {other.decay:.4g}" for other in (first, second)]
        verdict = f"after {steps} steps from params the loss is {first_loss:.4g} at rate {tried[0]}, "
        best = _because(best, verdict + f"{second_loss:.4g} at {tried[1]}")
    for _ in range(_DOUBLINGS):
        doubled = dataclasses.replace(best, learning_rate=2 * best.learning_rate, rate=None)
        _, _, doubled_loss = _trial(problem, doubled, int(steps))
        if not doubled_loss < loss_there - clear:
            return _because(best, f"twice the rate is no better: {doubled_loss:.4g}")
        best, loss_there = _because(doubled, f"twice the rate is better: {doubled_loss:.4g}"), doubled_loss
    return best


def _because(tuning: Tuning, reason: str) -> Tuning:
    """The same with one reason more."""
    return dataclasses.replace(tuning, reasons=(*tuning.reasons, reason))


def _from_curvature(L: float, found: Curvature, where: str) -> Tuning:
    """Nesterov's rule for a largest curvature of L, and the smallest one found, if that is known."""
    measured = f"largest curvature {where} {L:.4g}, so the rate is its inverse"
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


def _trial(problem: "_Problem", tuning: Tuning, steps: int) -> tuple[jax.Array, jax.Array, float]:
    """The points half way and at the end of a run from the start, and the loss there; infinite if it diverged."""
    half, v = problem.descend(problem.start, jnp.zeros_like(problem.start), tuning, steps // 2)
    end, _ = problem.descend(half, v, tuning, steps - steps // 2)
    loss = problem.loss(end)
    return half, end, loss if math.isfinite(loss) else math.inf
