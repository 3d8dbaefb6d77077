"""`accumulated`: micro-batches go straight into the velocity, without a buffer for their gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import absent
from ..filters import Filter, velocity_only_readout
from ..filters.coefficients import PerLeafSchedule, is_zero, value_at
from ..state.mismatch import check_kind
from ..storage import Storage, resolve
from ..transform import MomentumState, filter_transformation, relative_scales, scale_by_momentum
from .leaves import Leaves, checked_transformation, where


@serializable
class AccumulatedState(NamedTuple):
    """State of `accumulated`.

    Attributes:
      mini_step: int32 scalar, the number of micro-batches of this cycle so far, as in `optax.MultiSteps`.
      gradient_step: int32 scalar, the number of cycles finished: the step that schedules read.
      momentum: The velocities, with what has come in so far. Its `age` is, for each leaf, twice the number of cycles
        that the leaf has finished, plus 1 while it holds gradients of a cycle that it has not.
      rest: The state of `then`.
    """

    mini_step: Any
    gradient_step: Any
    momentum: MomentumState
    rest: Any


def accumulated(
    rule: Filter,
    every: Any,
    then: optax.GradientTransformation | None = None,
    *,
    storage: str | Storage = "float32",
    debias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""One step of the optimizer for every k micro-batches, as `optax.MultiSteps`, without its buffer of gradients.

    $$ v \leftarrow A v + B g_1 / k, \qquad v \leftarrow v + B g_j / k \quad (j = 2, \ldots, k), \qquad u = p v $$

    After k micro-batches v is what the rule makes of their mean gradient; up to then the update is zero. The same
    numbers as of MultiSteps to rounding, with a state smaller by 4 bytes per parameter:

        optax.MultiSteps(optax.chain(mo.scale_by_momentum(rule), rest), k)
        mo.accumulated(rule, k, rest)

    `then`, the rest of the optimizer, moves its counters with the last micro-batch only: learning rates, decoupled
    weight decay, signs, clipping of the update. In a chain before `accumulated` stands what may see each micro-batch on
    its own, being linear in the gradient: `optax.add_decayed_weights` for coupled weight decay. Clipping the mean
    gradient needs the mean gradient, and so does a rule whose update is no function of its new velocities:
    $C = p A$ and $D = p B$ must hold for numbers p, since there is no place for a (K+1)-th number per parameter. These
    rules do: `heavy_ball` of every kind, `ema`, `chebyshev`, `complex_heavy_ball`; and with numbers as arguments
    `aggregated` without a decay of 0. Nesterov's and other mixes with the raw gradient do not.

    A narrow storage rounds at every micro-batch, k times for a step; stochastic rounding stays without bias.

    A gradient of None leaves its leaf as it is; a leaf that has taken micro-gradients and gets None with the last one
    of a cycle moves with the last one of the next. Put `guarded` around to leave out micro-batches that are not finite:
    a cycle then waits for as many others.

    Args:
      rule: A `Filter` of the kind above.
      every: k, a whole number of at least 1, a scalar array (traced too) or a schedule of `gradient_step`. It must not
        change within a cycle.
      then: What follows the rule in the chain; nothing if None.
      storage: How velocities are kept, see `scale_by_momentum`.
      debias: As in `scale_by_momentum`.

    Returns:
      A transformation whose state is an `AccumulatedState`. Arithmetic is in float32 or wider whatever the gradients'
      dtype; updates have the dtypes of `then`, by default the gradients'.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If `every` is below 1, the rule is not of that kind, or `scale_by_momentum` would refuse the others.

    Reference:
      Zhang et al., "Adam Accumulation to reduce memory footprints of both activations and gradients for large-scale
      DNN training", 2023, arXiv:2305.19982, for Adam, whose second moment it makes another one; here the result is the
      same. `optax.MultiSteps`.
    """
    scale_by_momentum(rule, storage=storage, debias=debias)  # checks the arguments
    if not _checks.is_schedule(every) and not _checks.is_scalar_array(every):
        _checks.integer("every", every, 1)
    rule, keep = rule.pruned(), resolve(storage)
    readout = velocity_only_readout(rule)
    if readout is None:
        raise ValueError(
            "rule must have an update that is known to be a function of its new velocities alone (C = p A and D = p B, "
            f"as heavy_ball and ema), got {_checks.shown(rule)}: its update needs the mean gradient itself; use "
            "optax.MultiSteps"
        )
    run = checked_transformation("then", optax.identity() if then is None else then)

    def micro(step: Any, k: Any) -> optax.GradientTransformationExtraArgs:
        def scales_at(_: Filter, __: Any, age: Any) -> tuple[Any, ...]:
            # Those of the rule: a storage must not see them change within a cycle.
            return relative_scales(rule.at(step, age >> 1))

        return filter_transformation(_micro_step(rule, readout, step, k), keep, debias, scales_at)

    def init(params: optax.Params) -> AccumulatedState:
        zero = jnp.zeros([], jnp.int32)
        return AccumulatedState(zero, jnp.zeros([], jnp.int32), micro(zero, 1).init(params), run.init(params))

    def update(
        updates: optax.Updates, state: AccumulatedState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, AccumulatedState]:
        check_kind(state, AccumulatedState)
        step, count = state.gradient_step, optax.safe_increment(state.mini_step)
        k = value_at(every, step)
        last = count >= k
        u, momentum = micro(step, k).update(updates, state.momentum)
        leaves = Leaves(updates)
        # Odd while a cycle is open.
        ages = zip(leaves.values, leaves.of(state.momentum.age), strict=True)
        age = [a if absent(g) else (a | 1) + last.astype(a.dtype) for g, a in ages]
        out, rest = run.update(u, state.rest, params, **extra)
        out = jax.tree.map(lambda x: jnp.where(last, x, jnp.zeros_like(x)), out)
        rest = jax.tree.map(lambda new, old: where(last, new, old), rest, state.rest)
        return out, AccumulatedState(
            jnp.where(last, 0, count),
            jnp.where(last, optax.safe_increment(step), step),
            momentum._replace(age=leaves.joined(age, momentum.age)),
            rest,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _micro_step(rule: Filter, readout: tuple[float, ...], step: Any, k: Any) -> Filter:
    """What a rule does with one of k micro-gradients: a filter that decays only where a leaf begins a cycle."""

    def now(entry: Any, still: float | None, divisor: Any) -> Any:
        if is_zero(entry):
            return 0.0 if not still else _by_age(lambda age: jnp.where(age & 1, still, 0.0))
        if still is None:
            return _by_age(lambda age: value_at(entry, step, age >> 1) / divisor)
        return _by_age(lambda age: jnp.where(age & 1, still, value_at(entry, step, age >> 1)))

    A = tuple(tuple(now(a, float(i == j), 1) for j, a in enumerate(row)) for i, row in enumerate(rule.A))
    B = tuple(now(b, None, k) for b in rule.B)
    return Filter(A, B, tuple(_mix(readout, column) for column in zip(*A, strict=True)), _mix(readout, B))


def _by_age(function: Callable[[Any], Any]) -> PerLeafSchedule:
    return PerLeafSchedule(lambda _, age: function(age))


def _mix(weights: tuple[float, ...], entries: tuple[Any, ...]) -> Any:
    """The weighted sum of coefficients; a single one of weight 1 is the coefficient itself, computed once."""
    terms = [(w, c) for w, c in zip(weights, entries, strict=True) if w and not is_zero(c)]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    return _by_age(lambda age: sum(w * value_at(c, 0, age) for w, c in terms)) if terms else 0.0
