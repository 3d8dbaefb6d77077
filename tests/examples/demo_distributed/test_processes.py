"""The processes of workers, most of them a few lines of Python: reports arrive, and none is left alive."""

import subprocess
import sys

import pytest
from processes_alive import alive, gone, soon

from examples.demo_distributed import processes
from examples.demo_distributed.job import Job


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A function from scripts to the processes that run them."""

    def start(job, log):
        code = f"import json, os, subprocess, sys, time  # {tmp_path}\n{job.strategy}"
        with log.open("wb") as errors:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
            return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)

    monkeypatch.setattr(processes, "_start", start)
    return lambda *codes: processes.Processes(
        [Job((), str(tmp_path), i, 0, code, "", None) for i, code in enumerate(codes)]
    )


def test_reports_of_all_workers_arrive_and_nobody_is_left(scripts, tmp_path):
    say = "print(json.dumps({'round': %d}), flush=True);" * 2
    with scripts(say % (1, 2), say % (3, 4)) as workers:
        found = sorted((number, report["round"]) for number, report in workers.reports(soon()))
    assert found == [(0, 1), (0, 2), (1, 3), (1, 4)]
    assert alive(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("print('why', file=sys.stderr); sys.exit(3)", "failed with exit status 3"),
        ("os.abort()", "was ended by SIGABRT"),
    ],
)
def test_a_lost_worker_is_named_and_the_others_are_ended_with_what_they_started(code, how, scripts, tmp_path):
    hang = f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)  # {tmp_path}']); time.sleep(600)"
    with pytest.raises(processes.WorkerLost, match=f"worker 1 {how}") as lost, scripts(hang, code) as workers:
        list(workers.reports(soon()))
    assert lost.value.number == 1
    assert ("why" in lost.value.log) == ("why" in code)
    assert gone(tmp_path)


def test_the_worker_that_was_killed_is_the_reason_and_not_one_that_missed_it(scripts):
    with scripts("sys.exit(3)", "time.sleep(600)") as workers:
        workers.kill(1)
        for process in workers._processes:
            process.wait(20)
        workers.kill(1)
        with pytest.raises(processes.WorkerLost, match="worker 1 was ended by SIGKILL"):
            list(workers.reports(soon()))


def test_a_worker_that_hangs_is_ended_at_the_deadline(scripts, tmp_path):
    with pytest.raises(TimeoutError, match="longer than --timeout allows"), scripts("time.sleep(600)") as workers:
        list(workers.reports(soon(1)))
    with scripts("os.close(1); time.sleep(600)") as workers:
        # On a crowded machine it takes more than a second to start.
        assert workers._processes[0].stdout.read() == b""
        with pytest.raises(TimeoutError, match="worker 0 did not end in time"):
            list(workers.reports(soon(1)))
    assert gone(tmp_path)


def test_workers_are_ended_when_the_launcher_is_interrupted(scripts, tmp_path):
    def interrupted():
        with scripts("print('here', flush=True); time.sleep(600)", "time.sleep(600)") as workers:
            assert workers._processes[0].stdout.readline() == b"here\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert gone(tmp_path)


def test_a_worker_that_cannot_start_leaves_no_other(scripts, tmp_path, monkeypatch):
    start = processes._start
    monkeypatch.setattr(processes, "_start", lambda job, log: start(job, log) if job.worker == 0 else 1 / 0)
    with pytest.raises(ZeroDivisionError), scripts("time.sleep(600)", ""):
        pass
    assert gone(tmp_path)
