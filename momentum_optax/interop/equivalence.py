"""Hyperparameters from one dialect to another: the same steps in other numbers, or the reason why there are none."""

__all__ = ["Equivalence", "equivalent_hyperparameters"]

import dataclasses
from collections.abc import Mapping

from .. import _checks
from .._typing import Count, Schedule
from ..schedules import momentum_correction
from .agreement import agree, agree_under_decays, agree_under_rates, times, varying
from .constant_form import ConstantForm
from .dialect import DIALECTS, Dialect, Hyperparameter
from .recipe import Recipe, changed, constant_form, value


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """The result of `equivalent_hyperparameters`.

    Attributes:
      recipe: The target with its hyperparameters.
      first_step: Whether the steps are the same from the first gradient of a parameter on, whenever that comes; if not,
        they are the same past it, apart from its effect on the velocity.
      scheduled_learning_rate: Whether they stay the same when both learning rates follow one schedule, up to the
        constant factor between them.
      scheduled_momentum: Whether they stay the same when the momentum changes, and the target's argument with it.
        None where one of the two keeps it constant.
      notes: The differences as sentences, each with its correction if there is one.
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
    `Filter.normal_form`); two agree if and only if those three numbers, the weight decays and the signs do. Equality
    under schedules is decided by comparing the two filters.

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
      TypeError: If `source` is not a `Recipe`, or has another schedule than its learning rate's.

    Reference:
      Ma and Yarats, ICLR 2019, arXiv:1810.06801, section 4. Goyal et al., 2017, arXiv:1706.02677, section 3, for the
      correction.
    """
    if not isinstance(source, Recipe):
        raise TypeError(
            f"source must be a Recipe such as Recipe('torch_sgd', lr=0.1, momentum=0.9), got {_checks.shown(source)}"
        )
    _checks.choice("target", target, tuple(DIALECTS))
    rate = DIALECTS[source.dialect].learning_rate
    schedule = None if rate is None else source.hyperparameters.get(rate)
    if rate is None or not (callable(schedule) and _checks.is_schedule(schedule)):
        return _constant(source, target)
    # A probe in place of the schedule: every dialect is linear in its learning rate.
    return _scheduled(source, _constant(changed(source, **{rate: 1.0}), target), schedule)


def _constant(source: Recipe, target: str) -> Equivalence:
    """The equivalence of a source of numbers."""
    record = DIALECTS[target]
    if source.dialect == target:
        return Equivalence(source, True, True, None if record.momentum is None else True, ())
    form = constant_form(source)
    recipe = Recipe(target, **_tidy(record, record.arguments(form)))
    first, late = (agree(source, recipe, first=True, born=born) for born in (0, 3))
    rate = agree_under_rates(source, recipe)
    decay = agree_under_decays(source, target)
    notes = _first_step_notes(source, target, form, first, late)
    if not rate:
        notes.append(_rate_note(source, recipe))
    if decay is False:
        notes.append(f"when the momentum changes, {source.dialect} and {target} weigh past gradients differently")
    return Equivalence(recipe, first and late, rate, decay, tuple(notes))


def _first_step_notes(source: Recipe, target: str, form: ConstantForm, first: bool, late: bool) -> list[str]:
    """Where the two differ in a parameter's first gradient, in the first step of the run or later."""
    if not first:
        return [
            f"{source.dialect} takes the first gradient of a parameter {form.first_gradient:.6g} times as much as "
            f"{target}: multiply it by that there, weight decay included"
        ]
    if not late:
        return [
            f"{source.dialect} and {target} differ in how much the first gradient of a parameter counts, where that "
            "comes after the first step of the run: one of them dampens it"
        ]
    return []


def _scheduled(source: Recipe, probe: Equivalence, schedule: Schedule) -> Equivalence:
    """The equivalence for a scheduled learning rate, from that for the learning rate 1."""
    if probe.scheduled_learning_rate:
        return dataclasses.replace(probe, recipe=_at_rate(probe.recipe, schedule))
    corrected = _corrected(source, probe.recipe, schedule)
    if corrected is None:
        reason = _rate_note(source, probe.recipe)
        if _corrected(source, probe.recipe, varying()) is not None:
            reason = "the learning rate is 0 at a step, where no momentum makes up for it: keep it above 0"
        raise ValueError(f"{probe.recipe.dialect} has no such steps: {reason}")
    notes = tuple(note for note in probe.notes if note != _rate_note(source, probe.recipe))
    return dataclasses.replace(probe, recipe=corrected, scheduled_learning_rate=True, notes=notes)


def _at_rate(recipe: Recipe, schedule: Schedule) -> Recipe:
    """A recipe for the learning rate 1, at that of a schedule."""
    name = DIALECTS[recipe.dialect].learning_rate
    return recipe if name is None else changed(recipe, **{name: times(value(recipe, name), schedule)})


def _corrected(source: Recipe, recipe: Recipe, schedule: Schedule) -> Recipe | None:
    """The recipe with the momentum that makes up for a learning rate outside the velocity, if any does."""
    name, rate = DIALECTS[recipe.dialect].momentum, DIALECTS[source.dialect].learning_rate
    if name is None or rate is None or not source.description().rate_inside:
        return None
    decay = value(recipe, name)
    if not _checks.is_number(decay):
        return None

    def follows(schedule: Schedule) -> Recipe:
        return changed(_at_rate(recipe, schedule), **{name: momentum_correction(decay, schedule)})

    # The schedules of Optax give arrays of float32, in which two filters would agree to seven digits only.
    def number(step: Count) -> float:
        return float(schedule(step))

    return follows(schedule) if agree(changed(source, **{rate: number}), follows(number), first=False) else None


def _tidy(target: Dialect, found: Mapping[str, Hyperparameter]) -> dict[str, Hyperparameter]:
    """Without defaults, and without the last bits that a division and a multiplication leave."""
    out = {name: _clean(x) for name, x in found.items()}
    # A default of None is a weight decay of 0.
    return {name: x for name, x in out.items() if name not in target.defaults or x != (target.defaults[name] or 0)}


def _clean(x: Hyperparameter) -> Hyperparameter:
    if isinstance(x, tuple):
        return tuple(float(f"{y:.15g}") for y in x)
    return float(f"{x:.15g}") if isinstance(x, float) else x


def _rate_note(source: Recipe, target: Recipe) -> str:
    """On which side of the velocity each has its learning rate, and whether that can be made up for."""
    inside, outside = source.dialect, target.dialect
    if not source.description().rate_inside:
        inside, outside = outside, inside
    known = f"the learning rate is inside the velocity in {inside} and outside in {outside}"
    if _corrected(source, target, varying()) is None:
        return f"{known}: when it changes, no momentum of {target.dialect} makes up for it"
    return f"{known}: give it as a schedule, and the momentum that makes up for its changes comes with it"
