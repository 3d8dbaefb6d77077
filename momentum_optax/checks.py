"""Argument checks. Every message names the argument, the allowed set and the value that was given.

Arrays, tracers and schedules are never range-checked: their values are unknown when a rule is built.
"""

import numbers
from typing import Any, TypeGuard

import numpy as np


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a real number known now: Python's or NumPy's, no bool, no array."""
    return isinstance(value, numbers.Real | np.integer | np.floating) and not isinstance(value, bool | np.bool_)


def is_schedule(value: Any) -> bool:
    """Whether `value` is a function of the step. A class, such as a dtype, is callable but no schedule."""
    return callable(value) and not isinstance(value, type)


def is_scalar_array(value: Any) -> bool:
    """Whether `value` is a JAX or NumPy array, or a tracer, without axes and with a real dtype."""
    if getattr(value, "shape", None) != () or not hasattr(value, "dtype"):
        return False
    return np.dtype(value.dtype).kind not in "cbOUSmM"


def is_array(value: Any) -> bool:
    """Whether `value` is a scalar array or a tracer, and no number of NumPy's: its value is never looked at."""
    return is_scalar_array(value) and not is_number(value)


def scalar(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` can be a coefficient: number, scalar array or schedule."""
    if not (is_number(value) or is_scalar_array(value) or is_schedule(value)):
        raise TypeError(f"{name} must be a number, a scalar array or a schedule of the step, got {value!r}")


def within(name: str, value: Any, interval: str) -> None:
    """Raise unless `value` is a coefficient and, where it is a number, lies in `interval`, e.g. ``"[0, 1)"``."""
    scalar(name, value)
    if not is_number(value):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} must be in {interval}, got {value!r}")


def finite(name: str, value: Any) -> None:
    """Raise unless `value` is a coefficient and, where it is a number, finite."""
    within(name, value, "(-inf, inf)")


def constant(name: str, value: Any, interval: str) -> None:
    """Raise unless `value` is a scalar array or a number in `interval`; for what takes no schedule."""
    if not (is_number(value) or is_scalar_array(value)):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}")
    within(name, value, interval)


def number(name: str, value: Any, interval: str) -> None:
    """Raise unless `value` is a number in `interval`; for arguments that must be known when a rule is built."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}{static(name, value)}")
    within(name, value, interval)


def integer(name: str, value: Any, least: int) -> None:
    """Raise unless `value` is a whole number of at least `least`."""
    if not (is_number(value) and float(value).is_integer()):
        raise TypeError(f"{name} must be a whole number, got {value!r}{static(name, value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def seed(value: Any) -> None:
    """Raise unless `value` is a seed of stochastic rounding: a whole number that 32 bits hold."""
    integer("seed", value, 0)
    if value >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {value!r}")


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def flag(name: str, value: Any) -> None:
    """Raise `TypeError` unless `value` is True or False; a traced flag cannot choose a program."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}{static(name, value)}")


def static(name: str, value: Any) -> str:
    """What an error adds where an array came in place of what must be known before a program is compiled."""
    if not hasattr(value, "dtype") or is_number(value):
        return ""
    return f"; an array cannot stand for it: name it in optax.inject_hyperparams(..., static_args={name!r})"
