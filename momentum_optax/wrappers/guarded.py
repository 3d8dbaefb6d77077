"""`guarded`: steps with non-finite gradients are skipped, and with sudden large ones if asked."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import absent
from ..state.mismatch import check_kind
from ..storage.protocol import arithmetic_dtype
from .leaves import SCOPES, Leaves, check_scope, checked_transformation, counted, flags, squared_norm, where


@serializable
class GuardedState(NamedTuple):
    """State of `guarded` without `max_ratio`.

    Attributes:
      inner: The state of the guarded transformation.
      skipped: int32: the number of steps skipped, a scalar; with `scope="leaf"` a tree with one entry for each leaf, of
        the leaf's rank and shape (1, ..., 1).
      finite: bool: whether the last gradients were finite, of the form of `skipped`.
    """

    inner: Any
    skipped: Any
    finite: Any


@serializable
class Spikes(NamedTuple):
    """What `guarded` knows about the size of gradients. Each field has the form of `GuardedState.skipped`.

    Attributes:
      count: int32: the number of steps skipped as spikes.
      consecutive: int32: how many of them since a step was last taken.
      accepted: int32: the number of steps in the average.
      weight: float32, or float64 for leaves of that: the sum of the weights in the average, for its debiasing.
      mean: Of the dtype of `weight`: the debiased average size of the steps taken.
    """

    count: Any
    consecutive: Any
    accepted: Any
    weight: Any
    mean: Any


@serializable
class SpikeGuardedState(NamedTuple):
    """State of `guarded` with `max_ratio`: the fields of `GuardedState`, and `spikes`.

    Attributes:
      inner: The state of the guarded transformation.
      skipped: As in `GuardedState`, spikes included.
      finite: As in `GuardedState`; true of a spike.
      spikes: `Spikes`.
    """

    inner: Any
    skipped: Any
    finite: Any
    spikes: Spikes


class _Limits(NamedTuple):
    """The arguments of `guarded` that concern spikes."""

    max_ratio: Any
    measure: str
    decay: Any
    warmup: Any
    max_consecutive: Any


_DEFAULTS = _Limits(None, "norm", 0.99, 20, 5)


def guarded(
    tx: optax.GradientTransformation,
    scope: str = "tree",
    *,
    max_ratio: Any = _DEFAULTS.max_ratio,
    measure: str = _DEFAULTS.measure,
    decay: Any = _DEFAULTS.decay,
    warmup: Any = _DEFAULTS.warmup,
    max_consecutive: Any = _DEFAULTS.max_consecutive,
) -> optax.GradientTransformationExtraArgs:
    r"""Skip steps whose gradients hold NaN or infinity: the update is zero and the state stays as it was, to the bit.

    $$ (u, s') = \begin{cases} \mathrm{tx}(g, s) & \text{if every element of } g \text{ is finite} \\
       (0, s) & \text{otherwise} \end{cases} $$

    Old and new state are selected elementwise, without the branches of a `lax.cond`, so that it works under `vmap` and
    can be fused with the step. XLA's CPU backend still makes temporary copies of what the selection reads and replaces.
    Unlike `optax.apply_if_finite` it never gives up on NaN.

    Under float16 loss scaling, guard what receives the unscaled gradients, and halve the scale where `finite` of the
    state is False: a division by a finite scale leaves infinity infinite. Only what is inside skips: around the whole
    optimizer also the weight decay and the learning-rate schedule stand still.

    With `max_ratio` $\rho$ a spike is skipped likewise, before it enters the velocity, where a clipped one would stay
    for $1 / (1 - \mu)$ steps. With $n_t$ the norm of the gradient (or the loss) and $m_t$ its average over the steps
    that were taken,

    $$ \text{skip if } n_t > \rho\, m_t, \qquad
       w_{t+1} = \beta w_t + 1 - \beta, \quad m_{t+1} = m_t + \tfrac{1 - \beta}{w_{t+1}} (n_t - m_t)
       \quad \text{if not}, \qquad m_0 = w_0 = 0. $$

    Nothing is a spike while fewer than `warmup` steps are in the average or while it is 0. After `max_consecutive`
    spikes in a row the next one is taken for a change of level: its step is made, and the average begins anew with it.
    A step that is skipped for NaN neither ends such a row nor counts in it.

        tx = mo.guarded(mo.sgd(0.1, 0.9), max_ratio=10.0)
        u, state = tx.update(gradients, state)          # state.spikes.count says how many were skipped

    Args:
      tx: Any transformation, such as `scale_by_momentum(rule)` or a finished optimizer.
      scope: `"tree"`: one bad element anywhere skips the step, with every counter in the state. `"leaf"`: only the
        leaves that hold one skip it, as if their gradient were None; what the leaves share, such as the step that
        schedules read or a norm over all of them, goes on, with zeros for their gradients. Each leaf has its own
        average size.
      max_ratio: rho, above 1: a number or a scalar array. None skips no spikes, and the state has no place for them.
      measure: `"norm"`: n is the norm of the gradient, taken in float32 or wider; one that overflows is a spike, and
        does not enter the average. `"value"`: n is the loss, given to `update` as `value=`, which must be positive to
        be compared; a step whose loss is not finite is skipped. For `scope="tree"` alone.
      decay: beta in [0, 1), of the average: a number or a scalar array.
      warmup: How many steps must be in the average before one can be a spike: a whole number from 1 or a scalar array.
      max_consecutive: How many spikes in a row are skipped at most: a whole number from 1 or a scalar array.

    Returns:
      A transformation whose state is a `GuardedState`, with `inner`, `skipped` and `finite`. With `max_ratio` it is a
      `SpikeGuardedState`, which has `spikes` too: `count`, `consecutive`, `accepted`, `weight` and `mean`. A gradient
      of None counts as finite, and in no norm.

    Raises:
      TypeError: If `tx` is no transformation, or an argument has the wrong type; at `update` if `measure="value"` gets
        no `value`.
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
    limits = _checked(_Limits(max_ratio, measure, decay, warmup, max_consecutive), scope)

    def init(params: optax.Params) -> Any:
        state = GuardedState(tx.init(params), flags(scope, params, 0, jnp.int32), flags(scope, params, True, jnp.bool_))
        return state if limits is None else SpikeGuardedState(*state, _no_spikes(scope, params))

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> tuple[optax.Updates, Any]:
        check_kind(state, GuardedState if limits is None else SpikeGuardedState)
        leaves = Leaves(updates)
        check_scope(scope, state.skipped, leaves)
        each = [True if absent(g) else jnp.all(jnp.isfinite(g)) for g in leaves.values]
        whole = _all(each)
        finite = whole if scope == "tree" else leaves.spread(each, state.finite)
        known: dict[str, Any] = {"finite": finite}
        if limits is not None:
            judge = _tree_judged if scope == "tree" else _leaves_judged
            each, known["spikes"] = judge(limits, leaves, each, state.spikes, extra.get("value"))
        elif scope == "tree":
            each = [whole] * len(each)
        shared = _all(each) if scope == "tree" or len(each) == 1 else True
        if scope == "leaf":
            updates = leaves.treedef.unflatten(
                [
                    g if absent(g) else where(ok, jnp.asarray(g), jnp.zeros_like(g))
                    for ok, g in zip(each, leaves.values, strict=True)
                ]
            )
        out, inner = run.update(updates, state.inner, params, **extra)
        kept = leaves.select(each, shared, inner, state.inner)
        pairs = zip(each, leaves.of(out), strict=True)
        out = leaves.joined([u if absent(u) else where(ok, u, jnp.zeros_like(u)) for ok, u in pairs], out)
        taken = shared if scope == "tree" else leaves.spread(each, state.finite)
        skipped = jax.tree.map(lambda n, ok: counted(n, ~ok), state.skipped, taken)
        return out, state._replace(inner=kept, skipped=skipped, **known)

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(limits: _Limits, scope: str) -> _Limits | None:
    """The arguments for spikes if spikes are to be skipped."""
    _checks.choice("measure", limits.measure, ("norm", "value") if scope == "tree" else ("norm",))
    for name, interval in (("max_ratio", "(1, inf)"), ("decay", "[0, 1)")):
        value = getattr(limits, name)
        if not _checks.is_scalar_array(value) and not (name == "max_ratio" and value is None):
            _checks.number(name, value, interval)
    for name in ("warmup", "max_consecutive"):
        if not _checks.is_scalar_array(getattr(limits, name)):
            _checks.integer(name, getattr(limits, name), 1)
    if limits.max_ratio is not None:
        return limits
    # Arrays are not compared: `inject_hyperparams` makes them of the defaults too.
    given = [
        name
        for name, value, default in zip(limits._fields, limits, _DEFAULTS, strict=True)
        if not _checks.is_scalar_array(value) and value != default
    ]
    if given:
        raise ValueError(
            f"max_ratio must be given with {', '.join(given)}, since without it no spike is skipped; got None"
        )
    return None


def _no_spikes(scope: str, params: Any) -> Spikes:
    counts = (flags(scope, params, 0, jnp.int32) for _ in range(3))
    if scope == "leaf":
        sizes = (jax.tree.map(lambda x: jnp.zeros((1,) * jnp.ndim(x), _real(x)), params) for _ in range(2))
    else:
        sizes = (jnp.zeros([], _real(*jax.tree.leaves(params))) for _ in range(2))
    return Spikes(*counts, *sizes)


def _real(*leaves: Any) -> Any:
    """The dtype of norms over these leaves."""
    return jnp.finfo(arithmetic_dtype(*(x.dtype if hasattr(x, "dtype") else jnp.result_type(x) for x in leaves))).dtype


def _tree_judged(
    limits: _Limits, leaves: Leaves, finite: list[Any], spikes: Spikes, value: Any
) -> tuple[list[Any], Spikes]:
    """Whether each leaf takes the step, all of them or none."""
    if all(absent(g) for g in leaves.values):
        return finite, spikes
    if limits.measure == "norm":
        size = jnp.sqrt(squared_norm(leaves.values, spikes.mean.dtype))
        sound = _all(finite)
    else:
        if value is None:
            raise TypeError("value must be the loss, a scalar given to update for measure 'value', got None")
        if jnp.shape(value) != ():
            raise ValueError(f"value must be a scalar, got shape {jnp.shape(value)}")
        size = jnp.asarray(value, spikes.mean.dtype)
        sound = _all([*finite, jnp.isfinite(size)])
    taken, spikes = _judged(limits, size, sound, spikes)
    return [taken] * len(finite), spikes


def _leaves_judged(
    limits: _Limits, leaves: Leaves, finite: list[Any], spikes: Spikes, value: Any
) -> tuple[list[Any], Spikes]:
    """Whether each leaf takes the step, by its own size."""
    del value
    slots = [Spikes(*row) for row in zip(*map(leaves.of, spikes), strict=True)]
    each = list(finite)
    for i, (g, slot) in enumerate(zip(leaves.values, slots, strict=True)):
        if not absent(g):
            flat = jax.tree.map(lambda x: x.reshape(()), slot)
            each[i], new = _judged(limits, jnp.sqrt(squared_norm([g], flat.mean.dtype)), finite[i], flat)
            slots[i] = jax.tree.map(lambda x, old: x.reshape(old.shape), new, slot)
    return each, Spikes(*(leaves.treedef.unflatten(column) for column in zip(*slots, strict=True)))


def _judged(limits: _Limits, size: Any, finite: Any, old: Spikes) -> tuple[Any, Spikes]:
    """Whether a step of that size is taken, and what is known after it; all scalars."""
    real = old.mean.dtype
    ratio, decay = (jnp.asarray(x, real) for x in (limits.max_ratio, limits.decay))
    warmup, most = (jnp.asarray(x, jnp.int32) for x in (limits.warmup, limits.max_consecutive))
    compared = (old.accepted >= warmup) & (old.mean > 0)
    # Said so that a size that is not finite is a spike.
    spike = finite & compared & ~(size <= ratio * old.mean)
    anew = spike & (old.consecutive >= most)
    skip = spike & ~anew
    taken = finite & ~skip
    enters = taken & jnp.isfinite(size)
    weight = decay * jnp.where(anew, 0, old.weight) + (1 - decay)
    mean = jnp.where(anew, size, old.mean + (1 - decay) / weight * (size - old.mean))
    return taken, Spikes(
        count=counted(old.count, skip),
        consecutive=jnp.where(taken, 0, counted(old.consecutive, skip)),
        accepted=jnp.where(enters, optax.safe_increment(jnp.where(anew, 0, old.accepted)), old.accepted),
        weight=jnp.where(enters, weight, old.weight),
        mean=jnp.where(enters, mean, old.mean),
    )


def _all(conditions: list[Any]) -> jax.Array:
    return jnp.all(jnp.array(conditions, jnp.bool_))
