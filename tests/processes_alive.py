"""Which processes of a test are alive."""

import os
import pathlib
import time


def alive(mark):
    """Processes that have `mark` in their command line."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(mark) in text and path.parent.name != str(os.getpid()):
            found.append(text)
    return found


def gone(mark, seconds=20.0):
    """Whether no process with `mark` is left after a while."""
    until = time.monotonic() + seconds
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(mark)


def soon(seconds=20.0):
    return time.monotonic() + seconds
