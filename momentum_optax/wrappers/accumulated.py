"""`accumulated`: micro-batches go straight into the velocity, without a buffer for their gradients."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import Leaves, absent
from .._typing import Count, Number, PyTree
from ..filters import Filter, velocity_only_readout
from ..filters.coefficients import Coefficient, PerLeafSchedule, Scalar, is_zero, value_at
from ..filters.step import relative_scales
from ..state.mismatch import check_kind
from ..storage import resolve
from ..storage._by_leaf import AnyStorage, ByLeaf, chooser_of
from ..transform import MomentumState, filter_transformation, scale_by_momentum
from .leaves import checked_transformation, where


@serializable
class AccumulatedState(NamedTuple):
    """State of `accumulated`.

    Attributes:
      mini_step: int32 scalar, the number of micro-batches of this cycle so far, as in `optax.MultiSteps`.
      gradient_step: int32 scalar, the number of cycles finished: the step that schedules read.
      momentum: The velocities, with the micro-gradients so far. Its `age` is, for each leaf, twice the number of cycles
        that the leaf has finished, plus 1 while it holds gradients of an unfinished cycle.
      rest: The state of `inner`.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    momentum: MomentumState
    rest: optax.OptState


def accumulated(
    rule: Filter,
    every_k: Scalar,
    inner: optax.GradientTransformation | None = None,
    *,
    storage: AnyStorage = "float32",
    debias: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""One step of the optimizer for every k micro-batches, like `optax.MultiSteps` but without its gradient buffer.

    $$ v \leftarrow A v + B g_1 / k, \qquad v \leftarrow v + B g_j / k \quad (j = 2, \ldots, k), \qquad u = p v $$

    After k micro-batches v is the rule's velocity for their mean gradient; before that the update is zero. Updates
    equal those of MultiSteps up to rounding, with a state smaller by 4 bytes per parameter:

        optax.MultiSteps(optax.chain(mo.scale_by_momentum(rule), inner), k)
        mo.accumulated(rule, k, inner)

    `inner`, the rest of the optimizer, updates its state with the last micro-batch only: learning rates, decoupled
    weight decay, signs, clipping of the update. Put transformations that are linear in the gradient before
    `accumulated`, such as `optax.add_decayed_weights` for coupled weight decay. Clipping the mean gradient needs the
    mean gradient, and so does a rule whose update is not a function of its new velocities: $C = p A$ and $D = p B$ must
    hold for numbers p, since there is no place for a (K+1)-th number per parameter. They hold for `heavy_ball` of every
    kind, `ema`, `chebyshev`, `complex_heavy_ball`; and with numbers as arguments for `aggregated` without a decay of 0.
    They do not hold for Nesterov's and other mixes with the raw gradient.

    A narrow storage rounds at every micro-batch, k times a step; stochastic rounding remains unbiased.

    A gradient of None leaves its leaf unchanged; a leaf that has received micro-gradients and gets None with the last
    one of a cycle moves with the last one of the next. `guarded(accumulated(...))` leaves out micro-batches that are
    not finite: the cycle then takes other micro-batches in their place.

    Args:
      rule: A `Filter` of the kind above.
      every_k: k, a whole number of at least 1, a scalar array (traced too) or a schedule of `gradient_step`. It must
        not change within a cycle.
      inner: The transformation that follows the rule in the chain; the identity if None.
      storage: The storage of the velocities, see `scale_by_momentum`.
      debias: As in `scale_by_momentum`.

    Returns:
      A transformation whose state is an `AccumulatedState`. Arithmetic is in float32 or wider whatever the gradients'
      dtype; updates have the dtypes of `inner`, by default the gradients'.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If `every_k` is below 1, the rule is not of that kind, or `scale_by_momentum` would refuse the others.

    Reference:
      Zhang et al., "Adam Accumulation to reduce memory footprints of both activations and gradients for large-scale
      DNN training", 2023, arXiv:2305.19982, for Adam, whose second moment then becomes a different one; here the
      result is the same. `optax.MultiSteps`.
    """
    scale_by_momentum(rule, storage=storage, debias=debias)  # checks the arguments
    if not _checks.is_schedule(every_k) and not _checks.is_scalar_array(every_k):
        _checks.integer("every_k", every_k, 1)
        every_k = int(cast(int, every_k))
    micro = _micro_steps(rule.pruned(), chooser_of(resolve(storage)), debias)
    return _accumulated(micro, every_k, checked_transformation("inner", optax.identity() if inner is None else inner))


def _accumulated(
    micro: "_MicroSteps", every_k: Scalar, rest: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """`accumulated` of checked arguments."""

    def init(params: optax.Params) -> AccumulatedState:
        zero = jnp.zeros([], jnp.int32)
        return AccumulatedState(zero, jnp.zeros([], jnp.int32), micro(zero, 1).init(params), rest.init(params))

    def update(
        updates: optax.Updates, state: AccumulatedState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, AccumulatedState]:
        check_kind(state, AccumulatedState)
        step, count = state.gradient_step, optax.safe_increment(state.mini_step)
        k = value_at(every_k, step)
        last = count >= k
        u, momentum = micro(step, k).update(updates, state.momentum)
        leaves = Leaves(updates)
        # Odd while a cycle is open.
        ages = zip(leaves.values, leaves.of(state.momentum.age), strict=True)
        age = [a if absent(g) else (a | 1) + last.astype(a.dtype) for g, a in ages]
        out, after = rest.update(u, state.rest, params, **extra)
        out = jax.tree.map(lambda x: jnp.where(last, x, jnp.zeros_like(x)), out)
        return out, AccumulatedState(
            jnp.where(last, 0, count),
            jnp.where(last, optax.safe_increment(step), step),
            momentum._replace(age=leaves.to_tree(age, momentum.age)),
            jax.tree.map(lambda old, new: where(last, new, old), state.rest, after),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def momentum_between_cycles(state: AccumulatedState) -> MomentumState:
    """The momentum of a state for an optimizer that makes a step of each gradient.

    Raises:
      ValueError: If a cycle is open.
    """
    if not isinstance(state.mini_step, jax.core.Tracer | jax.ShapeDtypeStruct) and int(state.mini_step):
        raise ValueError(
            f"opt_state must be at the end of a cycle of micro-batches, got {int(state.mini_step)} of them"
        )
    momentum = state.momentum
    return momentum._replace(step=state.gradient_step, age=jax.tree.map(lambda x: x >> 1, momentum.age))


def ages_between_cycles(age: PyTree) -> PyTree:
    """The ages in a state of `accumulated` of leaves that have received so many gradients, with no cycle open."""
    return jax.tree.map(lambda x: 2 * x, age)


# The transformation of one of k micro-gradients, from the step and k.
_MicroSteps: TypeAlias = Callable[[Count, Number], optax.GradientTransformationExtraArgs]


def _micro_steps(rule: Filter, storages: ByLeaf, debias: bool) -> _MicroSteps:
    """The micro-steps of a rule; raises unless its update is a function of its new velocities."""
    readout = velocity_only_readout(rule)
    if readout is None:
        raise ValueError(
            "rule must have an update that is known to be a function of its new velocities alone (C = p A and D = p B, "
            f"as heavy_ball and ema), got {_checks.shown(rule)}: its update needs the mean gradient itself; use "
            "optax.MultiSteps"
        )

    def micro(step: Count, k: Number) -> optax.GradientTransformationExtraArgs:
        def scales_at(_: Filter, __: Count | None, age: Count | None) -> tuple[Number, ...]:
            # Those of the rule: a storage must not see them change within a cycle.
            return relative_scales(rule.at(step, None if age is None else age >> 1))

        return filter_transformation(_micro_step(rule, readout, step, k), storages, debias, scales_at)

    return micro


def _micro_step(rule: Filter, readout: tuple[float, ...], step: Count, k: Number) -> Filter:
    """The rule for one of k micro-gradients: a filter that decays only where a leaf begins a cycle."""

    def decay(entry: Coefficient, within_cycle: float) -> Coefficient:
        if not is_zero(entry):
            return _by_age(lambda age: jnp.where(age & 1, within_cycle, value_at(entry, step, age >> 1)))
        return _by_age(lambda age: jnp.where(age & 1, within_cycle, 0.0)) if within_cycle else 0.0

    def share(entry: Coefficient) -> Coefficient:
        return 0.0 if is_zero(entry) else _by_age(lambda age: value_at(entry, step, age >> 1) / k)

    A = tuple(tuple(decay(a, float(i == j)) for j, a in enumerate(row)) for i, row in enumerate(rule.A))
    B = tuple(map(share, rule.B))
    return type(rule)(A, B, tuple(_mix(readout, column) for column in zip(*A, strict=True)), _mix(readout, B))


def _by_age(function: Callable[[Count], Number]) -> PerLeafSchedule:
    return PerLeafSchedule(lambda _, age: function(age))


def _mix(weights: tuple[float, ...], entries: tuple[Coefficient, ...]) -> Coefficient:
    """The weighted sum of coefficients; a single one of weight 1 is the coefficient itself, computed once."""
    terms = [(w, c) for w, c in zip(weights, entries, strict=True) if w and not is_zero(c)]
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    return _by_age(lambda age: sum(w * value_at(c, 0, age) for w, c in terms)) if terms else 0.0
