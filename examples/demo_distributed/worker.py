"""The program of one process, started by `processes`: join the others, train, report, write checkpoints."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax

from . import training
from .job import Job
from .strategies import STRATEGIES


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
    evaluate = evaluator(Path(job.folder), run.apply) if job.worker == 0 else None
    for round_ in range(job.resume or 0, settings.rounds):
        params = run.round(round_)
        report = {"round": round_ + 1, **run.cost._asdict()}
        if evaluate is not None:
            averaged = evaluate(run.averaged())
            report |= evaluate(params) | {f"averaged {name}": value for name, value in averaged.items()}
        print(json.dumps(report), file=reports, flush=True)


def _exit_with_launcher() -> None:
    """The standard input is a pipe to which nothing is written; it ends with the launcher, whatever ends that."""
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
