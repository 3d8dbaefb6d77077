"""`scale_by_momentum`: any rule as an Optax transformation. The one place with dtypes, counters and storage."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import _checks
from ._boxes import content
from ._export import serializable
from ._tree import Place, init_leaves, leaves_at, path_name, reboxed, unboxed, update_leaves
from ._typing import Count, DType, KeyPath, Leaf, PyTree, jitted
from .filters import BeforeSign, Filter, post_write_form
from .filters.coefficients import PerLeafSchedule, is_zero, value_at
from .filters.fingerprints import note
from .filters.step import Arrays, ResolvedRule, Scales, advance, debiased, largest_input, relative_scales
from .state.mismatch import ANYTHING, AnyVelocity, check_leaf, check_state
from .storage import Storage, resolve
from .storage._by_leaf import AnyStorage, ByLeaf, chooser_of
from .storage.mixed import Layout, codes_of, form_of, stored_velocity, with_stored
from .storage.noise import stamp_of_step
from .storage.protocol import arithmetic_dtype, checked_leaf, encode_context, in_dtype, is_signed, new_state

# The name of an extra argument of `update`: a tree like the gradients, that they were computed from.
RAW = "raw_gradient"
# Of a rule with its coefficients at a step and an age, of that step and of that age.
ScalesAt: TypeAlias = Callable[[Filter, Count | None, Count | None], Scales]


@serializable
class MomentumState(NamedTuple):
    """State of `scale_by_momentum`. What a rule does not need is None and costs nothing.

    Attributes:
      velocity: The stored velocities, a NamedTuple of the storage's parts, each a tuple with one tree per velocity; for
        several storages a `VelocityByLeaf` with one of these for each.
      step: int32 scalar, the number of updates made; only if a coefficient is scheduled or the storage is stochastic.
      age: A tree of int32: the number of gradients that each leaf received; only if a coefficient depends on it.
      gain: A tuple with one tree per velocity: the velocities of a gradient that is always 1; only with `debias=True`.
      lookahead: A tuple with one scalar per velocity: the rule's `lookahead` after the last update, float32 or, if a
        leaf is wider, float64; only for a rule that has one. `eval_params` reads it.

    Entries of `age` and `gain` have the leaf's rank and shape (1, ..., 1): a sharding of the leaf fits them once the
    axes that it splits are left out. For parameters in boxes of Flax, arrays of the leaf's shape are in its
    box, and shorter ones in a box that names the axes that they have in full, or in none.
    """

    velocity: PyTree
    step: jax.Array | None
    age: PyTree
    gain: PyTree
    lookahead: Arrays | None = None


def scale_by_momentum(
    rule: Filter, *, storage: AnyStorage = "float32", debias: bool = False
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

    Trees: a gradient of None keeps that leaf's velocity unchanged and gives an update of None (`apply_updates` skips
    it). A non-finite gradient makes the velocity of its elements non-finite for good, as in Optax; put `guarded` around
    the optimizer to skip such steps.

    Args:
      rule: A `Filter`, e.g. from the functions in `rules`.
      storage: How velocities are kept: "float32", "bfloat16", "int8", "int4" or an object of `momentum_optax.storage`;
        or one for each leaf, by a mapping of patterns or a function, see `storage.by_leaf`.
      debias: Divide each update by what a constant gradient of 1 would have given, so that early updates are an
        average of the gradients so far. Adam's correction, and exact under every schedule, per leaf.

    Returns:
      A transformation; `init(params)` takes arrays or `ShapeDtypeStruct`, and the state is a `MomentumState`.

    Raises:
      TypeError: If an argument has the wrong type; at `init` if a leaf is not of a float or complex dtype; at `update`
        if a real leaf gets a complex gradient or the reverse.
      StateMismatchError: At `update`, a `ValueError`, if the state is of an optimizer with another storage, number of
        velocities, schedule, first step or debiasing: with the call that converts it, see `convert`.
      ValueError: If there is no such storage, it is for squares only, `debias` is asked of a rule whose response to a
        constant can vanish or change sign, or the rule's `lookahead` depends on a leaf's age; at `update` if the
        gradients' tree or shapes are not those of `init`, or a schedule gives more than a number; at both if no pattern
        of storages matches the path of a leaf.

    Reference:
      The state-space form of Lessard, Recht and Packard, 2016, arXiv:1408.3595; debiasing after Kingma and Ba,
      ICLR 2015, arXiv:1412.6980.
    """
    if not isinstance(rule, Filter):
        raise TypeError(f"rule must be a Filter such as heavy_ball(0.9), got {_checks.shown(rule)}")
    _checks.flag("debias", debias)
    rule, storages = rule.pruned(), chooser_of(resolve(storage))
    if any(isinstance(c, PerLeafSchedule) for c in rule.lookahead):
        raise ValueError(
            "lookahead of a rule must be a number, a scalar array or a schedule of the step, got a PerLeafSchedule: "
            "the state keeps one for all leaves"
        )
    for known in storages.known or ():
        _check_storage(rule, known)
    if debias:
        _check_debiasable(rule)
    return filter_transformation(rule, storages, debias, lambda now, step, age: relative_scales(now))


def filter_transformation(
    rule: Filter, storages: ByLeaf, debias: bool, scales_at: ScalesAt
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_momentum` of checked arguments.

    Args:
      rule: Without velocities that are never read.
      storages: Of values of either sign.
      debias: As in `scale_by_momentum`.
      scales_at: `scales_at(now, step, age)` is about how large each velocity becomes, relative to the others; `now` is
        the rule with its coefficients at that step and age.
    """
    runner = _Runner(rule, storages, debias, scales_at)
    return optax.GradientTransformationExtraArgs(runner.init, runner.update)


class _Runner:
    """The methods of a transformation. Trees are for `_tree`: here is one leaf with its coefficients and dtypes.

    Attributes:
      is_constant: Whether all coefficients are numbers; `post_write` is then the same at every step.
      post_write: How the update is read from new velocities, see `post_write_form`.
      reads_age: Whether coefficients differ between leaves.
      looks_ahead: Whether the rule has a point to evaluate other than the parameters, so that the state says where.
      counts_steps: Whether the state has a step.
      reads_entering: Whether a storage is told of what enters, or may be.
      expected: A state of the structure that `check_state` wants.
    """

    def __init__(self, rule: Filter, storages: ByLeaf, debias: bool, scales_at: ScalesAt) -> None:
        self.rule, self.debias, self.scales_at = rule, debias, scales_at
        self.is_divided = isinstance(rule, BeforeSign)
        self.storages = storages = storages.of_order(rule.order)
        self.is_constant = rule.is_constant
        self.post_write = post_write_form(rule)
        self.reads_age = rule.reads_age
        self.looks_ahead = any(not is_zero(c) for c in rule.lookahead)
        known = storages.known
        self.reads_entering = known is None or any(getattr(x, "reads_entering", False) for x in known)
        self.counts_steps = rule.reads_step or storages.reads_step
        form = AnyVelocity((ANYTHING,) * rule.order)
        if known is not None:
            form = Layout.of(known, rule.order).form
        self.expected = self.state_of(form, lambda dtype: 0)._replace(
            step=jax.eval_shape(self.first_step),
            lookahead=jax.eval_shape(lambda: _lookahead(rule, 0, jnp.float32)) if self.looks_ahead else None,
        )

    def init(self, params: optax.Params) -> MomentumState:
        """See `scale_by_momentum`."""
        note(self.rule)
        layout = self.storages.layout(params, self.rule.order)
        treedef = jax.tree.structure(self.state_of(layout.form, lambda dtype: 0))
        state = init_leaves(functools.partial(self.init_leaf, layout), params, treedef)
        ahead = None
        if self.looks_ahead:
            wide = arithmetic_dtype(*(jnp.result_type(x) for x in jax.tree.leaves(params)))
            ahead = _lookahead(self.rule, 0, jnp.finfo(wide).dtype)
        return state._replace(step=self.first_step(), lookahead=ahead)

    def first_step(self) -> jax.Array | None:
        """The step of a new state; None where nothing reads it."""
        return jnp.zeros([], jnp.int32) if self.counts_steps else None

    def init_leaf(self, layout: Layout, place: Place, leaf: Leaf) -> MomentumState:
        """The state of one leaf: a `MomentumState` with arrays in place of trees."""
        path, i = place
        leaf = checked_leaf(path, leaf)
        storage = self.storages.at(path, leaf)
        if self.storages.known is None:
            _check_storage(self.rule, storage)
        real = jnp.finfo(arithmetic_dtype(leaf.dtype)).dtype
        velocity = layout.holding(new_state(storage, leaf, self.rule.order, i), len(leaf.shape))
        return self.state_of(velocity, lambda dtype: jnp.zeros((1,) * len(leaf.shape), dtype), real)

    def state_of(self, velocity: PyTree, zeros: Callable[[DType], Leaf | int], real: DType = None) -> MomentumState:
        """The state with this stored velocity; `zeros(dtype)` is an age, and for the dtype `real` a gain."""
        gain = tuple(zeros(real) for _ in range(self.rule.order)) if self.debias else None
        return MomentumState(velocity, None, zeros(jnp.int32) if self.reads_age else None, gain)

    def update(
        self, updates: optax.Updates, state: MomentumState, params: optax.Params | None = None, **extra: object
    ) -> tuple[optax.Updates, MomentumState]:
        """See `scale_by_momentum`."""
        del params
        check_state(state, self.expected)
        step = content(state.step)
        now = None if self.reads_age else self.resolved(step, None)
        raw = self.raw_gradients(state, extra.get(RAW))
        stamp = stamp_of_step(step) if step is not None and self.storages.reads_step else None
        one_leaf = functools.partial(self.update_leaf, now, step, raw=raw, stamp=stamp)
        treedef = jax.tree.structure(self.state_of(form_of(state.velocity), lambda dtype: 0))
        out, new = update_leaves(one_leaf, updates, state._replace(step=None, lookahead=None), treedef)
        if state.lookahead is not None:
            before = tuple(map(content, state.lookahead))
            ahead = _lookahead(self.rule if now is None else now.rule, step, before[0].dtype)
            # Equal to the new one, of the type of the old one: under `shard_map` a constant is of another.
            typed = tuple(jnp.where(jnp.isnan(x), y, y) for x, y in zip(before, ahead, strict=True))
            new = new._replace(lookahead=reboxed(typed, state.lookahead))
        return out, new if step is None else new._replace(step=reboxed(optax.safe_increment(step), state.step))

    def raw_gradients(self, state: MomentumState, tree: PyTree) -> list[PyTree]:
        """For each leaf what its gradient was computed from; empty if nothing is said."""
        if tree is None or not self.rule.order:
            return []
        return leaves_at(jax.tree.structure(unboxed(codes_of(state.velocity)[0])), tree)

    def resolved(self, step: Count | None, age: Count | None) -> ResolvedRule:
        """The rule at a step, for a leaf of that age."""
        rule = self.rule if self.is_constant else self.rule.at(step, age)
        post_write = self.post_write if self.is_constant else post_write_form(rule)
        scales = self.scales_at(rule, step, age)
        return ResolvedRule(rule, post_write, scales, largest_input(rule, scales) if self.reads_entering else None)

    def update_leaf(
        self,
        now: ResolvedRule | None,
        step: Count | None,
        place: Place,
        g: Leaf,
        old: MomentumState,
        *,
        raw: list[PyTree],
        stamp: jax.Array | None,
    ) -> tuple[jax.Array, MomentumState]:
        """Update and new state of a leaf; `now` is None where the coefficients depend on its age."""
        path, i = place
        storage, stored = self.storages.everywhere, old.velocity
        if storage is None:
            storage, stored = self.storage_of(path, g, stored)
        v: Arrays = storage.state_type.decode(stored)
        g = _checked_gradient(path, g, v)
        dtype = arithmetic_dtype(g.dtype, *(x.dtype for x in v))
        now = self.resolved(step, old.age) if now is None else now
        share = now.largest_input if getattr(storage, "reads_entering", False) else None
        if share is not None:
            # The new velocity is read by its storage more than once. With one more reader XLA's GPU backend would write
            # it to memory, behind an optimizer such as Adam.
            now = now._replace(post_write=None)
        wide = in_dtype(g, dtype)
        u, v = advance(now, wide, tuple(in_dtype(x, dtype) for x in v))
        gain = old.gain
        if gain is not None:
            u, gain = debiased(now, u, gain)
        age = None if old.age is None else _next_age(old.age)
        context = encode_context(storage, wide, (stamp, i), now.scales)._replace(is_divided=self.is_divided)
        if share is not None:
            entering = g if not raw or raw[i] is None else jnp.asarray(raw[i])
            context = context._replace(entering=(entering, share, True))
        velocity = storage.encode(v, stored, context)
        if stored is not old.velocity:
            velocity = with_stored(old.velocity, velocity)
        return in_dtype(u, g.dtype), MomentumState(velocity, None, age, gain)

    def storage_of(self, path: KeyPath, g: Leaf, velocity: PyTree) -> tuple[Storage, PyTree]:
        """The storage of a leaf, and the velocity that it keeps."""
        storage, stored = self.storages.at(path, g), stored_velocity(velocity)
        check_leaf(path_name(path), stored, storage.state_type)
        return storage, stored


_next_age = jitted(optax.safe_increment)


def _lookahead(rule: Filter, step: Count | None, dtype: DType) -> Arrays:
    """The `lookahead` of a rule after the update number `step`."""
    # Copies: an array that the rule holds, an injected hyperparameter say, must not share its buffer.
    return tuple(jnp.array(value_at(c, step), dtype) for c in rule.lookahead)


def _checked_gradient(path: KeyPath, g: Leaf, v: Arrays) -> jax.Array:
    """The gradient as an array that fits its velocities."""
    g = checked_leaf(path, g)
    for x in v:
        if x.shape != g.shape:
            raise ValueError(f"the gradient for {path_name(path)} must have shape {x.shape}, got {g.shape}")
        if (x.dtype.kind == "c") != (g.dtype.kind == "c"):
            kind = "complex" if x.dtype.kind == "c" else "real"
            raise TypeError(f"the gradient for {path_name(path)} must be {kind} as at init, got {g.dtype}")
    return g if isinstance(g, jax.Array) else jnp.asarray(g)


def _check_storage(rule: Filter, storage: Storage) -> None:
    """Raise for a storage of squares, and warn of one that is too coarse for the rule."""
    if not is_signed(storage):
        raise ValueError(f"storage must keep values of either sign, got {storage!r}, which is for second moments")
    _warn_of_noise(rule, storage)


def _warn_of_noise(rule: Filter, storage: Storage) -> None:
    """Warn where the slowest pole of a rule is beyond what its storage is made for, as far as its numbers tell."""
    limit = getattr(storage, "largest_decay", None)
    if limit is None or rule.reads_step:
        return
    A = rule.at(1).A if rule.reads_age else rule.A
    if not all(_checks.is_number(a) for row in A for a in row):
        return
    slowest = max(abs(np.linalg.eigvals(np.array(A, np.float64).reshape(rule.order, rule.order))), default=0.0)
    # Poles that coincide are found to half the digits.
    if slowest > limit + 1e-6:
        _checks.warn(
            f"{storage!r} is for decays up to {limit}, got a rule with {slowest:.6g}: the noise of its rounding adds "
            "up over the memory and outgrows the velocity. Take storage 'int8'"
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
    swinging = poles[(poles.real < -1e-6) | (abs(poles.imag) > 1e-6)]
    if swinging.size:
        # Newer versions of NumPy give complex numbers where all are real too.
        pole = swinging[0] if swinging[0].imag else swinging[0].real
        raise ValueError(
            f"debias must be False for a rule whose response to a constant oscillates, got a pole {pole:.6g}"
        )
    if not np.all(unit > 1e-9 * abs(unit).max()):
        raise ValueError(f"debias must be False for a rule whose response to a constant can vanish, got {unit[:4]} ...")
