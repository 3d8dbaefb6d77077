"""Argument checks. Every message names the argument, the allowed set and the value that was given.

Arrays, tracers and schedules are never range-checked: their values are unknown when a rule is built.
"""

import numbers
import reprlib
import sys
import warnings
from types import FrameType
from typing import TypeGuard

import numpy as np

_PACKAGE = __name__.partition(".")[0]


# The most characters of a value in a message.
_SHOWN = 80


def is_number(value: object) -> TypeGuard[float]:
    """Whether `value` is a real number known now: Python's or NumPy's, no bool, no array."""
    return isinstance(value, numbers.Real | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def is_schedule(value: object) -> bool:
    """Whether `value` is a function of the step. A class, such as a dtype, is callable but no schedule.

    Nor is a function of this package or Optax that makes a rule or a schedule when it is called.
    """
    return callable(value) and not isinstance(value, type) and not uncalled(value)


def is_scalar_array(value: object) -> bool:
    """Whether `value` is a JAX or NumPy array, or a tracer, without axes and with a real dtype."""
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return False
    try:
        return np.dtype(value.dtype).kind not in "cbOUSmM"
    except TypeError:  # a key of JAX's generator, or a tensor of another library
        return False


def is_array(value: object) -> bool:
    """Whether `value` is a scalar array or a tracer, and no number of NumPy's: its value is never looked at."""
    return is_scalar_array(value) and not is_number(value)


def scalar(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` can be a coefficient: number, scalar array or schedule."""
    if not (is_number(value) or is_scalar_array(value) or is_schedule(value)):
        raise TypeError(f"{name} must be a number, a scalar array or a schedule of the step, got {shown(value)}")


def within(name: str, value: object, interval: str) -> None:
    """Raise unless `value` is a coefficient and, where it is a number, lies in `interval`, e.g. ``"[0, 1)"``."""
    scalar(name, value)
    if not is_number(value):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def finite(name: str, value: object) -> None:
    """Raise unless `value` is a coefficient and, where it is a number, finite."""
    within(name, value, "(-inf, inf)")


def constant(name: str, value: object, interval: str) -> None:
    """Raise unless `value` is a scalar array or a number in `interval`; for what takes no schedule."""
    if not (is_number(value) or is_scalar_array(value)):
        raise TypeError(f"{name} must be a number or a scalar array, got {shown(value)}")
    within(name, value, interval)


def number(name: str, value: object, interval: str) -> None:
    """Raise unless `value` is a number in `interval`; for arguments that must be known when a rule is built."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {shown(value)}{static(name, value)}")
    within(name, value, interval)


def integer(name: str, value: object, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if not (is_number(value) and float(value).is_integer()):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}{static(name, value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def seed(value: float) -> None:
    """Raise unless `value` is a seed of stochastic rounding: a whole number that 32 bits hold."""
    integer("seed", value, 0)
    if value >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {value!r}")


def choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    # The types first: an array is equal to nothing, or to all.
    if not any(isinstance(value, type(x)) and value == x for x in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def flag(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is True or False; a traced flag cannot choose a program."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}{static(name, value)}")


def static(name: str, value: object) -> str:
    """The hint in an error for an array from Optax in place of a value that a program is compiled for."""
    if not hasattr(value, "dtype") or is_number(value) or not _is_called_by_optax():
        return ""
    return f"; an array cannot stand for it: name it in optax.inject_hyperparams(..., static_args={name!r})"


def _is_called_by_optax() -> bool:
    """Whether Optax gave the arguments that are checked now, as `optax.inject_hyperparams` does."""
    frame: FrameType | None = sys._getframe(1)
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] != "optax":
        frame = frame.f_back
    return frame is not None


def transformation(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` has the `init` and `update` of an Optax transformation."""
    if not is_transformation(value):
        hint = "; scale_by_momentum(rule) makes one of a rule" if _is_rule(value) else ""
        raise TypeError(f"{name} must be a transformation with init and update, got {shown(value)}{hint}")


def state(name: str, value: object) -> None:
    """Raise `TypeError` for a transformation, a rule, a function, a class or a number in place of an optimizer's state.

    A state may be any tree, so that a tree of something else cannot be told from one without velocities.
    """
    if is_transformation(value) or callable(value) or is_number(value) or isinstance(value, str) or _is_rule(value):
        raise TypeError(f"{name} must be an optimizer's state, what its init or update returns, got {shown(value)}")


def is_named_tuple(x: object) -> bool:
    """Whether `x` is a NamedTuple, as the states of transformations are."""
    return isinstance(x, tuple) and hasattr(x, "_fields")


def warn(message: str) -> None:
    """A `UserWarning` at the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def is_transformation(value: object) -> bool:
    """Whether `value` has `init` and `update`, which for a class would be those of its objects."""
    return not isinstance(value, type) and hasattr(value, "init") and hasattr(value, "update")


def uncalled(value: object) -> bool:
    """Whether `value` is a function, of this package or of Optax, that makes what is wanted when it is called.

    Their schedules are all made inside another function, and no public function of a module is one.
    """
    module = (getattr(value, "__module__", None) or "").partition(".")[0]
    name = getattr(value, "__qualname__", "<")
    return callable(value) and module in (_PACKAGE, "optax") and not name.startswith("_") and "<" not in name


def shown(value: object) -> str:
    """A short text for a value in a message, whatever its size: arrays by type, states by class."""
    if uncalled(value):
        name = getattr(value, "__name__", "")
        return f"{name} itself: call it, {name}(...)"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if is_named_tuple(value):
        return "a transformation" if is_transformation(value) else f"{type(value).__name__}(...)"
    return _SHORT.repr(value)


def with_article(name: str) -> str:
    """The name of a class in a sentence: "a TraceState", "an EmptyState"."""
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"


def _is_rule(value: object) -> bool:
    return all(hasattr(value, name) for name in ("order", "lookahead", "response"))


class _Short(reprlib.Repr):
    """Texts of nested containers that print no large array, and no more than a few entries."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 3
        self.maxstring = self.maxother = _SHOWN

    def repr(self, x: object) -> str:
        """The text, cut in the middle where it is too long."""
        text = super().repr(x)
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 20]} ... {text[-15:]}"

    def repr_instance(self, x: object, level: int) -> str:
        """An array with axes as "float32[3,4]", a NamedTuple by its class."""
        shape = getattr(x, "shape", None)
        if isinstance(shape, tuple) and shape and hasattr(x, "dtype"):
            return f"{x.dtype}[{','.join(map(str, shape))}]"
        if is_named_tuple(x):
            return f"{type(x).__name__}(...)"
        return super().repr_instance(x, level)


_SHORT = _Short()
