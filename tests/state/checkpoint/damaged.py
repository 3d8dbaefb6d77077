"""Restores damaged copies of a checkpoint: `python tests/state/checkpoint/damaged.py DIRECTORY`.

Every file of a small checkpoint is cut in half and removed, one at a time. For each damage it prints a line of JSON:
the file's folder, what was done to it, and whether restoring was refused, gave the whole state, or gave another one.
`test_resumed_runs.py` reads the lines. This runs in a separate process because a failed restore leaves coroutines in
Orbax' event loop, which another thread drops at any later time, with warnings that would be charged to any test.
"""

import json
import pathlib
import shutil
import sys

import jax
import numpy as np
from state.checkpoint.orbax_runs import restored, saved, small_run


def damage(source, target, name, how):
    """A copy of the folder `source` in which one file is cut in half or gone."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    file = target / name
    whole = file.read_bytes()
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(whole[: len(whole) // 2])


def outcome(path, state):
    """The outcome of restoring the checkpoint at `path`, which held `state`."""
    try:
        again = restored(path, jax.eval_shape(lambda: state))
    except Exception:
        return "refused"
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), again, state)
    return "whole" if jax.tree.all(same) else "another state"


def main(directory):
    state = small_run()
    source = saved(directory / "whole", state)
    names = [p.relative_to(source) for p in sorted(source.rglob("*")) if p.is_file() and "commit_success" not in p.name]
    for name in names:
        for how in ("half", "gone"):
            damage(source, directory / "bad", name, how)
            found = {"folder": name.parent.name, "how": how, "outcome": outcome(directory / "bad", state)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
