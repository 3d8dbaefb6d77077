"""A small CNN in Flax, trained with a momentum rule whose telemetry is recorded."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import momentum_optax as mo

from .data import Split

if TYPE_CHECKING:
    from flax import nnx

# Learning rate times gain at zero frequency: the length of a step along a gradient that stays.
EFFECTIVE_RATE = 1.0
# Steps from one measurement of the telemetry to the next.
MEASURED = 10


class History(NamedTuple):
    """Progress of the training of the CNN.

    Attributes:
      loss: Mean over each epoch.
      accuracy: On held-out images, after each epoch.
      parameters: Their number.
      telemetry: Results of `mo.telemetry` at every `MEASURED`-th step, and as "epoch" the time of that step.
    """

    loss: list[float]
    accuracy: list[float]
    parameters: int
    telemetry: Sequence[dict[str, float]] = ()


def build_cnn(side: int, seed: int) -> "nnx.Sequential":
    """Two convolutions of stride 2 and two dense layers: 105,866 parameters for 28x28 images, 13,706 for 8x8."""
    from flax import nnx  # noqa: PLC0415

    rngs = nnx.Rngs(seed)
    # Strides rather than pooling: several times faster on a CPU.
    conv = partial(nnx.Conv, kernel_size=(3, 3), strides=2, rngs=rngs)
    dense = partial(nnx.Linear, rngs=rngs)
    features: list[Callable[[jax.Array], jax.Array]] = [
        conv(1, 16),
        nnx.relu,
        conv(16, 32),
        nnx.relu,
        lambda x: x.reshape(len(x), -1),
    ]
    quarter = math.ceil(math.ceil(side / 2) / 2)
    return nnx.Sequential(*features, dense(32 * quarter**2, 64), nnx.relu, dense(64, 10))


def train_cnn(
    data: Split, rule: mo.Filter, learning_rate: float, *, epochs: int = 8, batch_size: int = 64, seed: int = 0
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
    model = build_cnn(data.images.shape[1], seed)
    tx = _optimizer(rule, learning_rate, steps, epochs)
    optimizer = nnx.Optimizer(model, mo.monitor(tx, every=MEASURED), wrt=nnx.Param)
    step, accuracy = _jitted_functions()
    # In Flax 0.12.0 it has the other name.
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
                    figures = mo.telemetry(pure(optimizer.opt_state))
                    measured.append({"epoch": (done + 1) / steps, **figures})
                    bar.set_postfix_str(in_short(figures), refresh=False)
                done += 1
            history.loss.append(float(np.mean(jax.device_get(losses))))
            history.accuracy.append(float(accuracy(model, data.test_images, data.test_labels)))
            bar.write(f"  epoch {epoch + 1:2}: loss {history.loss[-1]:.4f}, accuracy {history.accuracy[-1]:.1%}")
    return history


def in_short(figures: dict[str, float]) -> str:
    """Telemetry for a progress bar."""
    norms = [f"{x:.2g}" for name, x in figures.items() if name.startswith("velocity_norm")]
    cosines = [f"{x:+.2f}" for name, x in figures.items() if name.startswith("cosine")]
    text = f"rate {figures['effective_learning_rate']:.2g}"
    return text + (f", |v| {' '.join(norms)}, cos {' '.join(cosines)}" if norms else "")


def _optimizer(rule: mo.Filter, learning_rate: float, steps: int, epochs: int) -> optax.GradientTransformation:
    """Clipping, momentum, and a learning rate that warms up over half an epoch and falls along a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, steps // 2, epochs * steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0), mo.scale_by_momentum(rule), optax.scale_by_learning_rate(schedule)
    )


def _jitted_functions() -> tuple[Callable[..., jax.Array], Callable[..., jax.Array]]:
    """The training step, which overwrites model and optimizer, and the accuracy."""
    from flax import nnx  # noqa: PLC0415

    @nnx.jit(donate_argnums=(0, 1))
    def step(
        model: "nnx.Sequential", optimizer: "nnx.Optimizer[nnx.Sequential]", images: jax.Array, labels: jax.Array
    ) -> jax.Array:
        def loss_of(model: "nnx.Sequential") -> jax.Array:
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(images), labels))

        loss: jax.Array
        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    return step, nnx.jit(lambda model, images, labels: (model(images).argmax(-1) == labels).mean())
