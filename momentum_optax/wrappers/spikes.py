"""Spikes, sudden large gradients, for `guarded`: their limits, their record and the judgement of a step."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import Leaves, absent
from .._typing import Condition, Count, DType, Leaf, Number, PyTree
from ..storage.protocol import arithmetic_dtype
from .leaves import Scope, counted, flags, one_per_leaf, scalar_loss, squared_norm


@serializable
class Spikes(NamedTuple):
    """The record that `guarded` keeps of the size of gradients. Each field has the form of `GuardedState.skipped`.

    Attributes:
      count: int32: the number of steps skipped as spikes.
      consecutive: int32: the number of them since a step was last taken.
      accepted: int32: the number of steps in the average.
      weight: float32, or float64 for leaves of that: the sum of the weights in the average, for its debiasing.
      mean: Of the dtype of `weight`: the debiased average size of the steps taken.
    """

    count: PyTree
    consecutive: PyTree
    accepted: PyTree
    weight: PyTree
    mean: PyTree


@dataclasses.dataclass(frozen=True)
class Limits:
    """The arguments of `guarded` that concern spikes."""

    max_ratio: Number | None
    measure: str
    decay: Number
    warmup: Count
    max_consecutive: Count


DEFAULTS = Limits(None, "norm", 0.99, 20, 5)


def checked_limits(limits: Limits, scope: Scope) -> Limits | None:
    """The arguments, checked; None unless spikes are to be skipped.

    Raises:
      TypeError: If one has the wrong type.
      ValueError: If one is out of range, or given without `max_ratio`.
    """
    _checks.choice("measure", limits.measure, ("norm", "value") if scope == "tree" else ("norm",))
    if limits.max_ratio is not None:
        _checks.constant("max_ratio", limits.max_ratio, "(1, inf)")
    _checks.constant("decay", limits.decay, "[0, 1)")
    for name in ("warmup", "max_consecutive"):
        if not _checks.is_scalar_array(getattr(limits, name)):
            _checks.integer(name, getattr(limits, name), 1)
    if limits.max_ratio is not None:
        return limits
    # Arrays are not compared: `inject_hyperparams` makes them of the defaults too.
    given = [
        name
        for name, value in vars(limits).items()
        if not _checks.is_scalar_array(value) and value != getattr(DEFAULTS, name)
    ]
    if given:
        raise ValueError(
            f"max_ratio must be given with {', '.join(given)}, since without it no spike is skipped; got None"
        )
    return None


def no_spikes(scope: Scope, params: optax.Params) -> Spikes:
    """The record before the first step."""
    counts = (flags(scope, params, 0, jnp.int32) for _ in range(3))
    if scope == "leaf":
        sizes = (one_per_leaf(params, lambda leaf: jnp.zeros((1,) * jnp.ndim(leaf), _real(leaf))) for _ in range(2))
    else:
        sizes = (jnp.zeros([], _real(*jax.tree.leaves(params))) for _ in range(2))
    return Spikes(*counts, *sizes)


def _real(*leaves: Leaf) -> DType:
    """The dtype of norms over these leaves."""
    dtypes = (x.dtype if hasattr(x, "dtype") else jnp.result_type(x) for x in leaves)
    return jnp.finfo(arithmetic_dtype(*dtypes)).dtype


def judge_tree(
    limits: Limits, leaves: Leaves, finite: list[Condition], spikes: Spikes, value: Number | None
) -> tuple[list[Condition], Spikes]:
    """Whether each leaf takes the step, all of them or none of them, and the new record; `value` is the loss."""
    if all(absent(g) for g in leaves.values):
        return finite, spikes
    if limits.measure == "norm":
        size = jnp.sqrt(squared_norm(leaves.values, spikes.mean.dtype))
        sound = all_of(finite)
    else:
        size = scalar_loss(value, "measure 'value'", spikes.mean.dtype)
        sound = all_of([*finite, jnp.isfinite(size)])
    taken, spikes = _judged(limits, size, sound, spikes)
    return [taken] * len(finite), spikes


def judge_leaves(
    limits: Limits, leaves: Leaves, finite: list[Condition], spikes: Spikes
) -> tuple[list[Condition], Spikes]:
    """Whether each leaf takes the step, by the size of its own gradient, and the new record."""
    records = [Spikes(*row) for row in zip(*map(leaves.of, spikes), strict=True)]
    each = list(finite)
    for i, (g, record) in enumerate(zip(leaves.values, records, strict=True)):
        if not absent(g):
            flat = jax.tree.map(lambda x: x.reshape(()), record)
            each[i], new = _judged(limits, jnp.sqrt(squared_norm([g], flat.mean.dtype)), finite[i], flat)
            records[i] = jax.tree.map(lambda x, old: x.reshape(old.shape), new, record)
    columns = zip(*records, strict=True)
    return each, Spikes(*(leaves.to_tree(list(column), old) for column, old in zip(columns, spikes, strict=True)))


def _judged(limits: Limits, size: jax.Array, finite: Condition, old: Spikes) -> tuple[jax.Array, Spikes]:
    """Whether a step of that size is taken, and the record after it; all scalars."""
    real = old.mean.dtype
    ratio, decay = (jnp.asarray(x, real) for x in (limits.max_ratio, limits.decay))
    warmup, most = (jnp.asarray(x, jnp.int32) for x in (limits.warmup, limits.max_consecutive))
    compared = (old.accepted >= warmup) & (old.mean > 0)
    # Negated, so that a size that is not finite is a spike.
    spike = finite & compared & ~(size <= ratio * old.mean)
    new_level = spike & (old.consecutive >= most)
    skip = spike & ~new_level
    taken = finite & ~skip
    enters = taken & jnp.isfinite(size)
    weight = decay * jnp.where(new_level, 0, old.weight) + (1 - decay)
    mean = jnp.where(new_level, size, old.mean + (1 - decay) / weight * (size - old.mean))
    return taken, Spikes(
        count=counted(old.count, skip),
        consecutive=jnp.where(taken, 0, counted(old.consecutive, skip)),
        accepted=jnp.where(enters, optax.safe_increment(jnp.where(new_level, 0, old.accepted)), old.accepted),
        weight=jnp.where(enters, weight, old.weight),
        mean=jnp.where(enters, mean, old.mean),
    )


def all_of(conditions: list[Condition]) -> jax.Array:
    """Whether all conditions hold."""
    return jnp.all(jnp.array(conditions, jnp.bool_))
