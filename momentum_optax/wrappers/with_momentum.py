"""`with_momentum`: a rule behind any optimizer, on its updates instead of its gradients."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, cast

import jax
import numpy as np
import optax

from .. import _checks
from .._export import serializable
from .._typing import Number, PyTree, jitted
from ..filters import Filter, post_write_form
from ..state.displacement import displaced
from ..state.mismatch import check_kind
from ..storage import resolve
from ..storage._by_leaf import AnyStorage, ByLeaf, chooser_of
from ..storage._float32 import Float32
from ..transform import MomentumState, scale_by_momentum
from .leaves import checked_transformation

InnerParams: TypeAlias = Literal["stored", "fast"]


@serializable
class WithMomentumState(NamedTuple):
    """State of `with_momentum`.

    Attributes:
      inner: The state of the optimizer.
      momentum: The state of the rule behind it.
    """

    inner: optax.OptState
    momentum: MomentumState


def with_momentum(
    tx: optax.GradientTransformation,
    rule: Filter,
    *,
    storage: AnyStorage = "float32",
    debias: bool = False,
    inner_params: InnerParams = "stored",
) -> optax.GradientTransformationExtraArgs:
    r"""Any optimizer with its updates passed through a rule: primal averaging, outer Nesterov steps, Lookahead.

    $$ s_t = \mathrm{tx}(g_t), \qquad u_t = C v_t + D s_t, \qquad v_{t+1} = A v_t + B s_t, \qquad
       \theta_{t+1} = \theta_t + u_t $$

    The rule sees what would be added to the parameters, learning rate and sign included, so that it is exact under
    every schedule of the learning rate. The updates are those of `optax.chain(tx, scale_by_momentum(rule))`; the state
    says in addition that the rule is behind the rate, and `eval_params(opt_state, params)` needs nothing more.

        tx = mo.with_momentum(optax.adamw(rate), rule)

    What reads parameters in `tx`, such as weight decay, is shown the stored ones. With `inner_params="fast"` it is
    shown

    $$ z_t = \theta_t + C (I - A)^{-1} v_t, \qquad z_{t+1} = z_t + \mathrm{H}(1)\, s_t, $$

    the point at which the parameters would come to rest if no further update came, which moves by the updates of `tx`
    alone, times the rule's gain H(1) for a constant. In primal averaging it is the sequence z; the code of its authors
    decays the weights at the stored point.

    A step of the rule is a call of `update` that reaches it, also where `tx` makes a zero of it (see the guide).

    Args:
      tx: Any optimizer; the rule is on its updates, not on those of what follows.
      rule: A `Filter`. Coefficients may be scheduled or periodic; the phase of a period is the rule's own `step`.
      storage: How the rule's velocities are kept, see `scale_by_momentum`. The state of `tx` keeps its form: see
        `compress`.
      debias: As in `scale_by_momentum`.
      inner_params: The parameters that `tx` is shown: `"stored"` or `"fast"`.

    Returns:
      A transformation whose state is a `WithMomentumState`. Extra arguments of `update` are passed on to `tx`. The
      updates have the dtypes of those of `tx`. A leaf for which `tx` gives None keeps its velocity.

    Raises:
      TypeError: If `tx` is not a transformation, or as `scale_by_momentum` does.
      ValueError: If `inner_params` is neither of these; if it is `"fast"` and the rule is scheduled, debiased, has a
        pole at 1 or several velocities with arrays as coefficients, and at `update` without `params`; or as
        `scale_by_momentum` does.

    Reference:
      Defazio et al., "Smoothing DiLoCo with primal averaging for faster training of LLMs", 2025, arXiv:2512.17131, and
      github.com/facebookresearch/optimizers, gpa. Zhang et al., "Lookahead optimizer: k steps forward, 1 step back",
      NeurIPS 2019, arXiv:1907.08610.
    """
    run = checked_transformation("tx", tx)
    _checks.choice("inner_params", inner_params, ("stored", "fast"))
    behind = scale_by_momentum(rule, storage=storage, debias=debias)
    is_joined = _is_joined(rule.pruned(), chooser_of(resolve(storage)))
    shown = _shown(rule.pruned(), debias) if inner_params == "fast" else lambda params, state: params

    def init(params: optax.Params) -> WithMomentumState:
        return WithMomentumState(run.init(params), behind.init(params))

    def update(
        updates: optax.Updates, state: WithMomentumState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, WithMomentumState]:
        check_kind(state, WithMomentumState)
        updates, inner = run.update(updates, state.inner, shown(params, state.momentum), **extra)
        updates = updates if is_joined else _apart(updates)
        updates, momentum = behind.update(updates, state.momentum, params)
        return updates, WithMomentumState(inner, momentum)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_joined(rule: Filter, storages: ByLeaf) -> bool:
    """Whether XLA's TPU backend takes the rule and the optimizer before it in one pass."""
    is_in_full = all(isinstance(storage, Float32) for storage in storages.known or (None,))
    return is_in_full and post_write_form(rule) is not None


@jitted
def _apart(updates: optax.Updates) -> optax.Updates:
    """The updates, worked out on a TPU before anything reads them.

    Where its backend does not join them with what follows, it would write or work out again what they come from.
    """
    apart: optax.Updates = jax.lax.platform_dependent(
        updates, tpu=jax.lax.optimization_barrier, default=lambda updates: updates
    )
    return apart


def _shown(rule: Filter, debias: bool) -> Callable[[optax.Params | None, MomentumState], optax.Params]:
    """The function that gives z, for the parameters and the state of the rule."""
    if debias or rule.reads_step or rule.reads_age:
        what = "debias=True" if debias else "coefficients that change from step to step"
        raise ValueError(f"inner_params must be 'stored' with {what}: only a constant rule has a fast iterate")
    weights = _resting_weights(rule)

    def shown(params: optax.Params | None, state: MomentumState) -> optax.Params:
        if params is None:
            raise ValueError("params must be given to update with inner_params='fast', got None")
        return displaced(params, state, weights)

    return shown


def _resting_weights(rule: Filter) -> tuple[Number, ...]:
    """$C (I - A)^{-1}$, K numbers; for K = 1 an array where a coefficient is one."""
    if not rule.is_constant:
        if rule.order != 1:
            raise ValueError("inner_params must be 'stored' for a rule of several velocities with arrays in it")
        return (cast("Number", rule.C[0]) / (1 - cast("Number", rule.A[0][0])),)
    A, _, C, _ = rule.matrices()
    try:
        weights = np.linalg.solve(np.eye(rule.order) - A.T, C)
    except np.linalg.LinAlgError:
        raise ValueError(
            f"inner_params must be 'stored' for a rule with a pole at 1, got {_checks.shown(rule)}"
        ) from None
    return tuple(map(float, weights))
