"""The cost of compiled programs: meetings, collectives, bytes sent, seconds."""

import time
from typing import NamedTuple

import jax
import optax

from . import traffic


class Cost(NamedTuple):
    """Totals of a worker: meetings, collectives, bytes sent by three counts (see `traffic`), seconds of training."""

    meetings: float = 0
    collectives: float = 0
    planned: float = 0
    compiled: float = 0
    measured: float = 0
    seconds: float = 0


class Measured:
    """A compiled program and the total cost of its calls."""

    def __init__(self, program: jax.stages.Wrapped, planned: float, workers: int, *arguments: optax.Params):
        self._run = program.lower(*arguments).compile()
        self._found = traffic.collectives(self._run.as_text() or "")
        self._sent = sum(traffic.sent(one, workers) for one in self._found)
        self._planned = planned
        self.cost = Cost()

    def __call__(self, *arguments: optax.Params) -> optax.Params:
        """The result of the program, when it is complete."""
        before, start = traffic.written_by_this_process(), time.perf_counter()
        result = jax.block_until_ready(self._run(*arguments))
        seconds, written = time.perf_counter() - start, traffic.written_by_this_process() - before
        count = len(self._found)
        self.cost = added(self.cost, Cost(int(count > 0), count, self._planned, self._sent, written, seconds))
        return result


def added(a: Cost, b: Cost) -> Cost:
    """The sum of two costs."""
    return Cost(*(x + y for x, y in zip(a, b, strict=True)))
