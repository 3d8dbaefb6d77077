"""Whether two recipes take the same steps: their filters compared, at constants and under schedules."""

from typing import cast

import numpy as np

from .._typing import Schedule
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero
from .dialect import DIALECTS, Hyperparameter
from .recipe import Recipe, changed, constant_form, value

# Over how many steps two scheduled optimizers are compared.
_STEPS = 24


def agree(a: Recipe, b: Recipe, *, first: bool, born: int = 0) -> bool:
    """Whether two recipes have the same steps, for gradients from the first one on or from the second.

    Where a sign or an orthogonalisation follows, the size of a step does not count.

    Args:
      a: A recipe.
      b: Another one.
      first: Whether the first gradient is among the gradients compared.
      born: The step at which the parameter receives its first gradient.
    """
    impulses = np.eye(_STEPS)[:, born if first else born + 1 :]
    x, y = (_response(recipe.filter(), impulses, born) for recipe in (a, b))
    d = a.description()
    if d.sign or d.learning_rate is None:
        x, y = (z / np.maximum(np.abs(z).max(1, keepdims=True), 1e-300) for z in (x, y))
    return bool(np.all(np.abs(x - y) <= 1e-9 * max(np.abs(x).max(), np.abs(y).max())))


def agree_under_rates(source: Recipe, target: Recipe) -> bool:
    """Whether the steps stay the same when both learning rates change by the same factor."""

    def scheduled(recipe: Recipe) -> Recipe:
        name = DIALECTS[recipe.dialect].learning_rate
        if name is None:
            return recipe
        return changed(recipe, **{name: times(recipe.description().learning_rate, varying())})

    return agree(scheduled(source), scheduled(target), first=False)


def agree_under_decays(source: Recipe, target: str) -> bool | None:
    """Whether the steps stay the same when the momentum goes back and forth between two values.

    None if it cannot: one of the two dialects keeps it constant, or it is 0.
    """
    name = DIALECTS[source.dialect].momentum
    if name is None or DIALECTS[target].momentum is None:
        return None
    now = value(source, name)
    if is_zero(now):
        return None
    then: Hyperparameter
    if isinstance(now, tuple | list):
        then = tuple(0.9 * cast("float", decay) for decay in now)
    else:
        then = 0.9 * cast("float", now)
    pair = [changed(source, **{name: decay}) for decay in (now, then)]
    try:
        others = [Recipe(target, **DIALECTS[target].arguments(constant_form(recipe))) for recipe in pair]
        a, b = (_alternating(*recipes) for recipes in (pair, others))
    except ValueError:
        return False
    except TypeError:
        return None
    return agree(a, b, first=False)


def times(factor: Hyperparameter, schedule: Schedule) -> Schedule:
    """The schedule times a number; the schedule itself if that is 1."""
    number = cast("float", factor)
    return schedule if number == 1 else lambda step: number * schedule(step)


def varying() -> Schedule:
    """A schedule of which no two consecutive values are equal."""
    return lambda step: 1.0 + step % 3


def _alternating(even: Recipe, odd: Recipe) -> Recipe:
    """The dialect with each hyperparameter as in one recipe at even steps, as in the other at odd ones."""
    other = odd.hyperparameters
    return Recipe(even.dialect, **{k: _in_turn(v, other.get(k, v)) for k, v in even.hyperparameters.items()})


def _in_turn(x: Hyperparameter, y: Hyperparameter) -> Hyperparameter:
    """The first at even steps, the second at odd ones; entry by entry where there are several."""
    if isinstance(x, tuple | list) and isinstance(y, tuple | list):
        return tuple(cast("Scalar", _in_turn(a, b)) for a, b in zip(x, y, strict=True))
    if x == y:
        return x
    even, odd = cast("float", x), cast("float", y)
    return lambda step: even + (odd - even) * (step % 2)


def _response(rule: Filter, signal: np.ndarray, born: int) -> np.ndarray:
    """The updates for gradients of which there are none before step `born`."""
    v = np.zeros((rule.order, signal.shape[1]))
    out = np.zeros(signal.shape)
    for t in range(born, len(signal)):
        A, B, C, D = rule.at(t, t - born).matrices()
        out[t] = C @ v + D * signal[t]
        v = A @ v + np.multiply.outer(B, signal[t])
    return out
