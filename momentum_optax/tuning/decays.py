"""Decays from the length of a memory or a noise gain, and learning rates that match."""

import math

import numpy as np
from numpy.typing import ArrayLike

from .. import _checks, analysis
from ..analysis.arguments import Floats, reals
from ..filters import Filter


def decay_from_half_life(
    steps: ArrayLike | None = None,
    *,
    tokens: ArrayLike | None = None,
    epochs: ArrayLike | None = None,
    batch_size: ArrayLike | None = None,
    epoch_size: ArrayLike | None = None,
) -> Floats:
    r"""The decay whose memory halves in so many steps, tokens or epochs: $2^{-1/s}$ for s steps.

    One of `steps`, `tokens` and `epochs` is given: $s = \mathrm{tokens}/\mathrm{batch\_size}$, or
    $s = \mathrm{epochs}\cdot\mathrm{epoch\_size}/\mathrm{batch\_size}$. A half-life in tokens or epochs means the same
    at every batch size; the decay does not. Any decay can be so given: of a rule, of a second moment, of
    `average_params` (per step, whatever its `every`), of a schedule.

    Args:
      steps: s, in (0, inf); all broadcast.
      tokens: The half-life in tokens, or examples, in (0, inf).
      epochs: The half-life in epochs, in (0, inf).
      batch_size: Tokens, or examples, per step, in (0, inf); with `tokens` or `epochs` only.
      epoch_size: Tokens, or examples, in an epoch, in the unit of `batch_size`, in (0, inf); with `epochs` only.

    Returns:
      float64 of the broadcast shape, in (0, 1).

    Raises:
      TypeError: If an argument is not a number, none or several of `steps`, `tokens` and `epochs` are given, or one
        that they need is missing or would be ignored.
      ValueError: If a number is out of range.

    Reference:
      Marek et al., "Small batch size training for language models", 2025, arXiv:2507.07101, for half-lives in tokens.
    """
    given = {name: x for name, x in (("steps", steps), ("tokens", tokens), ("epochs", epochs)) if x is not None}
    if len(given) != 1:
        raise TypeError(f"one of steps, tokens and epochs must be given, got {' and '.join(given) or 'none'}")
    (name,) = given
    half_life = reals(name, given[name], "(0, inf)")
    half_life = half_life * _size("epoch_size", epoch_size, name, ("epochs",))
    half_life = half_life / _size("batch_size", batch_size, name, ("tokens", "epochs"))
    return (0.5 ** (1 / half_life))[()]


def _size(name: str, value: ArrayLike | None, unit: str, needed_by: tuple[str, ...]) -> np.ndarray:
    """A size that half-lives in some units need and in others would ignore; 1 where it is left out."""
    if (value is not None) != (unit in needed_by):
        word = "given" if unit in needed_by else "left out"
        raise TypeError(f"{name} must be {word} with {unit}, got {_checks.shown(value)}")
    return np.ones(()) if value is None else reals(name, value, "(0, inf)")


def decay_from_mean_lag(steps: ArrayLike) -> Floats:
    r"""The decay of a heavy ball or average whose gradients have a mean age of `steps` steps: $s/(1+s)$.

    Args:
      steps: s, in (0, inf); any shape.

    Returns:
      float64 of the shape of `steps`, in (0, 1).

    Raises:
      TypeError: If `steps` is not a number.
      ValueError: If it is out of range.
    """
    steps = reals("steps", steps, "(0, inf)")
    return (steps / (1 + steps))[()]


def decay_from_noise_gain(gain: ArrayLike) -> Floats:
    r"""The decay of an average that passes this fraction of the variance of gradient noise: $(1-g)/(1+g)$.

    A heavy ball at the same effective learning rate passes the same.

    Args:
      gain: g, in (0, 1); any shape.

    Returns:
      float64 of the shape of `gain`, in (0, 1).

    Raises:
      TypeError: If `gain` is not a number.
      ValueError: If it is out of range.
    """
    gain = reals("gain", gain, "(0, 1)")
    return ((1 - gain) / (1 + gain))[()]


def match_learning_rate(learning_rate: ArrayLike, old: Filter, new: Filter) -> Floats:
    r"""The learning rate at which `new` goes as far under a constant gradient as `old` at `learning_rate`.

    $\eta_\mathrm{new} = \eta\,H_\mathrm{old}(1)/H_\mathrm{new}(1)$: a tenth when heavy ball 0.9 becomes 0.99.

    Args:
      learning_rate: The learning rate of `old`, in [0, inf); any shape.
      old: A rule; its coefficients must be constant or periodic.
      new: Another.

    Returns:
      float64 of the shape of `learning_rate`.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a learning rate is out of range, a coefficient depends on the step, or the gain of a rule is 0 or
        infinite.
    """
    for name, rule in (("old", old), ("new", new)):
        if not isinstance(rule, Filter):
            raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    effective = analysis.effective_learning_rate(old, learning_rate)
    gains = {"old": analysis.dc_gain(old), "new": analysis.dc_gain(new)}
    for name, gain in gains.items():
        if gain == 0 or math.isinf(gain):
            raise ValueError(f"{name} must have a finite gain other than 0 at zero frequency, got {gain}")
    if gains["old"] * gains["new"] < 0:
        raise ValueError(f"old and new must have gains of one sign, got {gains['old']} and {gains['new']}")
    return effective / gains["new"]
