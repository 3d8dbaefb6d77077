"""The optimizers that are compared: each in a storage, where its velocity is in a state, and its settings by task."""

import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

import momentum_optax as mo
from momentum_optax.storage import Storage
from momentum_optax.wrappers.fields import CompressedField, decompress_field

# One storage, or one for each field of AdamW's state.
Kept: TypeAlias = "str | Storage | dict[str, str | Storage]"


class Base(NamedTuple):
    """An optimizer.

    Attributes:
      build: The optimizer from a learning rate, a decay and a storage.
      velocity: The velocity in its state, a tree like the parameters that have one.
      decays: For each task the decays that are measured.
      rates: For each task the learning rate over 1 - decay.
    """

    build: Callable[[float, float, Kept], optax.GradientTransformation]
    velocity: Callable[[optax.OptState], optax.Params]
    decays: dict[str, tuple[float, ...]]
    rates: dict[str, float]


def _nesterov(rate: float, decay: float, kept: Kept) -> optax.GradientTransformation:
    return optax.chain(
        mo.scale_by_momentum(mo.nesterov(decay), storage=kept),
        optax.scale_by_learning_rate(rate),
    )


def _adamw(rate: float, decay: float, kept: Kept) -> optax.GradientTransformation:
    return mo.compress(optax.adamw(rate, b1=decay), kept if isinstance(kept, dict) else {"mu": kept})


def _lion(rate: float, decay: float, kept: Kept) -> optax.GradientTransformation:
    return mo.lion(rate, b2=decay, storage=kept)


def _muon(rate: float, decay: float, kept: Kept) -> optax.GradientTransformation:
    # Embeddings and biases by AdamW, at a rate of their own.
    others = optax.adamw(0.003)
    return mo.muon(rate, decay, weight_dimension_numbers=_matrices, others=others, storage=kept)


def _matrices(params: optax.Params) -> optax.Params:
    """Dimension numbers: of a language model those of its attention and hidden layers, elsewhere of all matrices."""
    if isinstance(params, dict) and "blocks" in params:
        from examples.lm import model  # noqa: PLC0415

        return model.matrices(model.CONFIGS["tiny"])
    return jax.tree.map(lambda x: optax.contrib.MuonDimensionNumbers() if jnp.ndim(x) == 2 else None, params)


def _first_velocity(state: optax.OptState) -> optax.Params:
    return mo.velocity(state)[0]


def _first_moment(state: optax.OptState) -> optax.Params:
    mu = optax.tree.get(state, "mu")
    return decompress_field(mu) if isinstance(mu, CompressedField) else mu


# Rates of Nesterov's rule as tuned for decay 0.9. Of the others the best of two or three, a factor of 3 apart, for
# float32 on a seed that is not measured.
BASES = {
    "nesterov": Base(
        _nesterov,
        _first_velocity,
        {"wide": (0.9, 0.99), "autoencoder": (0.9, 0.99, 0.999), "gru": (0.9, 0.99), "cnn": (0.9, 0.99)},
        {"wide": 0.1, "autoencoder": 0.1, "gru": 4.0, "cnn": 0.2},
    ),
    "adamw": Base(_adamw, _first_moment, {"wide": (0.9,), "lm": (0.9,)}, {"wide": 0.03, "lm": 0.03}),
    "lion": Base(_lion, _first_velocity, {"wide": (0.99,), "lm": (0.99,)}, {"wide": 0.1, "lm": 0.1}),
    "muon": Base(_muon, _first_velocity, {"wide": (0.95,), "lm": (0.95,)}, {"wide": 0.2, "lm": 0.4}),
}


def built(base: str, task: str, decay: float, kept: Kept) -> optax.GradientTransformation:
    """An optimizer with its settings for a task; what it warns of is what is measured here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BASES[base].build(learning_rate(base, task, decay), decay, kept)


def learning_rate(base: str, task: str, decay: float) -> float:
    """The learning rate, without the roundings of its product."""
    return round(BASES[base].rates[task] * (1 - decay), 12)
