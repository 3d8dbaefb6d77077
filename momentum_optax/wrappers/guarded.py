"""`guarded`: steps with non-finite gradients are skipped, and with sudden large ones if asked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import Leaves, absent
from .._typing import Condition, Count, Entry, Number, PyTree
from ..state.mismatch import check_kind
from .leaves import (
    SCOPES,
    Scope,
    broadcast,
    check_scope,
    checked_transformation,
    counted,
    flags,
    select,
    where,
)
from .spikes import DEFAULTS, Limits, Spikes, all_of, checked_limits, judge_leaves, judge_tree, no_spikes


@serializable
class GuardedState(NamedTuple):
    """State of `guarded` without `max_ratio`.

    Attributes:
      inner: The state of the guarded transformation.
      skipped: int32: the number of steps skipped, a scalar; with `scope="leaf"` a tree with one entry for each leaf, of
        the leaf's rank and shape (1, ..., 1).
      finite: bool: whether the last gradients were finite, of the form of `skipped`.
    """

    inner: optax.OptState
    skipped: PyTree
    finite: PyTree


@serializable
class SpikeGuardedState(NamedTuple):
    """State of `guarded` with `max_ratio`: the fields of `GuardedState`, and `spikes`.

    Attributes:
      inner: The state of the guarded transformation.
      skipped: As in `GuardedState`, spikes included.
      finite: As in `GuardedState`; true of a spike.
      spikes: `Spikes`.
    """

    inner: optax.OptState
    skipped: PyTree
    finite: PyTree
    spikes: Spikes


def guarded(
    tx: optax.GradientTransformation,
    scope: Scope = "tree",
    *,
    max_ratio: Number | None = DEFAULTS.max_ratio,
    measure: str = DEFAULTS.measure,
    decay: Number = DEFAULTS.decay,
    warmup: Count = DEFAULTS.warmup,
    max_consecutive: Count = DEFAULTS.max_consecutive,
) -> optax.GradientTransformationExtraArgs:
    r"""Skip steps whose gradients hold NaN or infinity: the update is zero and the state is unchanged, to the bit.

    $$ (u, s') = \begin{cases} \mathrm{tx}(g, s) & \text{if every element of } g \text{ is finite} \\
       (0, s) & \text{otherwise} \end{cases} $$

    Old and new state are selected elementwise, without the branches of a `lax.cond`, so that it works under `vmap` and
    can be fused with the step. XLA's CPU backend still makes temporary copies of what the selection reads and replaces.
    Unlike `optax.apply_if_finite` it never accepts a non-finite step, however many occur in a row.

    Under float16 loss scaling, put it around the part of the chain that receives the unscaled gradients, and halve the
    scale where `finite` of the state is False: infinity divided by a finite scale is still infinite. Only the guarded
    transformation skips: around the whole optimizer that includes the weight decay and the learning-rate schedule.

    With `max_ratio` $\rho$ a spike is skipped too, before it enters the velocity, where a clipped one would remain for
    $1 / (1 - \mu)$ steps. With $n_t$ the norm of the gradient (or the loss) and $m_t$ its average over the steps
    that were taken,

    $$ \text{skip if } n_t > \rho\, m_t, \qquad
       w_{t+1} = \beta w_t + 1 - \beta, \quad m_{t+1} = m_t + \tfrac{1 - \beta}{w_{t+1}} (n_t - m_t)
       \quad \text{if not}, \qquad m_0 = w_0 = 0. $$

    Nothing is a spike while fewer than `warmup` steps are in the average or while it is 0. After `max_consecutive`
    consecutive spikes the next one counts as a change of level: its step is taken, and the average restarts from it.
    A step that is skipped for NaN neither ends such a sequence nor counts in it.

        tx = mo.guarded(mo.sgd(0.1, 0.9), max_ratio=10.0)
        u, state = tx.update(gradients, state)          # state.spikes.count says how many were skipped

    Args:
      tx: Any transformation, such as `scale_by_momentum(rule)` or a finished optimizer.
      scope: `"tree"`: one bad element anywhere skips the step, with every counter in the state. `"leaf"`: only the
        leaves that hold one skip it, as if their gradient were None; state that the leaves share, such as the step that
        schedules read or a norm over all of them, is updated, with zeros for their gradients. Each leaf has its own
        average size.
      max_ratio: rho, above 1: a number or a scalar array. With None no spike is skipped, and the state has no `spikes`.
      measure: `"norm"`: n is the norm of the gradient, taken in float32 or wider; one that overflows is a spike, and
        does not enter the average. `"value"`: n is the loss, given to `update` as `value=`, which must be positive to
        be compared; a step whose loss is not finite is skipped. For `scope="tree"` alone.
      decay: beta in [0, 1), of the average: a number or a scalar array.
      warmup: The number of steps in the average before one can be a spike: a whole number from 1 or a scalar array.
      max_consecutive: The most consecutive spikes that are skipped: a whole number from 1 or a scalar array.

    Returns:
      A transformation whose state is a `GuardedState`, with `inner`, `skipped` and `finite`. With `max_ratio` it is a
      `SpikeGuardedState`, which has `spikes` too: `count`, `consecutive`, `accepted`, `weight` and `mean`. A gradient
      of None counts as finite, and in no norm; a leaf of the state that `tx` replaces by None, as `optax.trace` does
      there, keeps its value.

    Raises:
      TypeError: If `tx` is not a transformation, or an argument has the wrong type; at `update` if `measure="value"`
        gets no `value`.
      ValueError: If there is no such scope or measure, a number is out of range, or another argument for spikes is
        given without `max_ratio`; with `scope="leaf"` at `update` if the state of `tx` has an array with axes that
        belongs to no single leaf, as after `optax.flatten`.

    Reference:
      Micikevicius et al., "Mixed precision training", ICLR 2018, arXiv:1710.03740: skipped steps under loss scaling.
      Chowdhery et al., "PaLM: scaling language modeling with Pathways", 2022, arXiv:2204.02311: batches around a spike
      of the loss are skipped, by hand. Kumar et al., "ZClip: adaptive spike mitigation for LLM pre-training", 2025,
      arXiv:2504.02507: a gradient's norm against running statistics of the norms before it; it clips by the deviation.
    """
    run = checked_transformation("tx", tx)
    _checks.choice("scope", scope, SCOPES)
    return _guarded(run, scope, checked_limits(Limits(max_ratio, measure, decay, warmup, max_consecutive), scope))


def _guarded(
    tx: optax.GradientTransformationExtraArgs, scope: Scope, limits: Limits | None
) -> optax.GradientTransformationExtraArgs:
    """`guarded` of checked arguments."""

    def init(params: optax.Params) -> GuardedState | SpikeGuardedState:
        state = GuardedState(tx.init(params), flags(scope, params, 0, jnp.int32), flags(scope, params, True, jnp.bool_))
        return state if limits is None else SpikeGuardedState(*state, no_spikes(scope, params))

    def update(
        updates: optax.Updates,
        state: GuardedState | SpikeGuardedState,
        params: optax.Params | None = None,
        **extra: PyTree,
    ) -> tuple[optax.Updates, GuardedState | SpikeGuardedState]:
        check_kind(state, GuardedState if limits is None else SpikeGuardedState)
        leaves = Leaves(updates)
        check_scope(scope, state.skipped, updates)
        each, news = _judged(scope, limits, leaves, state, extra.get("value"))
        shared = all_of(each) if scope == "tree" or len(each) == 1 else True
        if scope == "leaf":
            updates = leaves.to_tree(_zero_unless(each, leaves.values), updates)
        out, inner = tx.update(updates, state.inner, params, **extra)
        kept = select(leaves, each, shared, inner, state.inner)
        out = leaves.to_tree(_zero_unless(each, leaves.of(out)), out)
        taken = shared if scope == "tree" else broadcast(leaves, each, state.finite)
        skipped = jax.tree.map(lambda n, ok: counted(n, ~ok), state.skipped, taken)
        return out, state._replace(inner=kept, skipped=skipped, **news)

    return optax.GradientTransformationExtraArgs(init, update)


def _judged(
    scope: Scope,
    limits: Limits | None,
    leaves: Leaves,
    state: GuardedState | SpikeGuardedState,
    value: Number | None,
) -> tuple[list[Condition], dict[str, PyTree]]:
    """Whether each leaf takes the step, and the new fields `finite` and `spikes` of the state."""
    finite: list[Condition] = [True if absent(g) else jnp.all(jnp.isfinite(g)) for g in leaves.values]
    whole = all_of(finite)
    news: dict[str, PyTree] = {"finite": whole if scope == "tree" else broadcast(leaves, finite, state.finite)}
    if limits is None or not isinstance(state, SpikeGuardedState):
        return ([whole] * len(finite) if scope == "tree" else finite), news
    if scope == "tree":
        each, news["spikes"] = judge_tree(limits, leaves, finite, state.spikes, value)
    else:
        each, news["spikes"] = judge_leaves(limits, leaves, finite, state.spikes)
    return each, news


def _zero_unless(each: list[Condition], leaves: list[Entry]) -> list[Entry]:
    """The leaves, zero where their conditions are false; absent ones stay absent."""
    return [
        x if absent(x) else where(ok, jnp.asarray(x), jnp.zeros_like(x)) for ok, x in zip(each, leaves, strict=True)
    ]
