"""Time of a step on a GPU or a TPU: storages, Optax, and the fused optimizers of other libraries.

    python -m benchmarks.accelerator

One leaf of 8192 x 4096 and GPT-2 small: SGD with momentum in each storage, AdamW with its moments in bytes, Optax's
own, PyTorch's fused SGD and AdamW and flashoptim's where they are installed. Optimizers take turns with `optax.sgd`, as
in `step_time`, parameters and state donated. GB/s counts what a step cannot avoid: gradient and old values read, new
ones written; the share is that of a device copy. Kernels are the operations of the compiled program's entry. A few
steps on a small leaf are compared with the same ones on the CPU of this machine.

Takes under 6 minutes: what has not begun after `--seconds` is left out and named in the file. Prints a table and writes
benchmarks/accelerator.json, with the name of the device.
"""

import dataclasses
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples.command_line import whole_number

from . import _run
from ._programs import kernels_of
from ._run import Row
from .step_time import (
    NAMED,
    STORAGES,
    TIMES,
    Shapes,
    Subject,
    copy_speed,
    fused_sgd,
    gradients_of,
    jax_subject,
    pairs_of,
    summary,
    torch_subject,
    transformer,
)

BASELINE = "optax.sgd"
# Steps that are compared with those on the CPU.
STEPS = 5


def trees(quick: bool) -> dict[str, Shapes]:
    """Shapes of the parameters."""
    return {
        "one leaf": {"leaf": (64, 128) if quick else (8192, 4096)},
        "GPT-2 small": transformer(1, 64, 256) if quick else transformer(12, 768, 50257),
    }


def optimizers() -> dict[str, optax.GradientTransformation]:
    """Those of JAX, the baseline first."""
    return {
        BASELINE: optax.sgd(0.1, momentum=0.9),
        "optax.adamw": optax.adamw(0.001),
        **{f"mo.sgd, {storage}": mo.sgd(0.1, 0.9, storage=storage) for storage in STORAGES},
        "adamw, int8 and uint8": mo.compress(optax.adamw(0.001), {"mu": "int8", "nu": "uint8"}),
    }


def others() -> dict[str, Callable[[list[Any]], Any]]:
    """Those of libraries for PyTorch that are installed."""
    found: dict[str, Callable[[list[Any]], Any]] = {}
    if importlib.util.find_spec("torch"):
        found |= {"torch.optim.SGD(fused)": fused_sgd, "torch.optim.AdamW(fused)": _fused_adamw}
    if importlib.util.find_spec("torch") and importlib.util.find_spec("flashoptim"):
        found |= {"flashoptim.FlashSGD": _flash_sgd, "flashoptim.FlashAdamW": _flash_adamw}
    return found


def _fused_adamw(params: list[Any]) -> Any:
    import torch  # noqa: PLC0415

    return torch.optim.AdamW(params, lr=0.001, fused=True)


def _flash_sgd(params: list[Any]) -> Any:
    import flashoptim  # noqa: PLC0415

    return flashoptim.FlashSGD(params, lr=0.1, momentum=0.9)


def _flash_adamw(params: list[Any]) -> Any:
    import flashoptim  # noqa: PLC0415

    return flashoptim.FlashAdamW(params, lr=0.001)


def measure(quick: bool, pairs: int, copy: float, seconds: float) -> Iterator[Row | str]:
    """For each tree and optimizer a row, or its name and why it was left out."""
    end = time.monotonic() + seconds
    cases = list(itertools.product(trees(quick), [*optimizers(), *others()]))
    for tree, name in tqdm(cases, unit="row", leave=False):
        if time.monotonic() > end:
            yield f"{tree}, {name}: no time left"
            continue
        if name == BASELINE:
            gradients = jax.tree.map(jnp.asarray, gradients_of(trees(quick)[tree]))
            baseline = jax_subject(optimizers()[BASELINE], gradients)
        try:
            subject = baseline if name == BASELINE else subject_of(name, gradients)
            times = pairs_of(baseline.timer, subject.timer, pairs)
        except Exception as error:  # what another library cannot do here must not lose the other rows
            if name in optimizers():
                raise
            yield f"{tree}, {name}: {type(error).__name__}"
            continue
        kernels = kernels_of(subject.program) if subject.program else None
        yield {"tree": tree, "optimizer": name, **summary(times, gradients, subject, copy), "kernels": kernels}


def subject_of(name: str, gradients: optax.Updates) -> Subject:
    """An optimizer ready to be timed."""
    return (
        jax_subject(optimizers()[name], gradients) if name in optimizers() else torch_subject(gradients, others()[name])
    )


def numbers(storage: str) -> Row:
    """A velocity after a few steps here and on the CPU.

    Returns:
      `difference`: the norm of the difference over that of the velocity; `equal`: the share of elements that are the
      same.
    """
    rng = np.random.default_rng(0)
    gradients = [rng.standard_normal((64, 256), np.float32) for _ in range(STEPS)]
    tx = mo.scale_by_momentum(mo.heavy_ball(0.9), storage=storage)

    def run(device: jax.Device) -> np.ndarray:
        with jax.default_device(device):
            state, step = tx.init(jnp.zeros((64, 256))), jax.jit(tx.update)
            for g in gradients:
                _, state = step(jnp.asarray(g), state)
            return np.asarray(mo.velocity(state)[0])

    here, there = run(jax.devices()[0]), run(jax.devices("cpu")[0])
    return {
        "storage": storage,
        "difference": float(np.linalg.norm(here - there) / np.linalg.norm(there)),
        "equal": float(np.mean(here == there)),
    }


def table(rows: list[Row]) -> str:
    """The rows in print."""
    shown = [row | {"counted": row["kernels"] or ""} for row in rows]
    return _run.table({**NAMED, **TIMES, "kernels": "{counted:>}"}, shown)


@dataclasses.dataclass(frozen=True)
class Options(_run.Options):
    """Options of this benchmark."""

    pairs: Annotated[int | None, whole_number(1, 10_000)] = None
    """timings of each row; None is 30, or 3 with --quick"""
    seconds: Annotated[int, whole_number(0, 100_000)] = 300
    """what has not begun by then is left out"""
    quick: bool = False
    """small trees, 3 pairs: to see that it runs"""


def main() -> None:
    """Time every row, compare the numbers, print the table and write the file."""
    run = _run.Run("accelerator", __doc__, Options)
    options = run.options
    pairs = options.pairs or (3 if options.quick else 30)
    checks = [numbers(storage) for storage in STORAGES]
    copy = copy_speed(256 if options.quick else 8192, pairs)
    results = {"copy_gigabytes_per_second": copy / 1e9, "pairs": pairs, "against_cpu": checks}
    rows: list[Row] = []
    left_out: list[str] = []
    for found in measure(options.quick, pairs, copy, options.seconds):
        if isinstance(found, str):
            left_out.append(found)
        else:
            rows.append(found)
        # Each time: what ends a run early must not lose the rows before.
        run.write(results | {"rows": rows, "left_out": left_out})
    print(table(rows))
    print("\n".join(f"left out: {name}" for name in left_out))
    for check in checks:
        print(f"{check['storage']}: off by {check['difference']:.1e} from the CPU, {check['equal']:.2%} equal")
    print(f"An elementwise copy moves {copy / 1e9:.1f} GB/s on {jax.devices()[0].device_kind}.")


if __name__ == "__main__":
    main()
