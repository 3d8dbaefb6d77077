"""The strategies of a worker: gradients averaged at every step, or local steps between meetings."""

from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

import momentum_optax as mo

from . import checkpoint, traffic, training
from .job import START, Job
from .measured import Cost, Measured, added
from .training import PER_WORKER, REPLICATED


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

    def batches(self, round_: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of a round on this worker."""
        rows = self.order[round_]
        return self.images[rows], self.labels[rows]

    def per_worker(self, tree: optax.Params) -> optax.Params:
        """A tree that differs between workers, as this worker's part of global arrays."""
        return training.placed(jax.tree.map(lambda x: np.asarray(x)[None], tree), self.mesh, PER_WORKER)

    def replicated(self, tree: optax.Params) -> optax.Params:
        """A tree that is the same on every worker, as global arrays."""
        return training.placed(tree, self.mesh, REPLICATED)


class DataParallel(Run):
    """Gradients are averaged at every step."""

    def __init__(self, job: Job):
        super().__init__(job)
        planned = traffic.gradient_bytes(self.params, self.settings.workers)
        optimizer = training.every_step(self.settings)
        self.state = self.replicated(self.params), self.replicated(optimizer.init(self.params))
        batch = jax.tree.map(lambda x: self.per_worker(x[0]), self.batches(0))
        self.step = Measured(self.programs.step, planned, self.settings.workers, *self.state, *batch)

    def round(self, round_: int) -> optax.Params:
        """Train for a round and return the parameters."""
        for images, labels in zip(*self.batches(round_), strict=True):
            self.state = self.step(*self.state, self.per_worker(images), self.per_worker(labels))
        return training.here(self.state[0])

    def averaged(self) -> optax.Params:
        """The average of the weights after all steps so far."""
        params, state = training.here(self.state)
        return mo.averaged_params(state, params)

    @property
    def cost(self) -> Cost:
        """The cost of all rounds so far."""
        return self.step.cost


class LocalSteps(Run):
    """Workers train on their own for a round, then meet (DiLoCo)."""

    def __init__(self, job: Job):
        super().__init__(job)
        self.inner = self.per_worker(training.inner(self.settings).init(self.params))
        self.outer = training.outer().init(self.params)
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

    def averaged(self) -> optax.Params:
        """The average of the common weights after all meetings so far."""
        anchor, momentum = training.here(self.outer[:2])
        return mo.averaged_params(momentum, anchor)

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
