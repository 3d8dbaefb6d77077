"""Start a process for each worker, read its reports, and end all of them whatever happens."""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from . import worker
from .job import Job


class WorkerLost(Exception):  # noqa: N818
    """A worker has ended before its work did."""

    def __init__(self, number: int, status: int, log: Path):
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
        super().__init__(f"worker {number} {how}")
        self.number = number
        self.log = log.read_text(errors="replace")


class Processes:
    """The processes of all workers, as a context manager; on leaving it none is alive.

    Each is the leader of a process group, so that what it may have started ends with it, and so that a key pressed in
    the terminal reaches the launcher only, who then ends them all. They are killed, not asked: JAX catches SIGTERM,
    and a collective whose peer is gone may wait for minutes.
    """

    def __init__(self, jobs: list[Job]):
        self._jobs = jobs
        self._processes: list[subprocess.Popen[bytes]] = []
        self._logs = [Path(job.folder) / f"worker-{job.worker}.log" for job in jobs]

    def __enter__(self) -> Self:
        try:
            for job, log in zip(self._jobs, self._logs, strict=True):
                self._processes.append(_start(job, log))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def kill(self, number: int) -> None:
        """End one worker as the kernel would that has run out of memory."""
        if self._processes[number].poll() is None:
            os.killpg(self._processes[number].pid, signal.SIGKILL)

    def reports(self, deadline: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """The reports of workers, with their numbers, until all have finished.

        Raises:
          WorkerLost: If one ends otherwise.
          TimeoutError: At the time `deadline` of `time.monotonic`.
        """
        with selectors.DefaultSelector() as waiting:
            for number, process in enumerate(self._processes):
                waiting.register(_pipe(process.stdout), selectors.EVENT_READ, (number, bytearray()))
            while waiting.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("workers took longer than --timeout allows")
                for key, _ in waiting.select(left):
                    number, rest = key.data
                    text = os.read(key.fd, 1 << 16)
                    if not text:
                        waiting.unregister(key.fileobj)
                        self._check(number, deadline)
                    rest += text
                    while b"\n" in rest:
                        line, _, rest[:] = rest.partition(b"\n")
                        yield number, json.loads(line)

    def _check(self, number: int, deadline: float) -> None:
        """A worker has closed its pipe: it has finished, or is lost."""
        try:
            self._processes[number].wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"worker {number} did not end in time") from None
        # Where several are gone, the one that was killed is the reason.
        status = {n: code for n, p in enumerate(self._processes) if (code := p.poll())}
        if status:
            first = min(status, key=lambda n: status[n])
            raise WorkerLost(first, status[first], self._logs[first])

    def _end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
            _pipe(process.stdin).close()
            _pipe(process.stdout).close()


def free_port() -> int:
    """A port of the loopback device that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start(job: Job, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", worker.__name__, json.dumps(job._asdict())]
    with log.open("wb") as errors:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=_environment(),
            start_new_session=True,
        )


def _pipe(file: IO[bytes] | None) -> IO[bytes]:
    if file is None:
        raise RuntimeError("the processes of workers have pipes")
    return file


def _environment() -> dict[str, str]:
    """One device and one thread for each process: there are more workers than cores, and sums in one order."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    own = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": flags}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
