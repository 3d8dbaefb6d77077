"""The words and the figure of the demo."""

import math
from pathlib import Path

import numpy as np

from ..demo.figure import STYLES
from .launcher import Result
from .training import Settings


def headline(settings: Settings, images: int, parameters: int) -> str:
    """The settings in words; `images` is the number of images of a worker."""
    steps = settings.rounds * settings.inner_steps
    return (
        f"{settings.workers} processes with {images} images each ({settings.data}); {steps} steps of "
        f"{settings.batch_size} images on each.\nA CNN of {parameters:,} parameters; Nesterov 0.9, rate "
        f"{settings.learning_rate:g}, velocity in int8; an average of the weights in two bytes.\nDiLoCo meets every "
        f"{settings.inner_steps} steps; velocity and exchange in int8."
    )


def survived(losses: int, different: list[str]) -> bool:
    """Print the outcome of the run in which a worker was to be killed; return whether it is as claimed."""
    if not losses:
        print("  FAILED: the run was over before the worker could be killed; take more rounds.")
    elif different:
        print("  FAILED: not what the uninterrupted run has:", *different, sep="\n    ")
    else:
        print(
            "  Finished with what the uninterrupted run has, bit for bit: parameters, velocities, averages, residuals."
        )
    return bool(losses) and not different


def table(data_parallel: Result, local_steps: Result) -> str:
    """The costs of a worker and the final accuracies, by both strategies."""
    a, b = data_parallel.last, local_steps.last
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
    for prefix, label in (("", ""), ("averaged ", ", averaged")):
        row(f"held-out cross-entropy{label}", f"{a[f'{prefix}loss']:.4f}", f"{b[f'{prefix}loss']:.4f}")
        row(f"held-out accuracy{label}", f"{a[f'{prefix}accuracy']:.1%}", f"{b[f'{prefix}accuracy']:.1%}")
    return "\n".join(lines)


def plot(data_parallel: Result, local_steps: Result, path: Path, title: str) -> None:
    """Write the curves against bytes sent to a PNG."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    for axes, name, label in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("held-out cross-entropy", "held-out accuracy (%)"), strict=True
    ):
        for result, color, marker, legend in (
            (data_parallel, STYLES[1][0], "s", "gradients averaged at every step"),
            (local_steps, STYLES[2][0], "o", "DiLoCo, velocity and exchange in int8"),
        ):
            sent, factor = np.asarray(result.column("compiled")) / 1e6, 100 if name == "accuracy" else 1
            axes.plot(sent, factor * np.asarray(result.column(name)), f"{marker}-", color=color, label=legend)
            axes.plot(sent, factor * np.asarray(result.column(f"averaged {name}")), "--", color=color)
        axes.set(xscale="log", xlabel="MB sent by each worker", ylabel=label)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_yscale("log")
    figure.axes[1].plot([], [], "--", color="0.5", label="averaged weights")
    figure.axes[1].legend(loc="lower right", frameon=False)
    figure.savefig(path, format="png", dpi=110)
