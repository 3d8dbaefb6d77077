"""Runs the workers of the demo, and resumes a run that has lost one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..demo.data import Split
from . import checkpoint, training
from .job import Job
from .processes import Processes, WorkerLost, free_port
from .training import Settings


class Result(NamedTuple):
    """Reports of worker 0 by round, from 1: accuracy and loss on images held out, also of averaged weights; costs."""

    reports: dict[int, dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """Of the last round."""
        return self.reports[max(self.reports)]

    def column(self, name: str) -> list[float]:
        """A number of every round, in order."""
        return [self.reports[round_][name] for round_ in sorted(self.reports)]


# Called with the name of the run and a report of worker 0 after each round.
Tick: TypeAlias = Callable[[str, dict[str, Any]], None]


class Launcher:
    """Runs the workers of one folder, within one deadline; `losses` counts the workers that were lost."""

    def __init__(self, settings: Settings, folder: Path, deadline: float, say: Callable[[str], None], tick: Tick):
        self.settings, self.folder, self.deadline = settings, folder, deadline
        self._say, self._tick = say, tick
        self.losses = 0

    def run(self, strategy: str, name: str, *, victim: int | None = None, restarts: int = 0) -> Result:
        """Train to the end, from the last checkpoint again wherever a worker is lost, `restarts` times at most.

        Args:
          strategy: A key of `strategies.STRATEGIES`.
          name: The name of the folder of checkpoints.
          victim: A worker to kill half-way.
          restarts: How often to go on after a loss.

        Raises:
          WorkerLost: If a worker is lost once more.
          TimeoutError: At the deadline.
          CheckpointError: If there is no complete checkpoint to go on from.
        """
        result, resume = Result({}), None
        while True:
            jobs = self._jobs(strategy, name, resume)
            try:
                with Processes(jobs) as processes:
                    for number, report in processes.reports(self.deadline):
                        if number == 0:
                            result.reports[report["round"]] = report
                            self._tick(name, report)
                        if number == victim and report["round"] == self.settings.rounds // 2:
                            victim = None
                            processes.kill(number)
                return result
            except WorkerLost as lost:
                self.losses += 1
                if not restarts:
                    raise
                restarts -= 1
                resume = self._last_checkpoint(name, lost)

    def _jobs(self, strategy: str, name: str, resume: int | None) -> list[Job]:
        port, folder = free_port(), str(self.folder)
        return [Job(self.settings, folder, n, port, strategy, name, resume) for n in range(self.settings.workers)]

    def _last_checkpoint(self, name: str, lost: WorkerLost) -> int | None:
        root = self.folder / name
        round_, problems = checkpoint.latest(root, self.settings.workers)
        for problem in problems:
            self._say(f"  Not complete: {problem.replace(str(root) + '/', '')}.")
        if round_ is None:
            self._say(f"  {lost} before the first checkpoint; all start again.")
        else:
            checkpoint.keep_only(root, 0, round_)
            self._say(f"  {lost}; all go on from the checkpoint of round {round_}.")
        return round_


def write_data(data: Split, settings: Settings, folder: Path) -> list[int]:
    """Give every worker a file with its own images; return how many each has."""
    shards = training.shards(data.images, data.labels, settings.workers)
    for number, (images, labels) in enumerate(shards):
        np.savez(folder / f"data-{number}.npz", images=images, labels=labels)
    np.savez(folder / "held-out.npz", images=data.test_images, labels=data.test_labels)
    return [len(images) for images, _ in shards]


def compared(folder: Path, settings: Settings, name: str = "interrupted") -> list[str]:
    """The arrays of a run's last checkpoint that are not bit-equal to those of the uninterrupted run."""
    one, other = (checkpoint.folder_of(folder / run, settings.rounds) for run in ("whole", name))
    return checkpoint.differences(one, other)
