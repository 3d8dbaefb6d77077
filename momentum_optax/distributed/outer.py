r"""Outer momentum: workers that train on their own for many steps, and momentum on what they found between.

Every so often the workers compare notes. How far a worker went, $\Delta_i = x - x_i$, is a pseudo-gradient at the
common point x from which all set out; their mean goes through any optimizer, and from the new x all set out again. The
state is the same on every worker. Exchanges are JAX's own collectives over a named axis: that of `shard_map` on a mesh,
over as many processes as it has, or that of `vmap` for workers on one device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._export import serializable
from ..apply import apply_updates
from ..optimizers.sgd import sgd
from ..rules.sums_and_averages import heavy_ball
from ..state.mismatch import check_state
from ..storage import Storage
from ..storage.protocol import arithmetic_dtype, times, whole_along
from ..transform import scale_by_momentum


@serializable
class OuterState(NamedTuple):
    """What outer momentum keeps.

    Attributes:
      anchor: The common point, a tree like the parameters; the same on every worker.
      momentum: The state of the optimizer of pseudo-gradients; the same on every worker.
      residual: A tree like the parameters: what a worker has not been able to say yet; its own. None where exchanges
        are exact.
    """

    anchor: Any
    momentum: Any
    residual: Any


class OuterMomentum(NamedTuple):
    """The functions of an outer optimizer; all of them pure.

    Attributes:
      init: `init(params) -> state`, on every worker from the same parameters.
      exchange: `exchange(params, state, *, axis_name, weight=1.0, only=None, **extra) -> state`: pseudo-gradients are
        averaged over the workers and move the anchor. For workers that are missing `weight` is 0, and in general what a
        worker counts for; where all are missing nothing changes. `axis_name` is that of the workers, or None for a
        single one, without `shard_map` or `vmap`. `only` is a tree of bool like the parameters: the
        leaves that take part, one fragment of a stream; for the others nothing changes. `extra` goes to the optimizer.
      adopt: `adopt(params, state, *, keep=0.0, only=None) -> params`: the anchor, mixed with a share `keep` of what the
        worker has now: later than the exchange where communication overlaps with steps.
    """

    init: Callable[[Any], OuterState]
    exchange: Callable[..., OuterState]
    adopt: Callable[..., Any]

    def sync(self, params: Any, state: OuterState, **arguments: Any) -> tuple[Any, OuterState]:
        """`exchange` and `adopt` in one: the parameters to set out with, and the state."""
        state = self.exchange(params, state, **arguments)
        return self.adopt(params, state, only=arguments.get("only")), state


def outer_momentum(tx: optax.GradientTransformation, *, exchange: str = "exact") -> OuterMomentum:
    r"""Run an optimizer on pseudo-gradients, $x \leftarrow x + \mathrm{tx}(\sum_i w_i (x - x_i) / \sum_i w_i)$.

        outer = mo.outer.outer_momentum(mo.sgd(0.7, 0.9, nesterov=True, storage="int8"))
        state = outer.init(params)
        ...                                                    # some steps of any inner optimizer on each worker
        params, state = outer.sync(params, state, axis_name="workers")      # under shard_map or vmap

    With `tx = optax.sgd(1.0)` all workers go on from their average.

    Args:
      tx: Any optimizer; it sees pseudo-gradients as gradients, and the anchor as parameters. With `only` it must
        leave alone what has a gradient of None, as everything built on `scale_by_momentum` does.
      exchange: "exact" sums in the parameters' dtype. "int8" sends a byte for each parameter and 4 for each row, and
        what rounding lost is said with the next exchange (error feedback); each worker receives those of all.

    Returns:
      An `OuterMomentum`.

    Raises:
      TypeError: If `tx` is no optimizer.
      ValueError: If `exchange` is another word.

    Reference:
      Douillard et al., DiLoCo, 2023, arXiv:2311.08105; in fragments: Douillard et al., 2025, arXiv:2501.18512. Error
      feedback: Karimireddy et al., ICML 2019, arXiv:1901.09847.
    """
    _checks.transformation("tx", tx)
    _checks.choice("exchange", exchange, ("exact", "int8"))
    run = optax.with_extra_args_support(tx)
    exact = exchange == "exact"

    def init(params: Any) -> OuterState:
        residual = None if exact else jax.tree.map(jnp.zeros_like, params)
        # A copy: parameters and state are donated together.
        return OuterState(jax.tree.map(lambda p: jnp.array(p, copy=True), params), tx.init(params), residual)

    def swap(
        params: Any, state: OuterState, *, axis_name: Any, weight: Any = 1.0, only: Any = None, **extra: Any
    ) -> OuterState:
        check_state(state, OuterState(..., ..., None if exact else ...))
        share = _share(weight, axis_name)
        # What a missing worker holds may be no number at all.
        gone = jax.tree.map(lambda x, p: jnp.where(share > 0, x - p, 0), state.anchor, params)
        gone = gone if only is None else _chosen(gone, only)
        residual = state.residual
        if exact:
            mean = jax.tree.map(lambda d: _sum(d * share.astype(d.dtype), axis_name), gone)
        else:
            mean, residual = _sent(gone, residual, share, axis_name)
        # The mean, and with it the state, is the same on every worker, whether JAX can tell or not.
        with whole_along(axis_name):
            updates, momentum = run.update(mean, state.momentum, state.anchor, **extra)
        new = OuterState(apply_updates(state.anchor, updates), momentum, residual)
        anyone = _sum(share, axis_name) > 0
        chosen: OuterState = jax.tree.map(lambda a, b: jnp.where(anyone, a, b), new, state)
        return chosen

    def adopt(params: Any, state: OuterState, *, keep: Any = 0.0, only: Any = None) -> Any:
        _checks.within("keep", keep, "[0, 1]")

        def mixed(p: Any, x: Any, taking_part: bool) -> Any:
            if not taking_part:
                return p
            if _checks.is_number(keep) and keep == 0:
                return x
            mine, common = (a.astype(arithmetic_dtype(a.dtype)) for a in (p, x))
            share = jnp.asarray(keep, jnp.finfo(common.dtype).dtype)
            return (common + share * (mine - common)).astype(p.dtype)

        return jax.tree.map(mixed, params, state.anchor, _everywhere(params) if only is None else only)

    return OuterMomentum(init, swap, adopt)


def averaging(*, exchange: str = "exact") -> OuterMomentum:
    """Workers go on from their average: local SGD without momentum between.

    Args:
      exchange: As for `outer_momentum`.

    Reference:
      McMahan et al., AISTATS 2017, arXiv:1602.05629; Stich, ICLR 2019, arXiv:1805.09767.
    """
    return outer_momentum(optax.sgd(1.0), exchange=exchange)


def diloco(
    learning_rate: Any = 0.7,
    momentum: Any = 0.9,
    *,
    storage: str | Storage = "float32",
    exchange: str = "exact",
) -> OuterMomentum:
    r"""DiLoCo: Nesterov's momentum on pseudo-gradients, $v' = \mu v + \Delta$, $x' = x - \eta (\mu v' + \Delta)$.

    Args:
      learning_rate: The outer rate, a number, scalar array or schedule of the exchanges.
      momentum: Of pseudo-gradients, likewise.
      storage: How the outer velocity is kept.
      exchange: As for `outer_momentum`.

    Reference:
      Douillard et al., 2023, arXiv:2311.08105.
    """
    return outer_momentum(sgd(learning_rate, momentum, nesterov=True, storage=storage), exchange=exchange)


def bmuf(
    workers: int,
    block_rate: float = 1.0,
    *,
    momentum: Any = None,
    nesterov: bool = False,
    storage: str | Storage = "float32",
) -> OuterMomentum:
    r"""Blockwise model-update filtering: $v' = \eta v + \zeta \Delta$, $x' = x - v'$, with $\eta = 1 - 1/N$ by default.

    Args:
      workers: How many there are, N; a whole number from 1.
      block_rate: $\zeta$.
      momentum: $\eta$, where it is not to be $1 - 1/N$.
      nesterov: Whether the workers set out from $x' - \eta v'$ instead, the paper's Nesterov form.
      storage: How the outer velocity is kept.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Chen and Huo, ICASSP 2016.
    """
    _checks.integer("workers", workers, 1)
    _checks.number("block_rate", block_rate, "(0, inf)")
    decay = 1 - 1 / int(workers) if momentum is None else momentum
    return outer_momentum(sgd(block_rate, decay, nesterov=nesterov, storage=storage))


def slowmo(momentum: Any = 0.5, slow_rate: float = 1.0, *, storage: str | Storage = "float32") -> OuterMomentum:
    r"""SlowMo: $v' = \beta v + \Delta / \gamma$, $x' = x - \alpha \gamma v'$; $\gamma$ is the inner learning rate.

    `exchange` and `sync` need it: `outer.sync(params, state, axis_name="workers", inner_learning_rate=rate)`.

    Args:
      momentum: $\beta$.
      slow_rate: $\alpha$.
      storage: How the outer velocity is kept.

    Reference:
      Wang et al., ICLR 2020, arXiv:1910.00643.
    """
    _checks.within("momentum", momentum, "(-1, 1)")
    _checks.number("slow_rate", slow_rate, "(0, inf)")
    return outer_momentum(
        optax.chain(
            _times_inner_rate(lambda rate: 1 / jnp.where(rate == 0, 1, rate)),
            scale_by_momentum(heavy_ball(momentum), storage=storage),
            _times_inner_rate(lambda rate: -slow_rate * rate),
        )
    )


def _times_inner_rate(factor: Callable[[Any], Any]) -> optax.GradientTransformationExtraArgs:
    """Multiply by a function of the inner learning rate, which comes with each exchange."""

    def update(updates: Any, state: Any, params: Any = None, *, inner_learning_rate: Any, **extra: Any) -> Any:
        del params, extra
        scale = factor(jnp.asarray(inner_learning_rate))
        return jax.tree.map(lambda u: times(u, scale), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _sum(x: jax.Array, axis_name: Any) -> jax.Array:
    """The sum over the workers; over the only one for no axis."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def _gathered(x: jax.Array, axis_name: Any) -> jax.Array:
    """One entry for each worker along a first axis."""
    return x[None] if axis_name is None else jax.lax.all_gather(x, axis_name)


def _everywhere(tree: Any) -> Any:
    return jax.tree.map(lambda _: True, tree)


def _chosen(tree: Any, only: Any) -> Any:
    """`tree` with None where a leaf does not take part."""
    return jax.tree.map(lambda taking_part, x: x if taking_part else None, only, tree)


def _share(weight: Any, axis_name: Any) -> jax.Array:
    """What this worker counts for, of all that do."""
    mine = jnp.asarray(weight, jnp.result_type(weight, jnp.float32))
    total = _sum(mine, axis_name)
    return mine / jnp.where(total > 0, total, 1)


def _sent(gone: Any, residual: Any, share: jax.Array, axis_name: Any) -> tuple[Any, Any]:
    """The weighted mean of what all workers say in bytes, and what this one has not said yet."""

    def one(d: Any, r: Any) -> tuple[Any, Any]:
        if d is None:
            return None, r
        wanted = d + r
        codes, scale = _to_bytes(wanted)
        # Bytes and scales travel; decoding is each receiver's own.
        all_codes, all_scales = (_gathered(x, axis_name) for x in (codes, scale))
        shares = _gathered(share, axis_name).reshape(-1, *(1,) * d.ndim)
        mean = (all_codes.astype(jnp.float32) * (all_scales * shares).astype(jnp.float32)).sum(0).astype(d.dtype)
        said = (codes.astype(jnp.float32) * scale).astype(d.dtype)
        # A worker that is missing has said nothing.
        return mean, jnp.where(share > 0, wanted - said, r)

    treedef: Any = jax.tree.structure(residual)
    pairs = map(one, treedef.flatten_up_to(gone), jax.tree.leaves(residual))
    means, residuals = zip(*pairs, strict=True) if treedef.num_leaves else ((), ())
    return treedef.unflatten(means), treedef.unflatten(residuals)


def _to_bytes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whole multiples of a scale for each row, to nearest: what is lost is sent later."""
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axes, keepdims=True) * np.float32(1 / 127)
    wide = x.astype(arithmetic_dtype(x.dtype))
    codes = jnp.round(wide / jnp.where(scale > 0, scale, 1).astype(wide.dtype)).astype(jnp.int8)
    return codes, scale
