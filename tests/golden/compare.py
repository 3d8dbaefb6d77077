"""Print how far the dialects are from the recorded trajectories: the largest relative difference of a parameter.

JAX_PLATFORMS=cpu python tests/golden/compare.py
"""

import pathlib
import sys

import jax
import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from golden.cases import CASES  # noqa: E402  beside this file
from golden.handover import our_run  # noqa: E402


def largest(a, b):
    return np.max(abs(a - b) / abs(b))


def main():
    jax.config.update("jax_enable_x64", True)
    golden = {dtype: np.load(HERE / f"{dtype}.npz") for dtype in ("float32", "float64")}
    worst = {}
    print("Ours in either type to the library's; the library's float32 and ours to the library's float64.")
    print(f"{'case':24}{'float32':>10}{'float64':>10}{'its own':>10}{'ours':>10}")
    for name, case in CASES.items():
        key, library = f"{name}/params", case.library.partition("-")[0]
        ours = {dtype: our_run(case, np.dtype(dtype))[0] for dtype in case.dtypes}
        errors = [largest(ours[d], golden[d][key]) if d in ours else np.nan for d in golden]
        worst[library] = np.fmax(worst.get(library, np.nan), errors)
        if "float64" in ours:
            errors += [largest(x, golden["float64"][key]) for x in (golden["float32"][key], ours["float32"])]
        print(f"{name:24}" + "".join(f"{error:10.1e}" for error in errors), flush=True)
    for library, errors in sorted(worst.items()):
        print(f"{library:24}" + "".join(f"{error:10.1e}" for error in errors))


if __name__ == "__main__":
    main()
