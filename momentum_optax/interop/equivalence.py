"""Hyperparameters from one dialect to another: the same steps in other numbers, or the reason why there are none."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import is_zero
from ..schedules import momentum_correction
from ..storage import Storage
from .dialect import DIALECTS, Dialect
from .targets import TARGETS, Numbers

# Over how many steps two scheduled optimizers are compared.
_STEPS = 24
# What a dialect calls its learning rate, if not "lr"; and the decay that it lets change, if any and not "momentum".
_RATES = {"keras_sgd": "learning_rate", "tf1_momentum": "learning_rate", "caffe_sgd": "base_lr"}
_DECAYS = {
    "heavyball_sgd": "beta",
    "lion": "betas",
    **dict.fromkeys(("keras_sgd", "caffe_sgd", "aggmo", "accsgd", "mass")),
}


class Recipe:
    """A dialect with its hyperparameters: `Recipe("torch_sgd", lr=0.1, momentum=0.9)`.

    Attributes:
      dialect: The name of a function of `interop`.
      hyperparameters: Its arguments, without `storage`.
    """

    def __init__(self, dialect: str, /, **hyperparameters: Any) -> None:
        _checks.choice("dialect", dialect, tuple(DIALECTS))
        if "storage" in hyperparameters:
            raise TypeError("storage is no hyperparameter: give it to transformation")
        self.dialect = dialect
        self.hyperparameters = hyperparameters
        self.description()

    def __repr__(self) -> str:
        return f"Recipe({', '.join([repr(self.dialect), *(f'{k}={v!r}' for k, v in self.hyperparameters.items())])})"

    def transformation(self, *, storage: str | Storage = "float32") -> optax.GradientTransformationExtraArgs:
        """The optimizer, as the dialect's own function gives it."""
        return DIALECTS[self.dialect](**self.hyperparameters, storage=storage).transformation()

    def filter(self) -> Filter:
        """From the gradients, weight decay and sign of ascent in them, to the steps; learning rate included.

        Without what is no linear filter: a sign that is taken, and decoupled weight decay.
        """
        return self.description().displacement()

    def description(self) -> Dialect:
        """The parts of the optimizer."""
        return DIALECTS[self.dialect](**self.hyperparameters)


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """What `equivalent_hyperparameters` found.

    Attributes:
      recipe: The target with its hyperparameters.
      first_step: Whether the steps are the same from the first gradient of a parameter on, whenever that comes; if not,
        they are the same past it, apart from what it left behind.
      scheduled_learning_rate: Whether they stay the same when both learning rates follow one schedule, up to the
        constant factor between them.
      scheduled_momentum: Whether they stay the same when the momentum changes, and with it what the target makes of it.
        None where one of the two keeps it constant.
      notes: What differs, in words, and the correction where there is one.
    """

    recipe: Recipe
    first_step: bool
    scheduled_learning_rate: bool
    scheduled_momentum: bool | None
    notes: tuple[str, ...]


def equivalent_hyperparameters(source: Recipe, target: str) -> Equivalence:
    r"""The hyperparameters with which another dialect takes the same steps.

        >>> equivalent_hyperparameters(Recipe("torch_sgd", lr=0.1, momentum=0.9), "qhoptim_qhm").recipe
        Recipe('qhoptim_qhm', lr=1.0, momentum=0.9, nu=1.0)

    Every dialect of one velocity, at constant hyperparameters, is $\eta\,s$ times a quasi-hyperbolic rule (see
    `Filter.normal_form`); two agree if and only if those three numbers, the weight decays and the signs do. What holds
    beyond constants is found by comparing the two filters, not assumed.

    A learning rate that is a schedule comes out as one. Where the source has it inside its velocity and the target
    outside, or the reverse, the momentum that corrects for it comes with it (`schedules.momentum_correction`), if the
    target can express it.

    Args:
      source: A dialect with its hyperparameters; numbers, but for the learning rate.
      target: The name of another dialect.

    Returns:
      An `Equivalence`. Hyperparameters of the target that stay at their defaults are left out.

    Raises:
      ValueError: If no hyperparameters of the target give the same steps, with the reason.
      TypeError: If `source` is no `Recipe`, or has another schedule than its learning rate's.

    Reference:
      Ma and Yarats, ICLR 2019, arXiv:1810.06801, section 4. Goyal et al., 2017, arXiv:1706.02677, section 3, for the
      correction.
    """
    if not isinstance(source, Recipe):
        raise TypeError(
            f"source must be a Recipe such as Recipe('torch_sgd', lr=0.1, momentum=0.9), got {_checks.shown(source)}"
        )
    _checks.choice("target", target, tuple(DIALECTS))
    rate = _rate_name(source.dialect)
    schedule = source.hyperparameters.get(rate)
    if schedule is None or not _checks.is_schedule(schedule):
        return _constant(source, target)
    # A probe in place of the schedule: every dialect is linear in its rate.
    return _scheduled(source, _constant(_with(source, **{rate: 1.0}), target), schedule)


def _constant(source: Recipe, target: str) -> Equivalence:
    if source.dialect == target:
        decays = True if _decay_name(target) else None
        return Equivalence(source, True, True, decays, ())
    numbers = _numbers(source)
    recipe = Recipe(target, **_tidy(target, TARGETS[target](numbers)))
    first, late = (_agree(source, recipe, first=True, born=born) for born in (0, 3))
    rate = _agree_under_rates(source, recipe)
    decay = _agree_under_decays(source, target)
    notes = []
    if not first:
        notes.append(
            f"{source.dialect} takes the first gradient of a parameter {numbers.first:.6g} times as much as {target}: "
            "multiply it by that there, weight decay included"
        )
    elif not late:
        notes.append(
            f"{source.dialect} and {target} differ in how much the first gradient of a parameter counts, where that "
            "comes after the first step of the run: one of them dampens it"
        )
    if not rate:
        notes.append(_rate_note(source, recipe))
    if decay is False:
        notes.append(f"when the momentum changes, {source.dialect} and {target} weigh past gradients differently")
    return Equivalence(recipe, first and late, rate, decay, tuple(notes))


def _scheduled(source: Recipe, probe: Equivalence, schedule: Callable[[Any], Any]) -> Equivalence:
    """The equivalence for a scheduled learning rate, from that for the rate 1."""
    if probe.scheduled_learning_rate:
        return dataclasses.replace(probe, recipe=_at_rate(probe.recipe, schedule))
    corrected = _corrected(source, probe.recipe, schedule)
    if corrected is None:
        raise ValueError(f"{probe.recipe.dialect} has no such steps: {_rate_note(source, probe.recipe)}")
    notes = tuple(note for note in probe.notes if note != _rate_note(source, probe.recipe))
    return dataclasses.replace(probe, recipe=corrected, scheduled_learning_rate=True, notes=notes)


def _at_rate(recipe: Recipe, schedule: Callable[[Any], Any]) -> Recipe:
    """A recipe for the rate 1, at that of a schedule."""
    name = _rate_name(recipe.dialect)
    factor = recipe.hyperparameters.get(name, _default(recipe.dialect, name))
    return _with(recipe, **{name: schedule if factor == 1 else lambda step: factor * schedule(step)})


def _corrected(source: Recipe, recipe: Recipe, schedule: Callable[[Any], Any]) -> Recipe | None:
    """The recipe with the momentum that makes up for a rate outside the velocity, if that makes the steps the same."""
    name = _decay_name(recipe.dialect)
    decay = recipe.hyperparameters.get(name, _default(recipe.dialect, name)) if name else None
    if name is None or not _checks.is_number(decay) or not source.description().rate_inside:
        return None
    corrected = _with(_at_rate(recipe, schedule), **{name: momentum_correction(decay, schedule)})
    inside = _with(source, **{_rate_name(source.dialect): schedule})
    return corrected if _agree(inside, corrected, first=False) else None


def _numbers(recipe: Recipe) -> Numbers:
    for name, value in recipe.hyperparameters.items():
        for x in value if isinstance(value, tuple | list) else (value,):
            if _checks.is_schedule(x) or _checks.is_scalar_array(x):
                raise TypeError(f"source must have numbers, but for a schedule of the rate, got {name}={x!r}")
    d = recipe.description()
    rate: Any = d.learning_rate
    rule = Filter((), (), (), 1.0) if d.rule is None else d.rule
    settled = rule.at(1, 1).pruned()
    start: Any = rule.at(0, 0).D
    late: Any = settled.D
    if settled.order == 0:
        gain, decay, nu = late, 0.0, 1.0
    else:
        try:
            gain, decay, nu = settled.normal_form()
        except ValueError as error:
            raise ValueError(f"{recipe!r} has no equivalent in another dialect: {error}") from None
    # A sign forgets the size of what it is taken of, and the rate comes after it.
    size: Any = 1.0 if rate is None or d.sign else rate
    l2: Any = d.l2
    decoupled: Any = d.decoupled
    shrink = decoupled * (1.0 if rate is None else rate)
    first = 1.0 if start == late else start / late
    return Numbers(rate, gain * size, decay, nu, first, l2, shrink, d.maximize, d.sign)


def _tidy(target: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Without defaults, and without the last bits that a division and a multiplication leave."""

    def clean(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(clean, x))
        return float(f"{x:.15g}") if isinstance(x, float) else x

    out = {name: clean(value) for name, value in found.items()}
    # A default of None is a weight decay of 0.
    return {name: value for name, value in out.items() if value != (_default(target, name) or 0)}


def _agree_under_rates(source: Recipe, target: Recipe) -> bool:
    """Whether the steps stay the same when both rates change by the same factor."""

    def changed(recipe: Recipe) -> Recipe:
        name = _rate_name(recipe.dialect)
        rate: Any = recipe.description().learning_rate
        return recipe if rate is None else _with(recipe, **{name: lambda step: rate * _probe(step)})

    return _agree(changed(source), changed(target), first=False)


def _agree_under_decays(source: Recipe, target: str) -> bool | None:
    """Whether the steps stay the same when the momentum goes back and forth between two values; None if it cannot."""
    name = _decay_name(source.dialect)
    now: Any = source.hyperparameters.get(name, _default(source.dialect, name)) if name else None
    if name is None or _decay_name(target) is None or is_zero(now):
        return None
    then = tuple(b * 0.9 for b in now) if isinstance(now, tuple | list) else now * 0.9
    pair = [_with(source, **{name: value}) for value in (now, then)]
    try:
        others = [Recipe(target, **TARGETS[target](_numbers(recipe))) for recipe in pair]
        a, b = (_alternating(*recipes) for recipes in (pair, others))
    except ValueError:
        return False
    except TypeError:
        return None
    return _agree(a, b, first=False)


def _alternating(even: Recipe, odd: Recipe) -> Recipe:
    """The dialect with each hyperparameter as in one recipe at even steps, as in the other at odd ones."""

    def mix(x: Any, y: Any) -> Any:
        if isinstance(x, tuple | list):
            return tuple(map(mix, x, y))
        return x if x == y else lambda step: x + (y - x) * (step % 2)

    other = odd.hyperparameters
    return Recipe(even.dialect, **{k: mix(v, other.get(k, v)) for k, v in even.hyperparameters.items()})


def _agree(a: Recipe, b: Recipe, *, first: bool, born: int = 0) -> bool:
    """Whether two recipes have the same steps, for gradients from the first one on or from the second.

    Where a sign or an orthogonalisation follows, the size of a step does not count.

    Args:
      a: A recipe.
      b: Another one.
      first: Whether the first gradient is among those looked at.
      born: The step at which the parameter receives its first gradient.
    """
    impulses = np.eye(_STEPS)[:, born if first else born + 1 :]
    x, y = (_response(recipe.filter(), impulses, born) for recipe in (a, b))
    d = a.description()
    if d.sign or d.learning_rate is None:
        x, y = (z / np.maximum(np.abs(z).max(1, keepdims=True), 1e-300) for z in (x, y))
    return bool(np.all(np.abs(x - y) <= 1e-9 * max(np.abs(x).max(), np.abs(y).max())))


def _response(rule: Filter, signal: np.ndarray, born: int) -> np.ndarray:
    """The updates for gradients of which there are none before step `born`."""
    v = np.zeros((rule.order, signal.shape[1]))
    out = np.zeros(signal.shape)
    for t in range(born, len(signal)):
        A, B, C, D = rule.at(t, t - born).matrices()
        out[t] = C @ v + D * signal[t]
        v = A @ v + np.multiply.outer(B, signal[t])
    return out


def _rate_note(source: Recipe, target: Recipe) -> str:
    inside, outside = source.dialect, target.dialect
    if not source.description().rate_inside:
        inside, outside = outside, inside
    known = f"the learning rate is inside the velocity in {inside} and outside in {outside}"
    if _corrected(source, target, _probe) is None:
        return f"{known}: when it changes, no momentum of {target.dialect} makes up for it"
    return f"{known}: give it as a schedule, and the momentum that makes up for its changes comes with it"


def _probe(step: Any) -> Any:
    return 1.0 + step % 3


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return Recipe(recipe.dialect, **{**recipe.hyperparameters, **changes})


def _rate_name(dialect: str) -> str:
    return _RATES.get(dialect, "lr")


def _decay_name(dialect: str) -> str | None:
    return _DECAYS.get(dialect, "momentum")


def _default(dialect: str, name: str) -> Any:
    return inspect.signature(DIALECTS[dialect]).parameters[name].default
