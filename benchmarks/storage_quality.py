"""What does keeping the velocity in fewer bytes do to velocities and to final losses?

    python -m benchmarks.storage_quality --plot docs/figures/storage_quality.png

Three networks train with Nesterov's rule, one run for each storage, decay and seed; learning rates fall with 1 - decay,
so that the length of a step along a lasting gradient stays. Beside every run an exact float32 velocity is fed the same
gradients: the relative error of the stored one is averaged over steps, per leaf and for the whole tree. Losses are
those of held-out data after the last step: squared error per image, nats per character, nats per image.

Of the autoencoder every leaf is below the size from which int8 and int4 compress, so that these rows keep float32; "all
leaves" switches that rule off. "reference" is what no single pass can do: each step's own maximum as scale.

Seeds of the autoencoder and of the GRU train in one vectorised program and share the noise of the rounding. Prints a
table and writes benchmarks/storage_quality.json.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import pathlib
import platform
import shlex
import sys
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import momentum_optax as mo
from examples import demo

STORAGES = ("float32", "bfloat16", "int8", "int4")
DECAYS = (0.9, 0.99, 0.999)
# Learning rate over 1 - decay, as tuned for decay 0.9.
RATES = {"autoencoder": 0.1, "gru": 4.0, "cnn": 0.2}
LOSSES = {"autoencoder": "squared error per image", "gru": "nats per character", "cnn": "nats per image"}
HIDDEN, EMBEDDING, LENGTH = 96, 32, 64
# Okabe and Ito's, told apart under every common colour blindness.
COLORS = ("#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#56B4E9", "#D55E00")

Train = Callable[["Tracked"], tuple[np.ndarray, np.ndarray]]


class ReferenceVelocity(NamedTuple):
    """Square-root codes, int8 of the leaf's shape, and scales, float32, one entry per row; one array per velocity."""

    codes: tuple[Any, ...]
    scale: tuple[Any, ...]

    @staticmethod
    def decode(parts: "ReferenceVelocity") -> tuple[jax.Array, ...]:
        """The velocities: the scale times the signed square of code / 127."""
        pairs = zip(parts.codes, parts.scale, strict=True)
        return tuple(scale * (jnp.abs(code) * code) for code, scale in ((c / np.float32(127), s) for c, s in pairs))


@dataclasses.dataclass(frozen=True)
class Reference:
    """One byte per velocity in two passes: exact maxima first, then unbiased rounding. No leaf is too small for it."""

    seed: int = 0
    state_type: ClassVar[Any] = ReferenceVelocity
    reads_step: ClassVar[bool] = True
    bytes_per_parameter: ClassVar[float] = 1.0
    step_size: ClassVar[float] = (127**2 - 126**2) / 127**2

    def init(self, leaf: Any, order: int) -> ReferenceVelocity:
        """Zeros; every array has a buffer of its own."""
        row = [1 if axis in row_axes(leaf.shape) else size for axis, size in enumerate(leaf.shape)]
        return ReferenceVelocity(
            tuple(jnp.zeros_like(leaf, dtype=jnp.int8) for _ in range(order)),
            tuple(jnp.zeros(row, jnp.float32) for _ in range(order)),
        )

    def encode(self, velocities: tuple[jax.Array, ...], previous: Any, write: Any) -> ReferenceVelocity:
        """The velocities rounded to one of the two neighbouring levels, with the mean right; finite ones only."""
        del previous
        key = jax.random.fold_in(jax.random.key(self.seed), write.stamp)
        pairs = [_encode(v, jax.random.fold_in(key, k)) for k, v in enumerate(velocities)]
        return ReferenceVelocity(*zip(*pairs, strict=True))


def row_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The trailing axes that share a scale, as in int8: joined until they hold 512 elements."""
    first = max((axis for axis in range(len(shape)) if math.prod(shape[axis:]) >= 512), default=0)
    return tuple(range(first, len(shape)))


def _encode(v: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of one velocity."""
    scale = jnp.max(jnp.abs(v), row_axes(v.shape), keepdims=True)
    squares = jnp.abs(v) / jnp.where(scale > 0, scale, 1) * np.float32(127**2)
    low = jnp.minimum(jnp.floor(jnp.sqrt(squares)), 126)
    # Decoded values are squares, so the chance to round up is linear between squares: that makes the mean right.
    up = jax.random.uniform(key, v.shape) < (squares - low * low) / (2 * low + 1)
    return (jnp.sign(v) * (low + up)).astype(jnp.int8), scale


class Tracked:
    """An optimizer in some storage, and beside it the exact velocity of the same gradients."""

    def __init__(self, storage: Any, decay: float, rate: float) -> None:
        rule = mo.nesterov(decay)
        self.tx = optax.chain(mo.scale_by_momentum(rule, storage=storage), optax.scale_by_learning_rate(rate))
        self.exact = mo.scale_by_momentum(rule)

    def init(self, params: Any) -> Any:
        """The states of both."""
        return self.tx.init(params), self.exact.init(params)

    def step(self, params: Any, state: Any, gradients: Any) -> tuple[Any, Any, jax.Array]:
        """New parameters and states, and the relative errors: mean over leaves, and of the whole tree."""
        updates, stored = self.tx.update(gradients, state[0], params)
        _, exact = self.exact.update(gradients, state[1])
        errors = relative_errors(mo.velocity(stored)[0], mo.velocity(exact)[0])
        return optax.apply_updates(params, updates), (stored, exact), errors

    def bytes_per_parameter(self, params: Any) -> float:
        """What the velocity takes."""
        state = jax.eval_shape(self.tx.init, params)[0]
        # An accelerator packs two of int4 into a byte.
        width = {jnp.dtype(jnp.int4): 0.5}
        total = sum(x.size * width.get(x.dtype, x.dtype.itemsize) for x in jax.tree.leaves(state.velocity))
        return total / sum(x.size for x in jax.tree.leaves(params))


def relative_errors(stored: Any, exact: Any) -> jax.Array:
    """|stored - exact| / |exact|: mean over leaves, and of the whole tree; 0 where nothing has a velocity yet."""
    norms = jax.tree.map(lambda s, e: jnp.stack([jnp.sum(jnp.square(s - e)), jnp.sum(jnp.square(e))]), stored, exact)
    squares = jnp.stack(jax.tree.leaves(norms))
    squares = jnp.concatenate([squares, squares.sum(0, keepdims=True)])
    ratios = jnp.sqrt(jnp.where(squares[:, 1] > 0, squares[:, 0] / squares[:, 1], 0))
    return jnp.stack([ratios[:-1].mean(), ratios[-1]])


def autoencoder(seeds: int, quick: bool) -> tuple[Any, Train]:
    """The deep autoencoder of the demo on 8x8 digits, batches of 32: its weights, and how to train it."""
    digits = demo.load_digits()
    images = np.concatenate([digits.images, digits.test_images]).reshape(-1, 64)
    each = [demo._race_seed(images, 2 if quick else 120, (0, seed)) for seed in range(seeds)]
    settings = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each)

    def train(optimizer: Tracked) -> tuple[np.ndarray, np.ndarray]:
        def run(setting: Any) -> tuple[jax.Array, jax.Array]:
            weights, images, order, _, test = setting

            def loss_of(weights: Any, rows: Any) -> jax.Array:
                return demo._errors(weights, images[rows])[0]

            weights, errors = _scan(optimizer, loss_of, weights, order.reshape(-1, order.shape[-1]))
            return demo._errors(weights, test)[1], errors

        return jax.device_get(jax.jit(jax.vmap(run))(settings))

    return each[0][0], train


def _scan(optimizer: Tracked, loss_of: Any, weights: Any, batches: Any) -> tuple[Any, jax.Array]:
    """Train on the batches in turn, all in one program: final weights and mean errors."""

    def step(carry: Any, batch: Any) -> tuple[Any, jax.Array]:
        weights, state = carry
        weights, state, errors = optimizer.step(weights, state, jax.grad(loss_of)(weights, batch))
        return (weights, state), errors

    (weights, _), errors = jax.lax.scan(step, (weights, optimizer.init(weights)), batches)
    return weights, errors.mean(0)


def gru(seeds: int, quick: bool) -> tuple[Any, Train]:
    """A character-level GRU on the help texts of the standard library; the last tenth is held out."""
    text = "\n\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    symbols, codes = np.unique(np.frombuffer(text, np.uint8), return_inverse=True)
    data, held_out = (jnp.asarray(part, jnp.int32) for part in np.split(codes, [9 * len(codes) // 10]))
    rngs = [np.random.default_rng((1, seed)) for seed in range(seeds)]
    each = [_gru_weights(rng, len(symbols)) for rng in rngs]
    starts = [rng.integers(len(data) - LENGTH, size=(6 if quick else 300, 32)) for rng in rngs]
    settings = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *zip(each, starts, strict=True))

    def train(optimizer: Tracked) -> tuple[np.ndarray, np.ndarray]:
        def run(setting: Any) -> tuple[jax.Array, jax.Array]:
            weights, errors = _scan(optimizer, lambda w, s: _gru_loss(w, _windows(data, s)), *setting)
            test = _windows(held_out, jnp.arange(0, len(held_out) - LENGTH, LENGTH))
            return _gru_loss(weights, test), errors

        return jax.device_get(jax.jit(jax.vmap(run))(settings))

    return each[0], train


def _windows(text: Any, starts: Any) -> Any:
    """Stretches of one character more than the network reads; one row each."""
    return text[starts[:, None] + jnp.arange(LENGTH + 1)]


def _gru_weights(rng: np.random.Generator, symbols: int) -> dict[str, np.ndarray]:
    """Initial weights: each unit's inputs add up to variance 1; update gate, reset gate and candidate in one matrix."""

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / math.sqrt(rows)).astype(np.float32)

    return {
        "embedding": rng.standard_normal((symbols, EMBEDDING)).astype(np.float32),
        "input": matrix(EMBEDDING, 3 * HIDDEN),
        "hidden": matrix(HIDDEN, 3 * HIDDEN),
        "bias": np.zeros(3 * HIDDEN, np.float32),
        "output": matrix(HIDDEN, symbols),
        "output_bias": np.zeros(symbols, np.float32),
    }


def _gru_loss(weights: Any, windows: Any) -> jax.Array:
    """Mean nats per character, each predicted from those before it in its window (Cho et al., 2014)."""
    inputs = weights["embedding"][windows[:, :-1].T] @ weights["input"] + weights["bias"]

    def cell(h: Any, x: Any) -> tuple[Any, Any]:
        (x_gates, x_new), (h_gates, h_new) = (jnp.split(y, [2 * HIDDEN], -1) for y in (x, h @ weights["hidden"]))
        update, reset = jnp.split(jax.nn.sigmoid(x_gates + h_gates), 2, -1)
        h = update * h + (1 - update) * jnp.tanh(x_new + reset * h_new)
        return h, h

    _, states = jax.lax.scan(cell, jnp.zeros((len(windows), HIDDEN)), inputs)
    logits = states @ weights["output"] + weights["output_bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:].T).mean()


def cnn(seeds: int, quick: bool) -> tuple[Any, Train]:
    """The CNN of the demo on 4000 MNIST images, four epochs of batches of 64; 1000 images are held out."""
    from flax import nnx  # noqa: PLC0415

    data = demo.load_mnist()
    steps = len(data.images) // 64
    models = [nnx.split(demo.build_cnn(28, seed), nnx.Param) for seed in range(seeds)]
    rows = np.tile(np.arange(len(data.images)), (4, 1))
    orders = [np.random.default_rng((2, seed)).permuted(rows, axis=1)[:, : steps * 64] for seed in range(seeds)]
    batches = [order.reshape(-1, 64)[: 3 if quick else None] for order in orders]
    graph = models[0][0]

    def loss_of(weights: Any, images: Any, labels: Any) -> jax.Array:
        logits = nnx.merge(graph, weights)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def train(optimizer: Tracked) -> tuple[np.ndarray, np.ndarray]:
        # One call per step: XLA's CPU backend runs convolutions inside a loop of its own several times slower.
        @jax.jit
        def step(weights: Any, state: Any, images: Any, labels: Any) -> Any:
            return optimizer.step(weights, state, jax.grad(loss_of)(weights, images, labels))

        @jax.jit
        def test(weights: Any) -> jax.Array:
            return loss_of(weights, data.test_images, data.test_labels)

        def run(weights: Any, batches: np.ndarray) -> tuple[float, np.ndarray]:
            state, errors = optimizer.init(weights), []
            for rows in batches:
                weights, state, error = step(weights, state, data.images[rows], data.labels[rows])
                errors.append(error)
            return float(test(weights)), np.mean(jax.device_get(errors), 0)

        runs = [run(weights, of_seed) for (_, weights), of_seed in zip(models, batches, strict=True)]
        return np.array([loss for loss, _ in runs]), np.array([errors for _, errors in runs])

    return models[0][1], train


TASKS = {"autoencoder": autoencoder, "gru": gru, "cnn": cnn}


def storages(task: str) -> dict[str, Any]:
    """What a task compares."""
    table: dict[str, Any] = {name: name for name in STORAGES}
    if task == "autoencoder":
        whole = [name for name in STORAGES if name.startswith("int")]
        table |= {f"{name}, all leaves": getattr(mo.storage, name)(min_size=1) for name in whole}
        table["reference"] = Reference()
    return table


def measure(tasks: list[str], decays: tuple[float, ...], seeds: int, quick: bool) -> list[dict[str, Any]]:
    """One row for each task, decay and storage."""
    rows = []
    total = sum(len(decays) * len(storages(task)) for task in tasks)
    with tqdm(total=total, unit="run", leave=False) as bar:
        for task in tasks:
            params, train = TASKS[task](seeds, quick)
            for decay, (name, storage) in itertools.product(decays, storages(task).items()):
                bar.set_description(f"{task}, {decay}, {name}")
                rate = RATES[task] * (1 - decay)
                optimizer = Tracked(storage, decay, rate)
                losses, errors = train(optimizer)
                rows.append(
                    {
                        "task": task,
                        "decay": decay,
                        "learning_rate": round(rate, 12),
                        "storage": name,
                        "bytes_per_parameter": optimizer.bytes_per_parameter(params),
                        "losses": _finite(losses),
                        "leaf_errors": _finite(errors[:, 0]),
                        "tree_errors": _finite(errors[:, 1]),
                    }
                )
                bar.update()
    return rows


def _finite(values: np.ndarray) -> list[float | None]:
    """Numbers for JSON, which knows no NaN: a run that diverged has none."""
    return [float(value) if np.isfinite(value) else None for value in values]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in print; "paired" is the median over seeds of the loss less that of float32 from the same seed."""
    lines = [f"{'task':13}{'decay':>6}  {'storage':18}{'bytes':>6}{'loss: median (range)':>29}{'paired':>9}"]
    lines[0] += f"{'error, leaf':>13}{'tree':>9}"
    base: np.ndarray = np.zeros(0)
    for row in rows:
        losses, leaf, tree = (np.array(row[key], float) for key in ("losses", "leaf_errors", "tree_errors"))
        base = losses if row["storage"] == "float32" else base
        spread = f"{np.median(losses):.4f} ({losses.min():.4f} to {losses.max():.4f})"
        lines.append(
            f"{row['task']:13}{row['decay']:6}  {row['storage']:18}{row['bytes_per_parameter']:6.2f}{spread:>29}"
            f"{np.median(losses - base):9.4f}{leaf.mean():13.4f}{tree.mean():9.4f}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the final losses to a file."""
    draw(rows).savefig(path, dpi=110)


def draw(rows: list[dict[str, Any]]) -> Any:
    """The final losses: a panel for each task and decay on a scale of its losses, a point for each seed."""
    # Not pyplot: a bare figure is drawn by Agg and changes no setting of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    tasks, decays = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "decay"))
    figure = Figure(figsize=(4.2 * len(tasks), 2.5 * len(decays) + 0.5), layout="constrained")
    panels = figure.subplots(len(decays), len(tasks), squeeze=False)
    for (i, decay), (j, task) in itertools.product(enumerate(decays), enumerate(tasks)):
        here = [row for row in rows if (row["task"], row["decay"]) == (task, decay)]
        _plot_panel([row for row in here if _changes_velocities(row)], panels[i, j])
        panels[i, j].set_ylabel(f"decay {decay:g}" if j == 0 else None)
        left_out = [row["storage"] for row in here if not _changes_velocities(row)]
        note = (
            f"\n{' and '.join(left_out)} by default: no leaf is large enough,\nnothing was compressed"
            if left_out
            else ""
        )
        panels[i, j].set_title(f"{task}: held-out {LOSSES[task]}{note}" if i == 0 else None, fontsize=10)
    return figure


def _changes_velocities(row: dict[str, Any]) -> bool:
    """Whether a row is float32 or keeps velocities in something else: small leaves stay in float32."""
    return row["storage"] == "float32" or any(error != 0 for error in row["tree_errors"])


def _plot_panel(rows: list[dict[str, Any]], axes: Any) -> None:
    """Seeds and medians of each storage; what ends far above float32 is an arrow with its range."""
    losses = [np.array(row["losses"], float) for row in rows]
    far = [not np.median(x) <= 1.5 * losses[0].max() for x in losses]
    shown = np.concatenate([x for x, beyond in zip(losses, far, strict=True) if not beyond])
    margin = 0.15 * (shown.max() - shown.min())
    bottom, top = shown.min() - margin, shown.max() + margin
    for x, (values, beyond, color) in enumerate(zip(losses, far, COLORS, strict=False)):
        if beyond:
            axes.annotate("", (x, top), (x, top - margin), arrowprops={"arrowstyle": "->", "color": color})
            text = f"{values.min():.3g} to {values.max():.3g}"
            axes.text(x, top - 1.1 * margin, text, color=color, ha="center", va="top", fontsize=8)
        else:
            axes.plot(np.linspace(x - 0.15, x + 0.15, len(values)), values, "o", color=color, markersize=4)
            axes.hlines(np.median(values), x - 0.3, x + 0.3, color=color)
    names = [row["storage"].replace("reference", "two passes").replace(", ", ",\n") for row in rows]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set(ylim=(bottom, top), xlim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def surroundings() -> dict[str, Any]:
    """What the numbers depend on besides this file."""
    modules = {"jax": jax, "numpy": np, "optax": optax, "momentum_optax": mo}
    versions = {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}
    command = shlex.join(["python", "-m", f"benchmarks.{pathlib.Path(__file__).stem}", *sys.argv[1:]])
    device = jax.devices()[0].device_kind
    return {"command": command, "versions": versions, "device": device, "cpu_cores": os.cpu_count()}


def main() -> None:
    """Train every row, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    output = pathlib.Path(__file__).with_suffix(".json")
    parser.add_argument("--output", type=pathlib.Path, default=output, help="where to write the JSON")
    parser.add_argument("--plot", type=pathlib.Path, help="draw the final losses to this file")
    parser.add_argument("--redraw", action="store_true", help="take the rows from the JSON instead of training")
    parser.add_argument("--seeds", type=int, help="runs of each row (default 5)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="what to train (default all)")
    parser.add_argument("--quick", action="store_true", help="decay 0.9, a few steps, 2 seeds: to see that it runs")
    arguments = parser.parse_args()
    decays, seeds = (DECAYS[:1], 2) if arguments.quick else (DECAYS, 5)
    if arguments.redraw:
        rows = json.loads(arguments.output.read_text())["rows"]
    else:
        rows = measure(arguments.tasks, decays, arguments.seeds or seeds, arguments.quick)
        arguments.output.write_text(json.dumps(surroundings() | {"losses": LOSSES, "rows": rows}, indent=2) + "\n")
    print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
