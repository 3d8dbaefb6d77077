"""The error for a state that another optimizer made: where it differs, and the call that makes it fit."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np
import optax

from .. import _checks
from .._boxes import content
from .._typing import PyTree
from ..storage.mixed import class_names, order_of

# In the state that is expected, for what is not compared.
ANYTHING: PyTree = ...


_CONVERT = "mo.convert(opt_state, storage, like=tx.init(params)) makes it fit"


# Optax's states with a velocity that `interop.from_optax` reads, and its field.
OPTAX_VELOCITIES: dict[type, str] = {
    optax.TraceState: "trace",
    optax.EmaState: "ema",
    optax.ScaleByLionState: "mu",
    optax.ScaleByAdamState: "mu",
    optax.contrib.MuonState: "mu",
}


_MISSING = {
    "step": "counts no steps, which a schedule or the rounding of a storage reads",
    "age": "has no ages of leaves, which a special first step reads",
    "lookahead": "has no look-ahead, and this rule keeps one for eval_params",
}


_SURPLUS = {
    "age": "has ages of leaves, for a special first step, which this rule does not have",
    "gain": "has the gains of debias=True, and this optimizer has debias=False",
    "lookahead": "has the look-ahead of another rule, and this one has none",
}


class StateMismatchError(ValueError):
    """A state does not belong to the optimizer that received it."""


class AnyVelocity(NamedTuple):
    """In the state that is expected, for velocities in whatever storage. `codes`: `ANYTHING` for each velocity."""

    codes: tuple[PyTree, ...]


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """A difference between two states.

    Attributes:
      problem: A clause that says what differs.
      remedy: A clause with the call that helps.
    """

    problem: str
    remedy: str = _CONVERT


def check_kind(state: PyTree, kind: type, remedy: str | None = None) -> None:
    """Raise `StateMismatchError` unless `state` is of the class `kind`; `remedy` as for `check_state`."""
    _raise_first(_kind_mismatch(state, kind), remedy)


def check_state(state: PyTree, expected: PyTree, remedy: str | None = None) -> None:
    """Raise `StateMismatchError` at the first difference that `find_mismatch` finds.

    Args:
      state: The state that was passed to `update`.
      expected: As for `find_mismatch`.
      remedy: For a state that `convert` cannot make, the way out to name in its place.
    """
    _raise_first(find_mismatch(state, expected), remedy)


def check_leaf(path: str, stored: PyTree, wanted: type) -> None:
    """Raise `StateMismatchError` unless the stored velocity of one leaf is of the class of its storage."""
    if not isinstance(stored, wanted):
        here, there = (_checks.with_article(name) for name in (type(stored).__name__, wanted.__name__))
        _raise_first(Mismatch(f"the state keeps {path} in {here}, and this optimizer in {there}"))


def find_mismatch(state: PyTree, expected: PyTree) -> Mismatch | None:
    """The first difference between a state and the one that is expected, or None.

    Args:
      state: The state that was passed to `update`.
      expected: Of the structure that `init` gives, for any parameters; `ANYTHING` is not compared. Classes
        and which entries are None are compared; leaves are not, except for the kind of a NumPy scalar's dtype. A step
        that nothing reads is accepted.

    Returns:
      A `Mismatch`, whose two clauses together have fewer than 300 characters.
    """
    state = content(state)  # Optax masks what is in a box
    if _checks.is_named_tuple(expected):
        return _named_mismatch(state, expected)
    if isinstance(expected, tuple | list):
        return _chain_mismatch(state, expected)
    if isinstance(expected, Mapping) and isinstance(state, Mapping) and state.keys() == expected.keys():
        return _first((state[name], expected[name]) for name in expected)
    if isinstance(expected, np.generic) and np.dtype(state.dtype).kind != expected.dtype.kind:
        return Mismatch(f"the state holds {state.dtype} where this optimizer has {expected.dtype}")
    return None


def explained(
    update: Callable[..., tuple[optax.Updates, optax.OptState]], init: Callable[[optax.Params], optax.OptState]
) -> Callable[..., tuple[optax.Updates, optax.OptState]]:
    """The `update` of a chain with an error for a state that does not fit, in place of Optax's own errors."""

    def check(state: PyTree, params: PyTree) -> None:
        check_state(state, jax.eval_shape(init, params))

    def run(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: object
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        if _checks.is_named_tuple(state) or isinstance(state, Mapping):
            # A chain would take its fields for the states of its members.
            check(state, like)
        try:
            return update(updates, state, params, **extra)
        except StateMismatchError:
            raise
        except (AttributeError, TypeError, ValueError):
            check(state, like)
            raise

    return run


def is_optax_velocity(x: object) -> bool:
    """Whether `x` is a state of Optax's with a velocity."""
    return type(x) in OPTAX_VELOCITIES


def without_momentum() -> optax.GradientTransformation:
    """`optax.identity` in the place of a momentum; it refuses the state of one instead of dropping its velocity."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        if _has(state, lambda x: _is_momentum(x) or is_optax_velocity(x)):
            _raise_first(Mismatch(f"the state must be of an optimizer without momentum, got {_kind(state)}"))
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _raise_first(found: Mismatch | None, remedy: str | None = None) -> None:
    if found is not None:
        raise StateMismatchError(f"{found.problem}: {remedy or found.remedy}")


def _first(pairs: Iterable[tuple[PyTree, PyTree]]) -> Mismatch | None:
    return next(filter(None, (find_mismatch(old, new) for old, new in pairs)), None)


def _chain_mismatch(state: PyTree, expected: "tuple[PyTree, ...] | list[PyTree]") -> Mismatch | None:
    """The first difference from a chain of states."""
    if not isinstance(state, tuple | list) or _checks.is_named_tuple(state) or len(state) != len(expected):
        return Mismatch(f"the state must be a chain of {len(expected)} states, got {_kind(state)}", _remedy(state))
    return _first(zip(state, expected, strict=True))


def _kind_mismatch(state: PyTree, kind: type) -> Mismatch | None:
    if isinstance(state, kind):
        return None
    return Mismatch(f"the state must be {_checks.with_article(kind.__name__)}, got {_kind(state)}", _remedy(state))


def _named_mismatch(state: PyTree, expected: PyTree) -> Mismatch | None:
    """The first difference from a NamedTuple."""
    kind = _kind_mismatch(state, type(expected))
    if kind is not None:
        return kind
    if _is_momentum(expected):
        return _momentum_mismatch(state, expected)
    for name, old, new in zip(expected._fields, state, expected, strict=True):
        if (old is None) != (new is None) and (name != "step" or old is None):
            which = f"no {name}" if old is None else _checks.with_article(name)
            return Mismatch(f"the {type(expected).__name__} has {which}, unlike this optimizer's")
        if _is_count(new) and (not isinstance(old, tuple | list) or len(old) != len(new)):
            problem = f"the {type(expected).__name__} must have {len(new)} entries in {name}, got {_kind(old)}"
            return Mismatch(problem, _remedy(state))
    return _first(zip(state, expected, strict=True))


def _momentum_mismatch(state: PyTree, expected: PyTree) -> Mismatch | None:
    """The first difference of two states of `scale_by_momentum`."""
    return _storage_mismatch(state, expected) or _order_mismatch(state, expected) or _counts_mismatch(state, expected)


def _storage_mismatch(state: PyTree, expected: PyTree) -> Mismatch | None:
    if isinstance(expected.velocity, AnyVelocity):
        return None
    names, wanted_names = class_names(state.velocity), class_names(expected.velocity)
    if names == wanted_names:
        return None
    stored, wanted = (" and ".join(map(_checks.with_article, several)) for several in (names, wanted_names))
    return Mismatch(f"the state keeps its velocities in {stored}, and this optimizer in {wanted}", _remedy(state))


def _order_mismatch(state: PyTree, expected: PyTree) -> Mismatch | None:
    order, wanted = (order_of(x.velocity) for x in (state, expected))
    if order == wanted:
        return None
    return Mismatch(
        f"the state is of another rule: it keeps {order} velocities of each leaf and this one {wanted}",
        "mo.convert cannot make these of those; begin with tx.init(params)",
    )


def _counts_mismatch(state: PyTree, expected: PyTree) -> Mismatch | None:
    """The first difference in what a state counts beside its velocities."""
    for name, what in _MISSING.items():
        if getattr(state, name) is None and getattr(expected, name) is not None:
            return Mismatch(f"the state {what}")
    for name, what in _SURPLUS.items():
        if getattr(state, name) is not None and getattr(expected, name) is None:
            return Mismatch(f"the state {what}")
    if state.gain is None and expected.gain is not None:
        return Mismatch(
            "the state has no gains, which debias=True reads",
            "they depend on the rule and on every step so far, so mo.convert cannot add them; continue with "
            "debias=False or begin with tx.init(params)",
        )
    return None


def _remedy(state: PyTree) -> str:
    """The call that makes this optimizer's state of `state`."""
    if isinstance(state, Mapping) or _has(state, lambda x: isinstance(x, Mapping) and "velocity" in x):
        return (
            "restored without its NamedTuples; mo.checkpoint.from_fields(mo.checkpoint.fields(opt_state), "
            "tx.init(params)) gives them back"
        )
    if not _has(state, _is_momentum) and _has(state, is_optax_velocity):
        return "mo.interop.from_optax(tx.init(params), opt_state) takes Optax's velocity over, else mo.convert"
    return _CONVERT


def _has(state: PyTree, test: Callable[[PyTree], bool]) -> bool:
    """Whether a node of the tree passes a test."""
    return any(map(test, jax.tree.leaves(state, is_leaf=test)))


def _is_count(x: object) -> bool:
    """Whether `x` is a tuple that says nothing but its length."""
    return isinstance(x, tuple) and not _checks.is_named_tuple(x) and all(entry is ANYTHING for entry in x)


def _is_momentum(x: PyTree) -> bool:
    # By its fields: the class is in `transform`, which checks its states here.
    return _checks.is_named_tuple(x) and x._fields == ("velocity", "step", "age", "gain", "lookahead")


def _kind(state: PyTree) -> str:
    kind = _checks.with_article(type(state).__name__)
    return f"{kind} of {len(state)}" if isinstance(state, tuple | list) and not _checks.is_named_tuple(state) else kind
