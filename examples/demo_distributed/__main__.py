"""The command line of the demo: train one network on several processes, twice, then kill a worker.

Gradients are averaged at every step, then the workers meet rarely (DiLoCo). Needs the packages of `examples.demo`, on
Linux or macOS. Every worker is a process with one CPU device; they communicate by gloo, over this machine's loopback
device. The bytes that a worker sends are counted three times: from the sizes of the arrays, from the collectives of the
compiled programs, and, on Linux, by the kernel.
"""

import dataclasses
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import jax

from .. import command_line
from ..command_line import WRITABLE, choice, number, whole_number
from ..demo.data import LOADERS, PACKAGES, Split
from . import checkpoint, training
from .job import START
from .launcher import Launcher, compared, write_data
from .processes import WorkerLost
from .report import headline, plot, survived, table
from .training import Settings

# After this many losses of workers the cause is taken to be in the program.
RESTARTS = 3


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the demo."""

    data: Annotated[str, choice(LOADERS)] = "mnist"
    """images"""
    workers: Annotated[int, whole_number(2, 16)] = 4
    """processes"""
    rounds: Annotated[int, whole_number(2, 10_000)] = 25
    """meetings of DiLoCo"""
    inner_steps: Annotated[int, whole_number(1, 10_000)] = 20
    """steps between meetings"""
    batch_size: Annotated[int, whole_number(1, 10_000)] = 16
    """images of a step on each worker"""
    learning_rate: Annotated[float, number(1e-9, 1e9)] = 0.05
    """peak of the inner optimizer's"""
    seed: Annotated[int, whole_number(0, 2**31 - 1)] = 0
    """seed of everything"""
    timeout: Annotated[int, whole_number(1, 100_000)] = 600
    """seconds after which all is ended"""
    kill: bool = True
    """leave all workers alive"""
    output: Annotated[Path, WRITABLE] = Path("momentum_distributed.png")
    """PNG file to write"""

    @property
    def settings(self) -> Settings:
        """The part of the options that workers are told."""
        return Settings(*(getattr(self, name) for name in Settings._fields))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0, 1 where something is missing or went wrong, 2 where an option is wrong."""
    description = "Train a CNN on several processes at once, count what they send, kill one and go on."
    options = command_line.parse(Options, "examples.demo_distributed", description, arguments)
    if message := command_line.missing(PACKAGES[options.data]):
        print(message, file=sys.stderr)
        return 1
    data = LOADERS[options.data](options.seed)
    most = len(data.images) // options.workers
    if options.batch_size > most:
        message = f"must be at most {most} for {options.workers} workers, got {options.batch_size}"
        command_line.refuse("--batch-size", message)
    # SIGTERM to this process must end its workers too.
    before = signal.signal(signal.SIGTERM, _exit)
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


def _demo(options: Options, data: Split) -> int:
    from tqdm import tqdm  # noqa: PLC0415

    start = time.monotonic()
    settings = options.settings
    params = training.start(settings)
    count = sum(x.size for x in jax.tree.leaves(params))
    with tempfile.TemporaryDirectory(prefix="momentum-") as name:
        folder = Path(name)
        sizes = write_data(data, settings, folder)
        checkpoint.save(folder / START, params)
        print(headline(settings, min(sizes), count), flush=True)
        total = settings.rounds * (3 if options.kill else 2)
        with tqdm(total=total, unit="round", leave=False) as bar:

            def tick(name: str, report: dict[str, Any]) -> None:
                bar.set_description(name)
                bar.set_postfix(accuracy=f"{report['accuracy']:.1%}")
                bar.update()

            launcher = Launcher(settings, folder, start + options.timeout, bar.write, tick)
            data_parallel = launcher.run("data parallel", "every step")
            local_steps = launcher.run("local steps", "whole")
            bar.write("Each worker:\n" + table(data_parallel, local_steps))
            if options.kill:
                bar.write("DiLoCo again, with a worker killed half-way:")
                launcher.run("local steps", "interrupted", victim=settings.workers - 1, restarts=RESTARTS)
        good = not options.kill or survived(launcher.losses, compared(folder, settings))
    plot(
        data_parallel, local_steps, options.output, f"{settings.workers} workers, {settings.data}: {count:,} parameters"
    )
    print(f"Wrote {options.output} after {time.monotonic() - start:.0f} s.")
    return 0 if good else 1


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
