"""Published methods of outer momentum, each one `outer_momentum` around an optimizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ... import _checks
from ..._typing import Number
from ...filters.coefficients import Scalar
from ...optimizers.sgd import sgd
from ...rules.sums_and_averages import heavy_ball
from ...storage._by_leaf import AnyStorage
from ...storage.protocol import times
from ...transform import scale_by_momentum
from .momentum import OuterMomentum, outer_momentum


def local_sgd(*, exchange: str = "exact") -> OuterMomentum:
    """Local SGD: workers continue from their average, without outer momentum.

    Args:
      exchange: As for `outer_momentum`.

    Reference:
      McMahan et al., AISTATS 2017, arXiv:1602.05629; Stich, ICLR 2019, arXiv:1805.09767.
    """
    return outer_momentum(optax.sgd(1.0), exchange=exchange)


def diloco(
    learning_rate: Scalar = 0.7,
    momentum: Scalar = 0.9,
    *,
    storage: AnyStorage = "float32",
    exchange: str = "exact",
) -> OuterMomentum:
    r"""DiLoCo: Nesterov's momentum on pseudo-gradients, $v' = \mu v + \Delta$, $x' = x - \eta (\mu v' + \Delta)$.

    Args:
      learning_rate: The outer learning rate, a number, scalar array or schedule of the number of exchanges.
      momentum: The decay of Nesterov's momentum, likewise.
      storage: The storage of the outer velocity, see `scale_by_momentum`.
      exchange: As for `outer_momentum`.

    Reference:
      Douillard et al., 2023, arXiv:2311.08105.
    """
    return outer_momentum(sgd(learning_rate, momentum, nesterov=True, storage=storage), exchange=exchange)


def bmuf(
    workers: int,
    block_rate: float = 1.0,
    *,
    momentum: "Scalar | None" = None,
    nesterov: bool = False,
    storage: AnyStorage = "float32",
) -> OuterMomentum:
    r"""Blockwise model-update filtering: $v' = \eta v + \zeta \Delta$, $x' = x - v'$, with $\eta = 1 - 1/N$ by default.

    Args:
      workers: Their number N, a whole number from 1.
      block_rate: $\zeta$.
      momentum: $\eta$; None means $1 - 1/N$.
      nesterov: Whether the workers start from $x' - \eta v'$ instead, the paper's Nesterov form.
      storage: The storage of the outer velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.

    Reference:
      Chen and Huo, ICASSP 2016.
    """
    _checks.integer("workers", workers, 1)
    _checks.number("block_rate", block_rate, "(0, inf)")
    decay = 1 - 1 / int(workers) if momentum is None else momentum
    return outer_momentum(sgd(block_rate, decay, nesterov=nesterov, storage=storage))


def slowmo(momentum: Scalar = 0.5, slow_rate: float = 1.0, *, storage: AnyStorage = "float32") -> OuterMomentum:
    r"""SlowMo: $v' = \beta v + \Delta / \gamma$, $x' = x - \alpha \gamma v'$; $\gamma$ is the inner learning rate.

    `exchange` and `sync` need it: `outer.sync(params, state, axis_name="workers", inner_learning_rate=rate)`.

    Args:
      momentum: $\beta$.
      slow_rate: $\alpha$.
      storage: The storage of the outer velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type; at `exchange` without a number or scalar array as
        `inner_learning_rate`.

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


def _times_inner_rate(factor: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformationExtraArgs:
    """Multiply by a function of the inner learning rate, an argument of each exchange."""

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        inner_learning_rate: Number | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra
        _checks.constant("inner_learning_rate", inner_learning_rate, "[0, inf)")
        scale = factor(jnp.asarray(inner_learning_rate))
        return jax.tree.map(lambda u: times(u, scale), updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
