"""The program of one process, started by `processes`: join the others, train, report, write checkpoints."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from . import checkpoint, traffic, training
from .training import PER_WORKER, REPLICATED

# The initial parameters.
START = "start.npz"


class Job(NamedTuple):
    """The orders of a worker.

    Attributes:
      settings: The fields of a `Settings`.
      folder: Path of the folder with the data and the checkpoints.
      worker: Its number.
      port: Of the coordinator, which is in the process of worker 0.
      strategy: A key of `STRATEGIES`.
      run: The name of the folder of checkpoints.
      resume: The round to go on from; None to start.
    """

    settings: Sequence[Any]
    folder: str
    worker: int
    port: int
    strategy: str
    run: str
    resume: int | None


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

    def __init__(self, program: jax.stages.Wrapped, planned: float, workers: int, *arguments: Any):
        self._run = program.lower(*arguments).compile()
        self._found = traffic.collectives(self._run.as_text() or "")
        self._sent = sum(traffic.sent(one, workers) for one in self._found)
        self._planned = planned
        self.cost = Cost()

    def __call__(self, *arguments: Any) -> Any:
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


class Run:
    """The state of a worker's training, and what both strategies share."""

    def __init__(self, job: Job):
        self.job, self.settings = job, training.Settings(*job.settings)
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
        self.mesh = Mesh(np.asarray(devices), (training.AXIS,))
        shapes, self.apply = training.model(self.settings)
        self.params = checkpoint.load(Path(job.folder) / START, shapes)
        self.programs = training.programs(self.mesh, self.settings, self.apply)
        with np.load(Path(job.folder) / f"data-{job.worker}.npz") as file:
            self.images, self.labels = file["images"], file["labels"]
        self.order = training.order(self.settings, job.worker, len(self.images))
        self.inner = training.inner(self.settings).init(self.params)

    def batches(self, round_: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of a round on this worker."""
        rows = self.order[round_]
        return self.images[rows], self.labels[rows]

    def per_worker(self, tree: Any) -> Any:
        """A tree that differs between workers, as this worker's part of global arrays."""
        return training.placed(jax.tree.map(lambda x: np.asarray(x)[None], tree), self.mesh, PER_WORKER)

    def replicated(self, tree: Any) -> Any:
        """A tree that is the same on every worker, as global arrays."""
        return training.placed(tree, self.mesh, REPLICATED)


class DataParallel(Run):
    """Gradients are averaged at every step."""

    def __init__(self, job: Job):
        super().__init__(job)
        planned = traffic.gradient_bytes(self.params, self.settings.workers)
        self.state = self.replicated(self.params), self.replicated(self.inner)
        batch = jax.tree.map(lambda x: self.per_worker(x[0]), self.batches(0))
        self.step = Measured(self.programs.step, planned, self.settings.workers, *self.state, *batch)

    def round(self, round_: int) -> optax.Params:
        """Train for a round and return the parameters."""
        for images, labels in zip(*self.batches(round_), strict=True):
            self.state = self.step(*self.state, self.per_worker(images), self.per_worker(labels))
        return training.here(self.state[0])

    @property
    def cost(self) -> Cost:
        """The cost of all rounds so far."""
        return self.step.cost


class LocalSteps(Run):
    """Workers train on their own for a round, then meet (DiLoCo)."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.inner, self.outer = self.per_worker(self.inner), training.outer().init(self.params)
        if job.resume is not None:
            self._load(job.resume)
        anchor, momentum, residual = self.outer
        self.outer = type(self.outer)(self.replicated(anchor), self.replicated(momentum), self.per_worker(residual))
        # After a meeting all workers have the anchor's parameters: there is nothing else to save.
        self.params = self.per_worker(anchor)
        planned = traffic.exchange_bytes(anchor, self.settings.workers)
        batch = jax.tree.map(self.per_worker, self.batches(0))
        workers = self.settings.workers
        self.local = Measured(self.programs.local, 0.0, workers, self.params, self.inner, *batch)
        self.meet = Measured(self.programs.meet, planned, workers, self.params, self.outer)

    def round(self, round_: int) -> optax.Params:
        """Train for a round and return the parameters."""
        self.params, self.inner = self.local(self.params, self.inner, *map(self.per_worker, self.batches(round_)))
        self.params, self.outer = self.meet(self.params, self.outer)
        self._save(round_ + 1)
        return training.here(self.outer.anchor)

    @property
    def cost(self) -> Cost:
        """The cost of all rounds so far."""
        return added(self.local.cost, self.meet.cost)

    def _save(self, round_: int) -> None:
        root, worker = Path(self.job.folder) / self.job.run, self.job.worker
        folder = checkpoint.folder_of(root, round_)
        checkpoint.save(folder / checkpoint.file_of(worker), training.here((self.inner, self.outer.residual)))
        if worker == 0:
            checkpoint.save(folder / checkpoint.COMMON, training.here(self.outer[:2]))
            # All have met: what they wrote before is complete.
            checkpoint.keep_only(root, round_ - checkpoint.KEPT_ROUNDS + 1, round_)

    def _load(self, round_: int) -> None:
        folder = checkpoint.folder_of(Path(self.job.folder) / self.job.run, round_)
        own = training.here(self.inner), jax.tree.map(lambda x: x[None], self.outer.residual)
        inner, residual = checkpoint.load(folder / checkpoint.file_of(self.job.worker), own)
        anchor, momentum = checkpoint.load(folder / checkpoint.COMMON, tuple(self.outer[:2]))
        self.inner = training.placed(inner, self.mesh, PER_WORKER)
        self.outer = type(self.outer)(anchor, momentum, jax.tree.map(lambda x: x[0], residual))


STRATEGIES: dict[str, type[DataParallel] | type[LocalSteps]] = {
    "data parallel": DataParallel,
    "local steps": LocalSteps,
}


def evaluator(folder: Path, apply: training.Apply) -> Callable[[optax.Params], dict[str, float]]:
    """A function from parameters to accuracy and mean cross-entropy on the images held out."""
    with np.load(folder / "held-out.npz") as file:
        images, labels = file["images"], file["labels"]

    @jax.jit
    def run(params: optax.Params) -> tuple[jax.Array, jax.Array]:
        logits = apply(params, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return (logits.argmax(-1) == labels).mean(), loss

    def evaluate(params: optax.Params) -> dict[str, float]:
        accuracy, loss = run(params)
        return {"accuracy": float(accuracy), "loss": float(loss)}

    return evaluate


def main(text: str) -> None:
    """Carry out a `Job`, given in JSON; print a line of JSON on the standard output after each round."""
    # Libraries write to the standard output as well: all but the reports goes to the log.
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    job = Job(**json.loads(text))
    settings = training.Settings(*job.settings)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{job.port}"
    jax.distributed.initialize(
        address, settings.workers, job.worker, initialization_timeout=60, coordinator_bind_address=address
    )
    run = STRATEGIES[job.strategy](job)
    evaluate = evaluator(Path(job.folder), run.apply) if job.worker == 0 else lambda _: {}
    for round_ in range(job.resume or 0, settings.rounds):
        params = run.round(round_)
        report = {"round": round_ + 1, **run.cost._asdict(), **evaluate(params)}
        print(json.dumps(report), file=reports, flush=True)


def _exit_with_launcher() -> None:
    """The standard input is a pipe to which nothing is written; it ends with the launcher, whatever ends that."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
