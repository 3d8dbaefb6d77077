"""`outer_momentum`: any optimizer on pseudo-gradients, exact or in bytes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ... import _checks
from ..._export import serializable
from ..._typing import AxisName, Number, PyTree
from ...apply import apply_updates
from ...state.mismatch import ANYTHING, check_state
from ...storage.protocol import arithmetic_dtype, whole_along
from .exchange import byte_mean, exact_mean, share_of, total


@serializable
class OuterState(NamedTuple):
    """State of outer momentum.

    Attributes:
      anchor: The common point, a tree like the parameters; the same on every worker.
      momentum: The state of the optimizer of pseudo-gradients; the same on every worker.
      residual: A tree like the parameters, different on each worker: the rounding error that has not been sent yet.
        None where exchanges are exact.
    """

    anchor: optax.Params
    momentum: optax.OptState
    residual: optax.Params | None


class OuterMomentum(NamedTuple):
    """The functions of an outer optimizer; all of them pure.

    Attributes:
      init: `init(params) -> state`, on every worker from the same parameters.
      exchange: `exchange(params, state, *, axis_name, weight=1.0, mask=None, **extra) -> state`: pseudo-gradients are
        averaged over the workers and move the anchor. `weight` is the weight of this worker in the mean, 0 for a
        missing one; where all workers are missing nothing changes. `axis_name` is the axis of the workers, or None for
        a single one, without `shard_map` or `vmap`. `mask` is a tree of bool like the parameters: the leaves that take
        part, one fragment of a stream; for the others nothing changes. `extra` goes to the optimizer.
      pull: `pull(params, state, *, retain=0.0, mask=None) -> params`: the anchor, mixed with a share `retain` of the
        worker's current parameters: later than the exchange where communication overlaps with steps.
    """

    init: Callable[[optax.Params], OuterState]
    exchange: Callable[..., OuterState]
    pull: Callable[..., optax.Params]

    def sync(
        self, params: optax.Params, state: OuterState, *, mask: PyTree = None, **arguments: object
    ) -> tuple[optax.Params, OuterState]:
        """`exchange` and `pull` in one: the parameters to continue from, and the state."""
        state = self.exchange(params, state, mask=mask, **arguments)
        return self.pull(params, state, mask=mask), state


def outer_momentum(tx: optax.GradientTransformation, *, exchange: str = "exact") -> OuterMomentum:
    r"""Run an optimizer on pseudo-gradients, $x \leftarrow x + \mathrm{tx}(\sum_i w_i (x - x_i) / \sum_i w_i)$.

        outer = mo.outer.outer_momentum(mo.sgd(0.7, 0.9, nesterov=True, storage="int8"))
        state = outer.init(params)
        ...                                                    # some steps of any inner optimizer on each worker
        params, state = outer.sync(params, state, axis_name="workers")      # under shard_map or vmap

    With `tx = optax.sgd(1.0)` all workers continue from their average.

    Args:
      tx: Any optimizer; pseudo-gradients are its gradients, and the anchor its parameters. With `mask` it must skip
        leaves whose gradient is None, as everything built on `scale_by_momentum` does.
      exchange: "exact" sums in the parameters' dtype. "int8" sends one byte per parameter and four per row, and adds
        what rounding lost to the next exchange (error feedback); each worker receives the bytes of all.

    Returns:
      An `OuterMomentum`.

    Raises:
      TypeError: If `tx` is not an optimizer.
      ValueError: If `exchange` is neither of these.
      StateMismatchError: At `exchange`, a `ValueError`, if the state is of another kind of exchange or optimizer.

    Reference:
      Douillard et al., DiLoCo, 2023, arXiv:2311.08105; in fragments: Douillard et al., 2025, arXiv:2501.18512. Error
      feedback: Karimireddy et al., ICML 2019, arXiv:1901.09847.
    """
    _checks.transformation("tx", tx)
    _checks.choice("exchange", exchange, ("exact", "int8"))
    run = optax.with_extra_args_support(tx)
    exact = exchange == "exact"

    def init(params: optax.Params) -> OuterState:
        residual = None if exact else jax.tree.map(jnp.zeros_like, params)
        # A copy: parameters and state are donated together.
        return OuterState(jax.tree.map(lambda p: jnp.array(p, copy=True), params), tx.init(params), residual)

    def exchange_once(
        params: optax.Params,
        state: OuterState,
        *,
        axis_name: AxisName,
        weight: Number = 1.0,
        mask: PyTree = None,
        **extra: object,
    ) -> OuterState:
        check_state(state, OuterState(ANYTHING, ANYTHING, None if exact else ANYTHING))
        share = share_of(weight, axis_name)
        progress = _progress(params, state.anchor, share, mask)
        if exact:
            mean, residual = exact_mean(progress, share, axis_name), state.residual
        else:
            mean, residual = byte_mean(progress, state.residual, share, axis_name)
        # The mean, and with it the state, is the same on every worker, whether JAX can tell or not.
        with whole_along(axis_name):
            updates, momentum = run.update(mean, state.momentum, state.anchor, **extra)
        new = OuterState(apply_updates(state.anchor, updates), momentum, residual)
        anyone = total(share, axis_name) > 0
        return OuterState(*jax.tree.map(lambda a, b: jnp.where(anyone, a, b), new, state))

    return OuterMomentum(init, exchange_once, _pull)


def _progress(params: PyTree, anchor: PyTree, share: jax.Array, mask: PyTree) -> PyTree:
    """Pseudo-gradients of one worker; None for leaves that do not take part."""
    # The parameters of a missing worker may be NaN.
    progress = jax.tree.map(lambda x, p: jnp.where(share > 0, x - p, 0), anchor, params)
    return progress if mask is None else jax.tree.map(lambda takes_part, d: d if takes_part else None, mask, progress)


def _pull(params: optax.Params, state: OuterState, *, retain: Number = 0.0, mask: PyTree = None) -> optax.Params:
    """The `pull` of every `OuterMomentum`."""
    _checks.within("retain", retain, "[0, 1]")

    def mixed(p: jax.Array, x: jax.Array, takes_part: bool) -> jax.Array:
        if not takes_part:
            return p
        if _checks.is_number(retain) and retain == 0:
            return x
        own, common = (a.astype(arithmetic_dtype(a.dtype)) for a in (p, x))
        share = jnp.asarray(retain, jnp.finfo(common.dtype).dtype)
        return (common + share * (own - common)).astype(p.dtype)

    everywhere = jax.tree.map(lambda _: True, params)
    return jax.tree.map(mixed, params, state.anchor, everywhere if mask is None else mask)
