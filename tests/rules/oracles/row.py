"""A row of the table of oracles, and intervals that many rules share."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from conformance import rule_functions

FINITE = "(-inf, inf)"
# Of an average, and of a sum, which may forget nothing.
AVERAGE_DECAY, SUM_DECAY = {"decay": "[0, 1)"}, {"decay": "[0, 1]"}
CURVATURES = {"L": "(0, inf)", "mu": "(0, L)"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A rule, its reference, and the hyperparameters to compare them with.

    Attributes:
      rule: Name of the public function.
      reference: The loop.
      constants: Every argument of the rule, or of `build`.
      ranges: The arguments that can be scheduled, with the range of the random schedules.
      learning_rate: The learning rate.
      variant: Distinguishes two rows of one rule.
      build: The rule from its hyperparameters, where it is not the function itself.
      scheduled_reference: The loop for schedules, where `reference` takes numbers only.
      evaluates: Whether the reference yields (stored, evaluated).
    """

    rule: str
    reference: Callable[..., Iterator[Any]]
    constants: dict[str, Any]
    ranges: dict[str, tuple[float, float]]
    learning_rate: float = 0.2
    variant: str = ""
    build: Callable[..., Any] | None = None
    scheduled_reference: Callable[..., Iterator[Any]] | None = None
    evaluates: bool = False

    def __str__(self):
        return f"{self.rule} {self.variant}".strip().replace(" ", "-")

    def make(self, **changes):
        """Our rule, with some hyperparameters replaced."""
        return (self.build or rule_functions()[self.rule])(**self.constants | changes)

    def run(self, grad, x, steps, h=None, *, learning_rate=None):
        """Stored and evaluated points after each step, two arrays (steps, n); the second is None without one."""
        loop = self.reference if h is None else self.scheduled_reference or self.reference
        lr = self.learning_rate if learning_rate is None else learning_rate
        points = list(loop(grad, x, steps, lr, h or (lambda t: self.constants)))
        if not self.evaluates:
            return np.array(points), None
        stored, evaluated = zip(*points, strict=True)
        return np.array(stored), np.array(evaluated)
