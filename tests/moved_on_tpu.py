"""The bytes that compiled steps move on a TPU that is not here; in another process, since libtpu has one owner."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import json, math, optax
from benchmarks import _moved_bytes
import momentum_optax as mo
{code}
found, device = {{}}, _moved_bytes.target("tpu")
for name, tx in optimizers.items():
    program = _moved_bytes.compiled(tx, _moved_bytes.LARGE, device)
    found[name] = _moved_bytes.count(program, math.prod(_moved_bytes.LARGE))._asdict()
print(json.dumps(found))
"""

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not made for this platform"
)


def counts(code):
    """The count of each step in `optimizers`, a dictionary of transformations that `code` defines."""
    command = [sys.executable, "-c", PROGRAM.format(code=code)]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])
