"""`scale_by_momentum`: any rule as an Optax transformation. The one place with trees, dtypes, counters and storage."""

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._tree import boxes_of, in_box, matched, path_name, reboxed, to_slots, to_trees, unboxed
from .filters import Filter, post_write_form
from .filters.coefficients import is_zero, value_at
from .filters.fingerprints import note
from .state.mismatch import check_state
from .storage import Storage, resolve
from .storage.protocol import SUPPORTED, arithmetic_dtype, is_signed, unsupported, write_for


class MomentumState(NamedTuple):
    """State of `scale_by_momentum`. What a rule does not need is None and costs nothing.

    Attributes:
      velocity: The stored velocities, a NamedTuple of the storage's parts, each a tuple with one tree per velocity.
      step: int32 scalar, the number of updates made; only if a coefficient is scheduled or the storage is stochastic.
      age: A tree of int32: the number of gradients that each leaf received; only if a coefficient depends on it.
      gain: A tuple with one tree per velocity: the velocities of a gradient that is always 1; only with `debias=True`.

    Entries of `age` and `gain` have the leaf's rank and shape (1, ..., 1): a sharding of the leaf fits them once the
    axes that it splits are left out. For parameters in boxes of Flax, arrays of the leaf's shape are in its
    box, and shorter ones in a box that names the axes that they have in full, or in none.
    """

    velocity: Any
    step: Any
    age: Any
    gain: Any


def scale_by_momentum(
    rule: Filter, *, storage: str | Storage = "float32", debias: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Run a momentum rule over a tree of gradients: $u_t = C v_t + D g_t$, then $v_{t+1} = A v_t + B g_t$.

    The update is not multiplied by a learning rate and not negated. In the usual chain the learning rate follows,

        optax.chain(mo.scale_by_momentum(mo.nesterov(0.9)), optax.scale_by_learning_rate(rate))

    and meets the whole velocity when it changes. Placed before, `chain(scale_by_learning_rate(rate),
    scale_by_momentum(rule))`, each gradient keeps the rate of its own step, as in Keras; methods written as two
    sequences are exact under a learning-rate schedule only in that order. At a constant rate both are the same.

    Types: arithmetic runs in float32, or in the widest of gradient and velocity where that is float64 or complex. The
    update has the gradient's dtype; the state keeps the dtypes of `init`. A Python number in a coefficient is never
    rounded to the parameters' dtype.

    Trees: a gradient of None leaves that leaf's velocity as it is and gives an update of None (`apply_updates` skips
    it). A non-finite gradient makes the velocity of its elements non-finite for good, as in Optax; put `guarded` around
    the optimizer to skip such steps.

    Args:
      rule: A `Filter`, e.g. from the functions in `rules`.
      storage: How velocities are kept: "float32", "bfloat16", "int8", "int4" or an object of `momentum_optax.storage`.
      debias: Divide each update by what a constant gradient of 1 would have given, so that early updates are an
        average of the gradients so far. Adam's correction, and exact under every schedule, per leaf.

    Returns:
      A transformation; `init(params)` takes arrays or `ShapeDtypeStruct`, and the state is a `MomentumState`.

    Raises:
      TypeError: If an argument has the wrong type; at `init` if a leaf is not of a float or complex dtype; at `update`
        if a real leaf gets a complex gradient or the reverse.
      StateMismatchError: At `update`, a `ValueError`, if the state is of an optimizer with another storage, number of
        velocities, schedule, first step or debiasing: with the call that converts it, see `convert`.
      ValueError: If there is no such storage, it is for squares only, or `debias` is asked of a rule whose response to
        a constant can vanish or change sign; at `update` if the gradients' tree or shapes are not those of `init`.

    Reference:
      The state-space form of Lessard, Recht and Packard, 2016, arXiv:1408.3595; debiasing after Kingma and Ba,
      ICLR 2015, arXiv:1412.6980.
    """
    if not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    _checks.flag("debias", debias)
    keep = resolve(storage)
    if not is_signed(keep):
        raise ValueError(f"storage must keep values of either sign, got {keep!r}, which is for second moments")
    rule = rule.pruned()
    _warn_of_noise(rule, keep)
    if debias:
        _check_debiasable(rule)
    return run_filter(rule, keep, debias, lambda step, age: gains_of(rule.at(step, age)))


def run_filter(
    rule: Filter, keep: Storage, debias: bool, gains_at: Callable[[Any, Any], tuple[Any, ...]]
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_momentum` of checked arguments; `gains_at(step, age)` says how large the velocities become."""

    def fresh(leaf: Any) -> MomentumState:
        """The state of one leaf: a `MomentumState` with arrays in place of trees."""
        ones = (1,) * len(leaf.shape)
        real = jnp.finfo(arithmetic_dtype(leaf.dtype)).dtype
        return MomentumState(
            velocity=keep.init(leaf, rule.order),
            step=None,
            age=jnp.zeros(ones, jnp.int32) if rule.reads_age else None,
            gain=tuple(jnp.zeros(ones, real) for _ in range(rule.order)) if debias else None,
        )

    one: Any = jax.eval_shape(fresh, jax.ShapeDtypeStruct((), jnp.float32))
    layout: Any = jax.tree.structure(one)
    expected = one._replace(step=0 if rule.reads_step or keep.reads_step else None)

    def init(params: optax.Params) -> MomentumState:
        note(rule)
        pairs, treedef = jax.tree_util.tree_flatten_with_path(unboxed(params))
        leaves = zip(pairs, boxes_of(params), strict=True)
        slots = [in_box(box, fresh(_checked_leaf(path, x))) for (path, x), box in leaves]
        step = jnp.zeros([], jnp.int32) if rule.reads_step or keep.reads_step else None
        state: MomentumState = to_trees(slots, treedef, layout)._replace(step=step)
        return state

    def resolved(step: Any, age: Any) -> _Resolved:
        now = rule.at(step, age)
        return _Resolved(now, post_write_form(now), gains_at(step, age))

    def update_leaf(
        path: Any, g: Any, slot: MomentumState, numbers: tuple[Any, int], at_step: _Resolved | None
    ) -> tuple[jax.Array, MomentumState]:
        v = keep.parts.decode(slot.velocity)
        g = _checked_gradient(path, g, v)
        dtype = arithmetic_dtype(g.dtype, *(x.dtype for x in v))
        now = resolved(numbers[0], slot.age) if at_step is None else at_step
        wide = g.astype(dtype)
        u, v = _advance(now, wide, tuple(x.astype(dtype) for x in v))
        gain = slot.gain
        if gain is not None:
            unit, gain = _advance(now, jnp.ones((1,) * g.ndim, jnp.finfo(dtype).dtype), gain)
            # No gain yet means no gradient has counted yet, and then the update is zero as it is.
            u = u / jnp.where(unit == 0, 1, unit)
            gain = tuple(new.astype(old.dtype) for new, old in zip(gain, slot.gain, strict=True))
        age = None if slot.age is None else optax.safe_increment(slot.age)
        kept = keep.encode(v, slot.velocity, write_for(keep, wide, numbers, now.gains))
        return u.astype(g.dtype), MomentumState(kept, None, age, gain)

    def update(
        updates: optax.Updates, state: MomentumState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, MomentumState]:
        del params, extra
        bare, old = unboxed(updates), unboxed(state)
        check_state(old, expected)
        trees = layout.flatten_up_to(old._replace(step=None))
        treedef: Any = jax.tree.structure(trees[0] if trees else bare)
        gradients = matched(bare, treedef)
        if gradients is None:
            _raise_mismatch(trees[0], bare)
        slots = to_slots(old._replace(step=None), treedef, layout)
        out: list[jax.Array | None] = [None] * len(slots)
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(trees[0] if trees else bare)]
        at_step = None if rule.reads_age else resolved(old.step, None)
        for i, (path, g, slot) in enumerate(zip(paths, gradients, slots, strict=True)):
            if g is not None:
                out[i], slots[i] = update_leaf(path, g, slot, (old.step, i), at_step)
        step = None if old.step is None else optax.safe_increment(old.step)
        new = to_trees(slots, treedef, layout)._replace(step=step)
        return reboxed(treedef.unflatten(out), updates), reboxed(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


class _Resolved(NamedTuple):
    """A rule at one step: its coefficients, how its update is read off new velocities, and how large these become."""

    rule: Filter
    late: tuple[float, tuple[float, ...], float] | None
    gains: tuple[Any, ...]


def _advance(now: _Resolved, g: jax.Array, v: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One step of the filter for one leaf."""
    rule, late = now.rule, now.late
    new = tuple(_dot((b, *row), (g, *v)) for b, row in zip(rule.B, rule.A, strict=True))
    if late is None:
        return _dot((rule.D, *rule.C), (g, *v)), new
    # Once the update needs no old velocity, XLA's CPU backend can write the new one in its place without a copy.
    scale, weights, direct = late
    return _dot((scale,), (_dot((direct, *weights), (g, *new)),)), new


def gains_of(rule: Filter) -> tuple[Any, ...]:
    r"""About how large each velocity becomes, up to a common factor: what goes in over $(1 - a_{kk}^2)^{3/4}$.

    For white noise the exponent would be 1/2, for a constant gradient 1.
    """
    if rule.order == 1:
        return (1.0,)
    gains = []
    for k, row in enumerate(rule.A):
        inputs = [rule.B[k], *(a for j, a in enumerate(row) if j != k)]
        size = sum((jnp.abs(jnp.asarray(c, jnp.float32)) for c in inputs if not is_zero(c)), jnp.float32(0))
        decay = jnp.minimum(jnp.abs(jnp.asarray(row[k], jnp.float32)), 0.9999)
        gains.append(jnp.where(size > 0, size, 1.0) * (1 - decay * decay) ** -0.75)
    return tuple(gains)


def _dot(coefficients: tuple[Any, ...], arrays: tuple[jax.Array, ...]) -> jax.Array:
    """The sum of coefficient times array. Numbers 0 and 1 cost nothing; traced ones are data."""
    total = None
    for c, x in zip(coefficients, arrays, strict=True):
        if _checks.is_number(c):
            if c == 0:
                continue
            term = x if c == 1 else float(c) * x
        else:
            term = jnp.asarray(c, jnp.finfo(x.dtype).dtype) * x
        total = term if total is None else total + term
    if total is None:
        return jnp.zeros_like(arrays[0])
    # Outside jit an array passed through must not be shared with what it came from: donation would fail.
    return jnp.array(total, copy=True) if any(total is x for x in arrays) else total


def _checked_leaf(path: Any, leaf: Any) -> Any:
    """`leaf` as something with a shape and a supported dtype."""
    leaf = leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else jnp.asarray(leaf)
    if str(leaf.dtype) not in SUPPORTED:
        raise TypeError(unsupported(path_name(path), leaf.dtype))
    return leaf


def _checked_gradient(path: Any, g: Any, v: tuple[jax.Array, ...]) -> Any:
    """The gradient as an array that fits its velocities."""
    g = _checked_leaf(path, g)
    for x in v:
        if x.shape != g.shape:
            raise ValueError(f"the gradient for {path_name(path)} must have shape {x.shape}, got {g.shape}")
        if jnp.iscomplexobj(x) != jnp.issubdtype(g.dtype, jnp.complexfloating):
            kind = "complex" if jnp.iscomplexobj(x) else "real"
            raise TypeError(f"the gradient for {path_name(path)} must be {kind} as at init, got {g.dtype}")
    return jnp.asarray(g)


def _raise_mismatch(expected: Any, got: Any) -> NoReturn:
    """Say which paths are missing from the gradients, or are too many."""
    there, here = (
        {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)}
        for tree in (expected, got)
    )
    missing, extra = sorted(there.keys() - here.keys()), sorted(here.keys() - there.keys())
    if missing:
        raise ValueError(f"the gradients lack {', '.join(missing)}, present at init (None keeps a velocity as it is)")
    if extra:
        raise ValueError(f"the gradients have {', '.join(extra)}, absent at init")
    for path, x in there.items():
        if x is None and here[path] is not None:
            raise ValueError(f"a gradient for {path}, which was None at init")
    raise ValueError("the gradients must have the containers of the parameters at init, got others for the same paths")


def _warn_of_noise(rule: Filter, keep: Storage) -> None:
    """Warn where the slowest pole of a rule is beyond what its storage is made for, as far as its numbers tell."""
    limit = getattr(keep, "largest_decay", None)
    if limit is None or rule.reads_step:
        return
    A = rule.at(1).A if rule.reads_age else rule.A
    if not all(_checks.is_number(a) for row in A for a in row):
        return
    slowest = max(abs(np.linalg.eigvals(np.array(A, np.float64).reshape(rule.order, rule.order))), default=0.0)
    # Poles that coincide are found to half the digits.
    if slowest > limit + 1e-6:
        _checks.warn(
            f"{keep!r} is for decays up to {limit}, got a rule with {slowest:.6g}: the noise of its rounding adds up "
            "over the memory and outgrows the velocity. Take storage 'int8'"
        )


def _check_debiasable(rule: Filter) -> None:
    """Raise if the response to a constant 1 can vanish or change sign, as far as the coefficients are known."""
    if any(_checks.is_scalar_array(c) for c in rule.coefficients()):
        return
    # A schedule may close over a traced value.
    if any(isinstance(value_at(c, 0), jax.core.Tracer) for c in rule.coefficients()):
        return
    now = np.array([[float(value_at(c, 1)) for c in row] for row in rule.A]).reshape(rule.order, rule.order)
    poles = np.linalg.eigvals(now)
    unit = rule.response(np.ones(256 if rule.is_constant else 32))
    if np.any(poles.real < -1e-6) or np.any(abs(poles.imag) > 1e-6):
        raise ValueError(f"debias must be False for a rule whose response to a constant oscillates, got poles {poles}")
    if not np.all(unit > 1e-9 * abs(unit).max()):
        raise ValueError(f"debias must be False for a rule whose response to a constant can vanish, got {unit[:4]} ...")
