"""What to say of a state that another optimizer made: what differs, and the call that converts it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

# In the state that is expected, for what is not looked at.
ANYTHING: Any = ...


_CONVERT = "mo.convert(opt_state, storage, like=tx.init(params)) makes it fit"


# Optax's states with a velocity, as `interop.from_optax` reads them.
_OPTAX = (optax.TraceState, optax.EmaState, optax.ScaleByLionState, optax.ScaleByAdamState)


_WITHOUT = {
    "step": "counts no steps, which a schedule or the rounding of a storage reads",
    "age": "has no ages of leaves, which a first step of its own reads",
}


_WITH = {
    "age": "has ages of leaves, for a first step of its own, which this rule has not",
    "gain": "has the gains of debias=True, and this optimizer has debias=False",
}


class StateMismatchError(ValueError):
    """A state is not one of the optimizer that got it."""


def check_kind(state: Any, kind: type) -> None:
    """Raise `StateMismatchError` unless `state` is of the class `kind`."""
    if not isinstance(state, kind):
        raise StateMismatchError(_other_kind(state, kind))


def check_state(state: Any, expected: Any) -> None:
    """Raise `StateMismatchError` at the first difference that `describe_mismatch` finds."""
    problem = describe_mismatch(state, expected)
    if problem:
        raise StateMismatchError(problem)


def describe_mismatch(state: Any, expected: Any) -> str | None:
    """Where a state first differs from the one that is expected, with the way out; None if nowhere.

    Args:
      state: What `update` was given.
      expected: Of the structure that `init` gives, for any parameters, or with `...` for what is not looked at: classes
        and what is None are compared, leaves are not, but for the kind of a NumPy scalar. A step that nobody reads does
        no harm.

    Returns:
      A sentence of less than 300 characters.
    """
    if _is_named(expected):
        return _named_mismatch(state, expected)
    if isinstance(expected, tuple | list):
        if not isinstance(state, tuple | list) or _is_named(state) or len(state) != len(expected):
            return f"the state must be a chain of {len(expected)} states, got {_kind(state)}: {_way_out(state)}"
        return _first(zip(state, expected, strict=True))
    if isinstance(expected, Mapping) and isinstance(state, Mapping) and state.keys() == expected.keys():
        return _first((state[name], expected[name]) for name in expected)
    if isinstance(expected, np.generic) and np.dtype(state.dtype).kind != expected.dtype.kind:
        return f"the state holds {state.dtype} where this optimizer has {expected.dtype}: {_CONVERT}"
    return None


def explained(update: Callable[..., Any], init: Callable[[Any], Any]) -> Callable[..., Any]:
    """The `update` of a chain, whose errors say what is wrong with the state if something is, as Optax's own do not."""

    def run(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if _is_named(state) or isinstance(state, Mapping):
            # A chain would take its fields for the states of its members.
            check_state(state, jax.eval_shape(init, updates if params is None else params))
        try:
            return update(updates, state, params, **extra)
        except StateMismatchError:
            raise
        except (AttributeError, TypeError, ValueError):
            check_state(state, jax.eval_shape(init, updates if params is None else params))
            raise

    return run


def without_momentum() -> optax.GradientTransformation:
    """`optax.identity` in the place of a momentum, which refuses the state of one rather than to drop its velocity."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        if _found(state, lambda x: _is_momentum(x) or isinstance(x, _OPTAX)):
            raise StateMismatchError(
                f"the state must be of an optimizer without momentum, got {_kind(state)}: {_CONVERT}"
            )
        return updates, state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _first(pairs: Iterable[tuple[Any, Any]]) -> str | None:
    return next(filter(None, (describe_mismatch(old, new) for old, new in pairs)), None)


def _named_mismatch(state: Any, expected: Any) -> str | None:
    """The first difference from a NamedTuple."""
    if not isinstance(state, type(expected)):
        return _other_kind(state, type(expected))
    if _is_momentum(expected):
        return _momentum_mismatch(state, expected)
    for name, old, new in zip(expected._fields, state, expected, strict=True):
        if (old is None) != (new is None) and (name != "step" or old is None):
            has = "has no" if old is None else "has a"
            return f"the {type(expected).__name__} {has} {name}, unlike this optimizer's: {_CONVERT}"
    return _first(zip(state, expected, strict=True))


def _momentum_mismatch(state: Any, expected: Any) -> str | None:
    """The first difference of two states of `scale_by_momentum`."""
    if type(state.velocity) is not type(expected.velocity):
        kept, wanted = _kind(state.velocity), _kind(expected.velocity)
        return f"the state keeps its velocities in {kept}, and this optimizer in {wanted}: {_way_out(state)}"
    order, wanted_order = len(state.velocity[0]), len(expected.velocity[0])
    if order != wanted_order:
        return (
            f"the state is of another rule: it keeps {order} velocities of each leaf and this one {wanted_order}, "
            "which mo.convert cannot make of them; begin with tx.init(params)"
        )
    for name, what in _WITHOUT.items():
        if getattr(state, name) is None and getattr(expected, name) is not None:
            return f"the state {what}: {_CONVERT}"
    for name, what in _WITH.items():
        if getattr(state, name) is not None and getattr(expected, name) is None:
            return f"the state {what}: {_CONVERT}"
    if state.gain is None and expected.gain is not None:
        return (
            "the state has no gains, which debias=True reads: they depend on the rule and on every step so far, so "
            "that mo.convert cannot add them; go on with debias=False or begin with tx.init(params)"
        )
    return None


def _other_kind(state: Any, kind: type) -> str:
    return f"the state must be a {kind.__name__}, got {_kind(state)}: {_way_out(state)}"


def _way_out(state: Any) -> str:
    """The call that makes this optimizer's state of `state`."""
    if isinstance(state, Mapping) or _found(state, lambda x: isinstance(x, Mapping) and "velocity" in x):
        return (
            "restored without its NamedTuples; mo.checkpoint.from_fields(mo.checkpoint.fields(opt_state), "
            "tx.init(params)) gives them back"
        )
    if not _found(state, _is_momentum) and _found(state, lambda x: isinstance(x, _OPTAX)):
        return "mo.interop.from_optax(tx.init(params), opt_state) takes Optax's velocity over, else mo.convert"
    return _CONVERT


def _found(state: Any, test: Callable[[Any], bool]) -> bool:
    return any(map(test, jax.tree.leaves(state, is_leaf=test)))


def _is_named(x: Any) -> bool:
    return isinstance(x, tuple) and hasattr(x, "_fields")


def _is_momentum(x: Any) -> bool:
    # By its fields: the class is in `transform`, which checks its states here.
    return _is_named(x) and x._fields == ("velocity", "step", "age", "gain")


def _kind(state: Any) -> str:
    if isinstance(state, tuple | list) and not _is_named(state):
        return f"a {type(state).__name__} of {len(state)}"
    return f"a {type(state).__name__}"
