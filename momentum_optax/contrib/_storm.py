"""STORM: momentum from two gradients of one batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._typing import Number, PyTree
from ..filters import Filter
from ..filters.coefficients import Scalar, lift, on_first_step, value_at
from ..optimizers.gradient_dtype import in_gradient_dtype
from ..state.mismatch import check_kind, check_state
from ..storage._by_leaf import AnyStorage
from ..storage.protocol import arithmetic_dtype
from ..transform import MomentumState, scale_by_momentum
from ..wrappers.leaves import squared_norm
from ._gradients import combined, like, matched, times


def storm(
    c: Number, k: Number = 0.1, w: Number = 0.1, *, storage: AnyStorage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""STORM with its adaptive rate: $\theta' = \theta - \eta_t d_t$; see `scale_by_adaptive_storm`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before.

    Args:
      c: In [0, inf), to be tuned.
      k: In (0, inf).
      w: In (0, inf).
      storage: The storage of d, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type; at `update` without `previous_gradient`.

    Reference:
      Cutkosky and Orabona, "Momentum-based variance reduction in non-convex SGD", NeurIPS 2019, arXiv:1905.10018.
    """
    return in_gradient_dtype(optax.chain(scale_by_adaptive_storm(c, k, w, storage=storage), optax.scale(-1.0)))


def scale_by_storm(a: Scalar, *, storage: AnyStorage = "float32") -> optax.GradientTransformationExtraArgs:
    r"""STORM: momentum whose past is carried over to the present parameters by a second gradient of the same batch.

    $$ d_t = g_t(x_t) + (1 - a_t) (d_{t-1} - g_t(x_{t-1})), \qquad d_0 = g_0(x_0) $$

    It is the heavy ball with decay $1 - a$ of the corrected gradient $g_t(x_t) - (1 - a_t) g_t(x_{t-1})$, and is run as
    such. The error of d as an estimate of the full gradient does not lag behind the parameters. For noise of variance
    $\sigma^2$ that does not depend on x it settles at $\sigma^2 a / (2 - a)$ whatever the learning rate, where an
    average of gradients has that for parameters at rest only. `update` takes the second gradient,

        updates, state = tx.update(gradient, state, params, previous_gradient=gradient_at_previous_params)

    through `optax.chain` too. Each step needs twice the work for gradients, and the previous parameters.

    The first gradient that a leaf receives becomes its d; `previous_gradient` of that leaf then has no effect, and may
    be the gradient itself. Transformations before it in a chain see only the first gradient, and `optax.MultiSteps`
    accumulates only that one.

    Args:
      a: In [0, 1]: a number, a scalar array or a schedule of the step; 1 is plain SGD.
      storage: The storage of d, see `scale_by_momentum`.

    Returns:
      A transformation whose state is a `MomentumState`. The update is not negated, has the gradient's dtype, and is
      None where the gradient is.

    Raises:
      TypeError: If `a` is not a coefficient; at `update` without `previous_gradient`; as `scale_by_momentum` does.
      ValueError: If `a` is out of range or there is no such storage; at `update` if `previous_gradient` has another
        tree, shape or None than the gradients; as `scale_by_momentum` does.

    Reference:
      Cutkosky and Orabona, "Momentum-based variance reduction in non-convex SGD", NeurIPS 2019, arXiv:1905.10018.
    """
    _checks.within("a", a, "[0, 1]")
    rule = _storm_rule(a)
    tx = scale_by_momentum(rule, storage=storage)
    expected = jax.eval_shape(tx.init, jax.ShapeDtypeStruct((), jnp.float32))

    def update(
        updates: optax.Updates,
        state: MomentumState,
        params: optax.Params | None = None,
        *,
        previous_gradient: PyTree = None,
        **extra: PyTree,
    ) -> tuple[optax.Updates, MomentumState]:
        del params, extra
        check_state(state, expected)
        return _storm_step(tx, rule, updates, state, previous_gradient)

    return optax.GradientTransformationExtraArgs(tx.init, update)


@serializable
class StormState(NamedTuple):
    """State of `scale_by_adaptive_storm`.

    Attributes:
      inner: The `MomentumState` of d.
      sum_of_squares: float32 scalar, or float64 if a leaf is so: the sum of the gradients' squared norms.
    """

    inner: MomentumState
    sum_of_squares: jax.Array


def scale_by_adaptive_storm(
    c: Number, k: Number = 0.1, w: Number = 0.1, *, storage: AnyStorage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""STORM with its published adaptive rate, which is part of the update.

    $$ \eta_t = k \Big/ \Big(w + \sum_{i \le t} \|g_i\|^2\Big)^{1/3}, \qquad a_{t+1} = \min(1, c\,\eta_t^2), \qquad
       u_t = \eta_t d_t $$

    with d of `scale_by_storm` and one sum over all parameters; under `shard_map`, over a device's part alone. The
    theorem asks for c of at least $28 L^2$, for gradients of Lipschitz constant L.

    Args:
      c: In [0, inf); the paper tunes it.
      k: In (0, inf); the paper's experiments have 0.1.
      w: In (0, inf); the paper's experiments have 0.1.
      storage: The storage of d, see `scale_by_momentum`.

    Returns:
      A transformation whose state is a `StormState`; see `scale_by_storm` for its `update`.

    Raises:
      TypeError: If an argument is neither a number nor a scalar array; at `update` as `scale_by_storm` does.
      ValueError: If a number is out of range or there is no such storage; at `update` as `scale_by_storm` does.

    Reference:
      Cutkosky and Orabona, NeurIPS 2019, arXiv:1905.10018, algorithm 1.
    """
    for name, value, interval in (("c", c, "[0, inf)"), ("k", k, "(0, inf)"), ("w", w, "(0, inf)")):
        _checks.constant(name, value, interval)
    # Any number makes the same state.
    start = scale_by_momentum(_storm_rule(0.5), storage=storage)
    expected = jax.eval_shape(start.init, jax.ShapeDtypeStruct((), jnp.float32))

    def rate(total: jax.Array) -> Number:
        return k / jnp.cbrt(w + total)

    def init(params: optax.Params) -> StormState:
        inner = start.init(params)
        dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
        return StormState(inner, jnp.zeros([], jnp.finfo(arithmetic_dtype(*dtypes)).dtype))

    def update(
        updates: optax.Updates,
        state: StormState,
        params: optax.Params | None = None,
        *,
        previous_gradient: PyTree = None,
        **extra: PyTree,
    ) -> tuple[optax.Updates, StormState]:
        del params, extra
        check_kind(state, StormState)
        check_state(state.inner, expected)
        total = state.sum_of_squares
        rule = _storm_rule(jnp.minimum(1, c * rate(total) ** 2).astype(total.dtype))
        tx = scale_by_momentum(rule, storage=storage)
        out, inner = _storm_step(tx, rule, updates, state.inner, previous_gradient)
        total = total + squared_norm(jax.tree.leaves(updates), total.dtype)
        out = jax.tree.map(lambda u: times(rate(total), u).astype(u.dtype), out)
        return out, StormState(inner, total)

    return optax.GradientTransformationExtraArgs(init, update)


def _storm_rule(a: Scalar) -> Filter:
    """The heavy ball of d. Its decay is 0 at the first gradient of a leaf, where there is nothing to correct either."""
    decay = on_first_step(0.0, lift(lambda x: 1 - x, a))
    return Filter(A=decay, B=1.0, C=decay, D=1.0)


def _storm_step(
    tx: optax.GradientTransformationExtraArgs,
    rule: Filter,
    updates: optax.Updates,
    state: MomentumState,
    previous_gradient: PyTree,
) -> tuple[optax.Updates, MomentumState]:
    """One step of `tx`, the runner of `rule`, on the corrected gradient."""
    ages = [age for _, _, age in matched(updates, "the parameters of init", state.age)]
    decay = rule.A[0][0]
    corrected = combined(
        updates, previous_gradient, lambda g, p, i: g - like(value_at(decay, state.step, ages[i]), g) * p
    )
    out, state = tx.update(corrected, state)
    return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), out, updates), state
