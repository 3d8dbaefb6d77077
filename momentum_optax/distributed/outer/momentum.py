"""`outer_momentum`: any optimizer on pseudo-gradients, exact or in bytes."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ... import _checks
from ..._export import serializable
from ..._tree import map_onto, path_name, unboxed
from ..._tree_arguments import check_entries
from ..._typing import AxisName, KeyPath, Number, PyTree
from ...apply import apply_updates
from ...state.mismatch import ANYTHING, check_kind, check_state
from ...storage.protocol import arithmetic_dtype, checked_leaf, whole_along
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
        what rounding lost to the next exchange (error feedback); each worker receives the bytes of all. Complex
        parameters are sent in full.

    Returns:
      An `OuterMomentum`.

    Raises:
      TypeError: If `tx` is not an optimizer; at `init` if a leaf is not of a float or complex dtype; if `weight`,
        `retain` or `mask` is of the wrong type.
      ValueError: If `exchange` is neither of these; if a number is out of range; if parameters or mask are not like the
        parameters of `init`.
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
        for path, x in jax.tree_util.tree_leaves_with_path(unboxed(params)):
            checked_leaf(path, x)
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
        _check_exchange(state, exact, weight)
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


def _check_exchange(state: OuterState, exact: bool, weight: Number) -> None:
    """Raise for the state of another optimizer or kind of exchange, or for a weight that is none."""
    check_kind(state, OuterState, "begin with init(params) of this outer optimizer")
    check_state(state, OuterState(ANYTHING, ANYTHING, None if exact else ANYTHING))
    # True and False are a worker that is there and a missing one.
    if not hasattr(weight, "dtype") and not isinstance(weight, bool):
        _checks.constant("weight", weight, "[0, inf)")


def _progress(params: PyTree, anchor: PyTree, share: jax.Array, mask: PyTree) -> PyTree:
    """Pseudo-gradients of one worker; None for leaves that do not take part."""

    def covered(path: KeyPath, p: jax.Array, x: jax.Array) -> jax.Array:
        if jnp.shape(p) != x.shape:
            raise ValueError(f"params must have the shape of init, {x.shape} for {path_name(path)}, got {jnp.shape(p)}")
        # The parameters of a missing worker may be NaN.
        return jnp.where(share > 0, x - p, 0)

    progress = map_onto(covered, params, [unboxed(anchor)])
    if mask is None:
        return progress
    return jax.tree.map(lambda takes_part, d: d if takes_part else None, _checked_mask(mask, params), progress)


def _checked_mask(mask: PyTree, params: PyTree) -> PyTree:
    """`mask` as a bare tree, once it holds True or False for each parameter."""
    check_entries("mask", "True and False", mask, params, lambda x: isinstance(x, bool | np.bool_))
    return unboxed(mask)


def _pull(params: optax.Params, state: OuterState, *, retain: Number = 0.0, mask: PyTree = None) -> optax.Params:
    """The `pull` of every `OuterMomentum`."""
    _checks.constant("retain", retain, "[0, 1]")

    def mixed(p: jax.Array, x: jax.Array) -> jax.Array:
        if _checks.is_number(retain) and retain == 0:
            return x
        own, common = (a.astype(arithmetic_dtype(a.dtype)) for a in (p, x))
        share = jnp.asarray(retain, jnp.finfo(common.dtype).dtype)
        return (common + share * (own - common)).astype(p.dtype)

    if mask is None:
        return jax.tree.map(mixed, params, state.anchor)
    checked = _checked_mask(mask, params)
    # Below an entry of the mask is a parameter, perhaps in a box.
    return jax.tree.map(lambda ok, p, x: jax.tree.map(mixed, p, x) if ok else p, checked, params, state.anchor)
