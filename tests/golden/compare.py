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


def main():
    jax.config.update("jax_enable_x64", True)
    print(f"{'case':24}{'float32':>10}{'float64':>10}")
    golden = {dtype: np.load(HERE / f"{dtype}.npz") for dtype in ("float32", "float64")}
    worst = {}
    for name, case in CASES.items():
        line = f"{name:24}"
        for dtype, there in golden.items():
            error = float("nan")
            if dtype in case.dtypes:
                expected = there[f"{name}/params"]
                error = np.max(abs(our_run(case, np.dtype(dtype))[0] - expected) / abs(expected))
                library = case.library.partition("-")[0]
                worst[library, dtype] = max(worst.get((library, dtype), 0), error)
            line += f"{error:10.1e}"
        print(line, flush=True)
    for library in sorted({library for library, _ in worst}):
        print(f"{library:24}" + "".join(f"{worst.get((library, dtype), float('nan')):10.1e}" for dtype in golden))


if __name__ == "__main__":
    main()
