"""`eval_params`: the point to evaluate, for rules that store a look-ahead point."""

import dataclasses
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._paths import slash_path
from .._tree import find_all, unboxed
from .._typing import Count, KeyPath, Number, PyTree
from ..filters import Filter
from ..filters.coefficients import Scalar
from ..storage.mixed import codes_of
from ..transform import MomentumState
from ..wrappers.with_momentum import WithMomentumState
from .displacement import displaced


def eval_params(
    opt_state: optax.OptState, params: optax.Params, learning_rate: "Scalar | None" = None, path: str | None = None
) -> optax.Params:
    r"""The point to evaluate and keep, $x = \theta + \eta\,\ell \cdot v$, for rules that store a look-ahead point.

        x = mo.eval_params(state, params, 0.1)        # of mo.sgd(0.1, mo.nesterov(0.9)): the rate that follows the rule
        x = mo.eval_params(state, params)             # of mo.with_momentum(optax.adam(rate), rule)

    `nesterov`, `triple_momentum`, `schedule_free` and some others take their gradients at the stored parameters, which
    are not the sequence that their theory is about. Their states keep the velocities v and, since the last update, the
    rule's `lookahead` l; only the place of the rule among the other transformations is not in them.

    Args:
      opt_state: The optimizer's state with the rule's in it: in any chain, mask, partition or wrapper, and the live one
        of an `nnx.Optimizer` too. Rules without a look-ahead are passed over; several with one are taken together where
        they are for different parameters.
      params: The stored parameters that belong to the state.
      learning_rate: eta, that of the last step. For a rule before the learning rate, as in `mo.sgd`: the rate, a number
        or a scalar array, or the schedule where the state counts steps. For a rule behind it: -1, as its velocities are
        displacements; None for `with_momentum`, whose state says so.
      path: Which rule, where several are for the same parameters or have different rates: the place of its state, such
        as "1" or "0/momentum", or of a part of the state with it inside. An error lists the places.

    Returns:
      A tree like `params`, of the same dtypes. Exact for every schedule of the rule's coefficients.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If no rule in `opt_state` has a look-ahead, or there is none at `path`; if several are for the same
        parameters; if `learning_rate` is missing, or given for `with_momentum`; if it is a schedule and the state does
        not say of which step; if `params` are not like the state; if the rule is debiased, which leaves no such point;
        if the look-ahead is unknown, as after `checkpoint.migrate`.

    Reference:
      See the rules; for example Van Scoy, Freeman and Lynch, IEEE Control Systems Letters 2018.
    """
    _check_arguments(opt_state, learning_rate, path)
    bare = unboxed(opt_state)
    places = _chosen([place for place in _places(bare) if place.state.lookahead is not None], path)
    given = learning_rate is not None and not (_checks.is_number(learning_rate) and learning_rate == -1)
    if given and all(place.is_behind for place in places):
        raise ValueError(
            "learning_rate must be None for with_momentum, whose rule is behind the rate, got "
            f"{_checks.shown(learning_rate)}"
        )
    for place in places:
        rate = -1.0 if place.is_behind else _rate(place, learning_rate, bare)
        params = displaced(params, place.state, _known(place), rate)
    return params


@dataclasses.dataclass(frozen=True)
class _Place:
    """A rule in an optimizer's state.

    Attributes:
      name: The path of its state, such as "1" or "0/momentum"; "" for the state itself.
      state: Its state.
      is_behind: Whether the state says that the rule is behind the learning rate.
    """

    name: str
    state: MomentumState
    is_behind: bool

    @property
    def parameters(self) -> set[str]:
        """The paths of the parameters that it is for."""
        first = codes_of(self.state.velocity)[:1]
        return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(first)}


def _places(tree: PyTree, above: KeyPath = (), is_behind: bool = False) -> Iterator[_Place]:
    """The states of `scale_by_momentum` in a bare state."""
    found: list[tuple[KeyPath, MomentumState | WithMomentumState]] = find_all(tree, MomentumState, WithMomentumState)
    for path, node in found:
        here = (*above, *path)
        if isinstance(node, MomentumState):
            yield _Place(slash_path(here), node, is_behind)
            continue
        yield from _places(node.inner, (*here, jax.tree_util.GetAttrKey("inner")))
        yield from _places(node.momentum, (*here, jax.tree_util.GetAttrKey("momentum")), is_behind=True)


def _chosen(places: list[_Place], path: str | None) -> list[_Place]:
    """The places that `path` is or contains, or all of them."""
    if not places:
        raise ValueError(
            "opt_state must hold a rule with a look-ahead, such as nesterov, got none: then the parameters themselves "
            "are the point to evaluate"
        )
    names = ", ".join([repr(place.name) for place in places[:3]] + ["..."] * (len(places) > 3))
    chosen = [x for x in places if path is None or x.name == path or not path or x.name.startswith(f"{path}/")]
    if not chosen:
        raise ValueError(f"path must be the place of a rule with a look-ahead, of {names}, got {_checks.shown(path)}")
    for i, place in enumerate(chosen):
        if any(place.parameters & other.parameters for other in chosen[:i]):
            raise ValueError(
                f"path must say which rule, since opt_state has several with a look-ahead for the same parameters, at "
                f"{names}, got {_checks.shown(path)}"
            )
    return chosen


def _check_arguments(opt_state: object, rate: object, path: object) -> None:
    """Raise `TypeError` for an argument of the wrong type."""
    if isinstance(opt_state, Filter):
        raise TypeError(
            f"opt_state must be an optimizer's state, got {_checks.shown(opt_state)}: the state knows its rule now, "
            "mo.eval_params(opt_state, params, learning_rate)"
        )
    _checks.state("opt_state", opt_state)
    if not (rate is None or _checks.is_number(rate) or _checks.is_scalar_array(rate) or _checks.is_schedule(rate)):
        raise TypeError(
            f"learning_rate must be a number, a scalar array, a schedule or None, got {_checks.shown(rate)}"
        )
    if not isinstance(path, str | None):
        raise TypeError(f"path must be a str such as '0/momentum' or None, got {_checks.shown(path)}")


def _rate(place: _Place, rate: "Scalar | None", opt_state: PyTree) -> Number:
    """The learning rate of the last step, for a rule whose state does not say where it is."""
    if rate is None:
        raise ValueError(
            f"learning_rate must be given for the rule at {place.name!r}: the rate (a number or a schedule) where it "
            "follows the rule, as in mo.sgd, or -1 where the rule follows the rate; only with_momentum needs none"
        )
    if not callable(rate):
        return rate
    return rate(jnp.maximum(_steps_made(place.state, opt_state) - 1, 0))


def _steps_made(state: MomentumState, opt_state: PyTree) -> Count:
    """The number of steps that the learning rate's schedule has counted, or else the rule."""
    counts = [x.count for _, x in find_all(opt_state, optax.ScaleByScheduleState)]
    if len(counts) == 1:
        return cast("jax.Array", counts[0])
    if state.step is None or counts:
        raise ValueError(
            "learning_rate must be the number of the last step here, such as schedule(step - 1), got a schedule: "
            f"opt_state has {len(counts)} counts of steps to read it at"
        )
    return state.step


def _known(place: _Place) -> tuple[jax.Array, ...]:
    """The look-ahead of a rule."""
    state = place.state
    if state.gain is not None:
        raise ValueError(
            f"the rule at {place.name!r} is debiased, so that its updates lead to no such point: evaluate the "
            "parameters, or take debias=False"
        )
    ahead: tuple[jax.Array, ...] = state.lookahead or ()
    if any(not isinstance(x, jax.core.Tracer) and bool(jnp.isnan(x)) for x in ahead):
        raise ValueError(
            f"the look-ahead of the rule at {place.name!r} is unknown, since its checkpoint is older than that: the "
            "next update makes it known"
        )
    return ahead
