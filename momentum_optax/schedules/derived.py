"""Schedules made from other schedules."""

__all__ = ["momentum_correction", "restarted"]

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from .. import _checks
from ..filters.coefficients import Periodic, Scalar, value_at

if TYPE_CHECKING:
    import jax
    import numpy as np

    from .._typing import Count, Number, Schedule


def restarted(schedule: "Schedule", at: "int | Sequence[int] | np.ndarray | jax.Array") -> "Schedule":
    """Scheduled restart: the schedule starts again from its step 0 at given steps.

    With a period it is the way to say that a schedule repeats, which `analysis` takes without a `step`.

    `nesterov(restarted(nesterov_convex(), 40))` is the SRSGD rule: its momentum is 0 at a restart, which also
    clears the velocity.

    Args:
      schedule: The schedule to restart.
      at: A period of at least 1, or increasing steps, of at least 1, to restart at; numbers, or an integer array with
        at most one axis, whose values are not checked.

    Raises:
      ValueError: If `at` is out of range, empty or not increasing.
      TypeError: If `schedule` is not a function, or `at` holds anything but whole numbers.

    Reference:
      Wang et al., "Scheduled restart momentum for accelerated stochastic gradient descent", SIAM J. Imaging Sci. 2022,
      arXiv:2002.10583.
    """
    if not _checks.is_schedule(schedule):
        raise TypeError(f"schedule must be a function of the step, got {_checks.shown(schedule)}")
    check_restarts("at", at)
    if getattr(at, "ndim", 0) == 1:
        steps = cast("jax.Array", at)
        return lambda step: schedule(step - ((steps <= step) * steps).max(initial=0))
    if not isinstance(at, Sequence):
        period = cast("Count", at)
        if _checks.is_array(at):
            return lambda step: schedule(step % period)
        return Periodic(lambda step: schedule(step % period), int(at))
    lengths = [now - before for before, now in zip((0, *at), at, strict=False)]
    return lambda step: schedule(step - sum((step >= now) * n for now, n in zip(at, lengths, strict=True)))


def check_restarts(name: str, at: object) -> None:
    """Raise unless `at`, given as the argument `name`, says when to restart, see `restarted`."""
    if getattr(at, "ndim", 0) > 0:
        steps = cast("np.ndarray | jax.Array", at)
        if steps.ndim > 1 or steps.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold whole numbers along at most one axis, got {_checks.shown(at)}")
    elif isinstance(at, Sequence):
        if not at:
            raise ValueError(f"{name} must name at least one step, got none")
        for i, begin in enumerate(at):
            _checks.integer(f"{name}[{i}]", begin, 1 if i == 0 else at[i - 1] + 1)
    elif not _checks.is_array(at):
        _checks.integer(name, at, 1)


def momentum_correction(decay: Scalar, learning_rate: "Schedule") -> "Schedule":
    r"""The decay that makes a heavy ball exact under a learning-rate schedule: $\beta_t\,\eta_{t-1}/\eta_t$.

    With the learning rate after the velocity, `chain(scale_by_momentum(heavy_ball(decay)),
    scale_by_learning_rate(learning_rate))`, a drop of the learning rate shrinks the whole history at once. With this
    decay instead the steps equal those of the learning rate inside the velocity, $v' = \beta v + \eta_t g$. Where the
    learning rate is 0 so is the decay: a history cannot be carried through a step of size 0.

    Args:
      decay: beta, a number, a scalar array or a schedule.
      learning_rate: The schedule that scales the update afterwards.

    Raises:
      TypeError: If `learning_rate` is not a schedule: a constant one needs no correction.

    Reference:
      Goyal et al., "Accurate, large minibatch SGD: training ImageNet in 1 hour", 2017, arXiv:1706.02677, section 3, who
      correct in the other direction: the inverse factor makes the learning rate inside act as one outside.
    """
    _checks.within("decay", decay, "(-1, 1]")
    if not _checks.is_schedule(learning_rate):
        raise TypeError(f"learning_rate must be a schedule of the step, got {_checks.shown(learning_rate)}")

    def schedule(step: "Count") -> "Number":
        now = learning_rate(step)
        # At step 0 the velocity is zero, so any value will do, and step -1 may be outside the schedule's domain.
        before = learning_rate(step - (step > 0))
        alive = now != 0
        return value_at(decay, step) * before * alive / (now + (1 - alive))

    return schedule
