"""The optimizers of the language model, each of them a visible chain."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh

import momentum_optax as mo

from .settings import Settings

# Steps between two measurements of the telemetry.
MEASURED = 10
WEIGHT_DECAY = 0.1
STORAGES = ("float32", "bfloat16", "int8", "int4")
# Memories of gradients, decays as published. A decay of zero is no memory.
RULES = {
    "none": mo.heavy_ball(0.0),
    "heavy_ball": mo.heavy_ball(0.9),
    "ema": mo.ema(0.9),
    "nesterov": mo.nesterov(0.9),
    "quasi_hyperbolic": mo.quasi_hyperbolic(0.999, 0.7),
    "aggregated": mo.aggregated((0.0, 0.9, 0.99)),
}
# Memories of updates, for a run of so many steps: a twentieth of it, where published numbers are for longer runs.
BEHIND = {
    "primal_averaging": lambda steps: mo.primal_averaging(1 - 1 / max(2, steps / 20)),
    "ema_nesterov": lambda steps: mo.ema_nesterov(1 - 1 / max(2, steps / 20)),
    "outer_nesterov": lambda steps: mo.outer_nesterov(max(1, min(28, steps // 20))),
    "lookahead": lambda steps: mo.lookahead(5, 0.5),
}


class Parts(NamedTuple):
    """What an optimizer is made of.

    Attributes:
      rate: The schedule of the learning rate.
      rule: The memory of gradients.
      storage: How it is kept.
      matrices: Dimension numbers of the matrices; None for embeddings, norms and biases.
      mesh: The devices; None for one.
      specs: How matrices are split over them.
    """

    rate: optax.Schedule
    rule: mo.Filter
    storage: str
    matrices: optax.Params
    mesh: Mesh | None
    specs: optax.Params

    @property
    def decay(self) -> optax.GradientTransformation:
        """Decoupled weight decay of the matrices."""
        leaf = (type(None), optax.contrib.MuonDimensionNumbers)
        mask = jax.tree.map(lambda x: x is not None, self.matrices, is_leaf=lambda x: isinstance(x, leaf))
        return optax.add_decayed_weights(WEIGHT_DECAY, mask)


class Optimizer(NamedTuple):
    """An optimizer and its defaults.

    Attributes:
      learning_rate: That of its own rule. Rules of another gain get another one where `scales`.
      rule: Its own memory of gradients.
      takes_rules: Whether it takes another one; AdamW has moments.
      scales: Whether its steps are as long as the rule's gain says.
      make: From its parts.
    """

    learning_rate: float
    rule: mo.Filter
    takes_rules: bool
    scales: bool
    make: Callable[[Parts], optax.GradientTransformation]


def _sgd(parts: Parts) -> optax.GradientTransformation:
    return mo.sgd(parts.rate, parts.rule, storage=parts.storage)


def _adamw(parts: Parts) -> optax.GradientTransformation:
    # Squares are kept by storages with relative accuracy: one byte of another kind.
    squares = {"float32": "float32", "bfloat16": "bfloat16"}.get(parts.storage, "uint8")
    moments = mo.compress(optax.scale_by_adam(b2=0.99), {"mu": parts.storage, "nu": squares})
    return optax.chain(moments, parts.decay, optax.scale_by_learning_rate(parts.rate))


def _lion(parts: Parts) -> optax.GradientTransformation:
    return optax.chain(
        mo.scale_by_momentum(parts.rule, storage=parts.storage),
        optax.scale_by_sign(),
        parts.decay,
        optax.scale_by_learning_rate(parts.rate),
    )


def _muon(parts: Parts) -> optax.GradientTransformation:
    # Steps as long as those of AdamW, which has the other parameters.
    return mo.muon(
        parts.rate,
        parts.rule,
        weight_dimension_numbers=parts.matrices,
        scale="rms",
        weight_decay=WEIGHT_DECAY,
        others=optax.adamw(parts.rate, b2=0.99, weight_decay=0.0),
        mesh=parts.mesh,
        specs=parts.specs,
        storage=parts.storage,
    )


OPTIMIZERS = {
    "sgd": Optimizer(0.1, mo.nesterov(0.9), True, True, _sgd),
    "adamw": Optimizer(2e-3, mo.ema(0.9), False, False, _adamw),
    "lion": Optimizer(3e-4, mo.lion_mix(0.9, 0.99), True, False, _lion),
    "muon": Optimizer(2e-3, mo.muon_mix(0.95), True, False, _muon),
}


def default_rate(optimizer: str, rule: str) -> float:
    """The learning rate of an optimizer; with another rule of SGD one that goes as far along a gradient that stays."""
    found = OPTIMIZERS[optimizer]
    if rule == "own" or not found.scales:
        return found.learning_rate
    return found.learning_rate * found.rule.dc_gain() / RULES[rule].dc_gain()


def build(
    settings: Settings, matrices: optax.Params, mesh: Mesh | None = None, specs: optax.Params = None
) -> optax.GradientTransformation:
    """Clipping, the optimizer, a rule behind it and an average of the weights, with telemetry.

    The state is a pair, of which the first has the telemetry of all but the average.

    Args:
      settings: What to take.
      matrices: Dimension numbers of the parameters, see `model.matrices`.
      mesh: The devices where there are several.
      specs: How the parameters, or the shares of them that an optimizer sees, are split.

    Raises:
      ValueError: If the parts do not go together; it begins with the name of a setting.
    """
    chosen = OPTIMIZERS[settings.optimizer]
    rule = chosen.rule if settings.rule == "own" else RULES[settings.rule]
    if not chosen.takes_rules and settings.rule != "own":
        raise ValueError(f"rule must be own with {settings.optimizer}, which has moments instead, got {settings.rule}")
    parts = Parts(schedule(settings), rule, settings.storage, matrices, mesh, specs)
    tx = optax.chain(optax.clip_by_global_norm(1.0), chosen.make(parts))
    if settings.behind != "none":
        tx = mo.with_momentum(tx, BEHIND[settings.behind](settings.steps), storage=settings.storage)
    average = optax.identity()
    if settings.average:
        average = mo.average_params(float(mo.tuning.decay_from_half_life(settings.average)))
    return optax.chain(mo.monitor(tx, every=MEASURED), average)


def schedule(settings: Settings) -> optax.Schedule:
    """Up in a twentieth of the steps, then down along a cosine to a tenth; the rate may be traced."""
    steps, peak = settings.steps, settings.learning_rate
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, steps // 20), max(2, steps), 0.1)
    return lambda step: peak * shape(step)
