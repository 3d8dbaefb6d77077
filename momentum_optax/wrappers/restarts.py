"""Restarts of the velocity: by the gradient, by the loss, or at given steps."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._export import serializable
from .._tree import Leaves, absent, unboxed
from .._typing import Condition, Entry, Number, PyTree
from ..filters import Filter
from ..filters.coefficients import is_zero, value_at
from ..filters.step import weighted_sum
from ..schedules import restarted
from ..state.mismatch import ANYTHING, check_state
from ..state.velocity import velocity
from ..storage._by_leaf import AnyStorage
from ..storage.mixed import codes_of, order_of
from ..storage.protocol import arithmetic_dtype
from ..transform import MomentumState, scale_by_momentum
from .leaves import (
    SCOPES,
    Scope,
    broadcast,
    check_scope,
    checked_transformation,
    counted,
    flags,
    scalar_loss,
    select,
    where,
)


@serializable
class RestartState(NamedTuple):
    """State of `adaptive_restart` and `scheduled_restart`.

    Attributes:
      inner: The state of the transformation that restarts.
      restarts: int32: the number of restarts so far, a scalar; with `scope="leaf"` a tree with one entry for each leaf,
        of the leaf's rank and shape (1, ..., 1).
      last: For the function test, the loss at the step before; for scheduled restarts, int32, the number of updates
        made; None for the gradient test.
    """

    inner: optax.OptState
    restarts: PyTree
    last: Entry


def adaptive_restart(
    rule: Filter, test: str = "gradient", scope: Scope = "tree", *, storage: AnyStorage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""`scale_by_momentum(rule)` that drops its velocity where the momentum works against descent.

    With x the point that `eval_params` gives, $x_{t+1} - x_t = -\eta d_t$ with $d = u - \ell' v' + \ell v$: for the
    heavy ball d is v', for Nesterov's rule v + g.

    * `"gradient"`: where $\langle g, d \rangle < 0$, the step was uphill. Then the stored point becomes x and the
      state that of `init`: $u \leftarrow u - \ell' v'$, $v' \leftarrow 0$.
    * `"function"`: where the loss given to `update` as `value=` is above the one before, the state becomes that of
      `init` before the gradient is used. The paper's loss is that at x, `loss(eval_params(...))`; at the stored
      parameters it is the usual approximation.

    The state of `init` also means step 0, so that `nesterov(schedules.fista())` starts again. The test assumes that the
    learning rate follows in the chain.

    Args:
      rule: A `Filter`.
      test: `"gradient"` or `"function"`.
      scope: `"tree"`: one test for all parameters. `"leaf"`, for the gradient test: each leaf has its own and restarts
        alone; the step that schedules read is shared and not reset.
      storage: The storage of the velocities, see `scale_by_momentum`. A low-bit storage learns its scale again
        after a restart, as at the start.

    Returns:
      A transformation whose state is a `RestartState`. A leaf whose gradient is None takes no part and keeps its
      velocity. A test that evaluates to NaN does not trigger a restart.

    Raises:
      TypeError: If `rule` is not a `Filter`; at `update` if the function test gets no `value`.
      ValueError: If there is no such test, scope or storage, or the function test is combined with `scope="leaf"`; at
        `update` if `value` has axes.

    Reference:
      O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 2015,
      arXiv:1204.3982.
    """
    tx = scale_by_momentum(rule, storage=storage)
    _checks.choice("test", test, ("gradient", "function"))
    _checks.choice("scope", scope, SCOPES if test == "gradient" else ("tree",))
    return _gradient_restart(tx, rule.pruned(), scope) if test == "gradient" else _function_restart(tx)


def scheduled_restart(
    tx: optax.GradientTransformation, at: int | Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """Reset `tx` at given steps: from there it continues as if it had just been initialized.

    Everything in the state of `tx` is reset, including the counters of its schedules. To restart only a schedule of the
    momentum, see `schedules.restarted`.

    Args:
      tx: Any transformation.
      at: A period of at least 1, or the increasing steps, of at least 1, before which it restarts.

    Returns:
      A transformation whose state is a `RestartState`. A leaf whose gradient is None at a restart keeps its velocity.

    Raises:
      TypeError: If `tx` is not a transformation or `at` holds anything but whole numbers.
      ValueError: If `at` is out of range, empty or not increasing.

    Reference:
      O'Donoghue and Candes, Found. Comput. Math. 2015, arXiv:1204.3982, which compares with fixed restarts.
    """
    run = checked_transformation("tx", tx)
    age = restarted(lambda step: step, at)

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: RestartState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, RestartState]:
        check_state(state, RestartState(ANYTHING, ANYTHING, np.int32(0)))
        begin = jnp.logical_and(value_at(age, state.last) == 0, state.last > 0)
        leaves = Leaves(updates)
        fresh = tx.init(_without_none(updates) if params is None else params)
        inner = select(leaves, [False if absent(g) else begin for g in leaves.values], begin, fresh, state.inner)
        out, inner = run.update(updates, inner, params, **extra)
        return out, RestartState(inner, counted(state.restarts, begin), optax.safe_increment(state.last))

    return optax.GradientTransformationExtraArgs(init, update)


def _function_restart(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`adaptive_restart` by the loss, before the gradient is used."""

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), jnp.zeros([], jnp.int32), jnp.array(jnp.inf, jnp.result_type(float)))

    def update(
        updates: optax.Updates,
        state: RestartState,
        params: optax.Params | None = None,
        *,
        value: Number | None = None,
        **extra: PyTree,
    ) -> tuple[optax.Updates, RestartState]:
        check_state(state, RestartState(ANYTHING, ANYTHING, np.float32(0)))
        loss = scalar_loss(value, "the function test", state.last.dtype)
        uphill = loss > state.last
        leaves = Leaves(updates)
        each = [False if absent(g) else uphill for g in leaves.values]
        inner = select(leaves, each, uphill, tx.init(_like_all(leaves, state.inner)), state.inner)
        out, inner = tx.update(updates, inner, params, value=value, **extra)
        return out, RestartState(inner, counted(state.restarts, uphill), loss)

    return optax.GradientTransformationExtraArgs(init, update)


def _gradient_restart(
    tx: optax.GradientTransformationExtraArgs, rule: Filter, scope: Scope
) -> optax.GradientTransformationExtraArgs:
    """`adaptive_restart` by the gradient, after it was used."""

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), flags(scope, params, 0, jnp.int32), None)

    def update(
        updates: optax.Updates, state: RestartState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, RestartState]:
        check_state(state, RestartState(ANYTHING, ANYTHING, None))
        leaves = Leaves(updates)
        check_scope(scope, state.restarts, updates)
        out, inner = tx.update(updates, state.inner, params, **extra)
        step = 0 if inner.step is None else state.inner.step
        before = _displacements(rule.at(jnp.maximum(step - 1, 0)), leaves, state.inner)
        after = _displacements(rule.at(step), leaves, inner)
        landed = [None if absent(u) else _landed(u, x) for u, x in zip(leaves.of(out), after, strict=True)]
        slopes = [
            None if d is None else _inner_product(g, d + x)
            for g, d, x in zip(leaves.values, landed, before, strict=True)
        ]
        if scope == "tree":
            # Leaves may differ in their dtypes, whatever promotion the user allows.
            with jax.numpy_dtype_promotion("standard"):
                total = sum((x for x in slopes if x is not None), jnp.float32(0))
            slopes = [None if x is None else total for x in slopes]
        uphill = [False if x is None else x < 0 for x in slopes]
        shared = _any(uphill) if scope == "tree" or len(uphill) == 1 else False
        inner = select(leaves, uphill, shared, tx.init(_like_all(leaves, inner)), inner)
        pairs = zip(leaves.of(out), landed, uphill, strict=True)
        out = leaves.to_tree([u if d is None else where(up, d, u) for u, d, up in pairs], out)
        fired = shared if scope == "tree" else broadcast(leaves, uphill, state.restarts)
        return out, RestartState(inner, jax.tree.map(counted, state.restarts, fired), None)

    return optax.GradientTransformationExtraArgs(init, update)


def _without_none(updates: optax.Updates) -> optax.Updates:
    """The bare gradients with a scalar for each None, so that `init` makes a state for every leaf."""
    return jax.tree.map(lambda g: jnp.zeros([]) if g is None else g, unboxed(updates), is_leaf=absent)


def _like_all(leaves: Leaves, state: MomentumState) -> optax.Params:
    """The gradients with a shape for each None, that of its velocity: a function may choose a storage by it."""
    codes = leaves.of(codes_of(state.velocity)[0]) if order_of(state.velocity) else [jnp.zeros([])] * len(leaves.values)
    # What was left out at `init` has no velocity either.
    shapes = (x if absent(x) else jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in codes)
    return leaves.bare([x if g is None else g for g, x in zip(leaves.values, shapes, strict=True)])


def _displacements(rule: Filter, leaves: Leaves, state: MomentumState) -> list[Entry | float]:
    """The vector l . v from the stored point to x, over the learning rate, for each leaf."""
    if all(is_zero(weight) for weight in rule.lookahead):
        return [0.0] * len(leaves.values)
    rows = zip(*(leaves.of(tree) for tree in velocity(state)), strict=True)
    weights = cast("tuple[Number, ...]", rule.lookahead)  # of one step, where all coefficients are numbers
    return [None if absent(row[0]) else weighted_sum(weights, row) for row in rows]


def _landed(u: jax.Array, displacement: jax.Array | float) -> jax.Array:
    """The update less where x lies from the new point."""
    return u if isinstance(displacement, float) else u.astype(displacement.dtype) - displacement


def _inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The real inner product of two leaves, in float32 or wider."""
    dtype = arithmetic_dtype(a.dtype, b.dtype)
    return jnp.sum(jnp.real(jnp.conj(a.astype(dtype)) * b.astype(dtype)))


def _any(conditions: list[Condition]) -> jax.Array:
    return jnp.any(jnp.array(conditions, jnp.bool_))
