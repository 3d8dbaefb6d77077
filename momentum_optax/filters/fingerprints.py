"""What a rule is, in numbers that can be kept beside a state: a state holds velocities, and not what they mean.

Two rules of one order may have states of one form and give one velocity two meanings. A fingerprint holds the
coefficients of the rule as it runs: a number; null where a value is traced and so unknown; or, of a schedule, the
values at a few steps.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax

from .coefficients import Coefficient, PerLeafSchedule, value_at
from .filter import Filter

# (step, age) at which a coefficient that is no number is looked at.
PROBES = ((0, 0), (1, 1), (2, 2), (3, 3), (10, 10), (100, 0), (100, 1), (100, 100), (1000, 1000), (100_000, 100_000))


# Schedules are computed in float32, where 1 - decay has lost digits.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-7


_NOTED: ContextVar[list[dict[str, Any]] | None] = ContextVar("noted", default=None)


def fingerprint(rule: Filter) -> dict[str, Any]:
    """A, B, C and D of the rule without velocities that it never reads, each coefficient in numbers; JSON-able."""
    rule = rule.pruned()
    # Inside a traced `init` schedules must give numbers all the same.
    with jax.ensure_compile_time_eval():
        return {
            "A": [[_values(c) for c in row] for row in rule.A],
            "B": [_values(c) for c in rule.B],
            "C": [_values(c) for c in rule.C],
            "D": _values(rule.D),
        }


@contextlib.contextmanager
def noted() -> Iterator[list[dict[str, Any]]]:
    """The fingerprints of the rules whose `init` is called inside."""
    found: list[dict[str, Any]] = []
    token = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(token)


def note(rule: Filter) -> None:
    """Tell an enclosing `noted` of a rule."""
    found = _NOTED.get()
    if found is not None:
        found.append(fingerprint(rule))


def difference(expected: Mapping[str, Any], got: Mapping[str, Any]) -> str | None:
    """Where two fingerprints first differ, such as "A[0][0] must be 0.9, got 0.99"; None if they do nowhere."""
    if len(expected["B"]) != len(got["B"]):
        return f"the order must be {len(expected['B'])}, got {len(got['B'])}"
    for (name, a), (_, b) in zip(_entries(expected), _entries(got), strict=True):
        pairs = zip(PROBES, _at_probes(a), _at_probes(b), strict=True)
        for (step, age), x, y in pairs:
            if not _agree(x, y):
                scheduled = isinstance(a, list) or isinstance(b, list)
                at = f" at step {step}" + (f" and age {age}" if age != step else "") if scheduled else ""
                return f"{name} must be {x:.9g}{at}, got {y:.9g}"
    return None


def is_fingerprint(x: Any) -> bool:
    """Whether `x` has the form of a fingerprint."""
    if not (isinstance(x, Mapping) and set(x) == {"A", "B", "C", "D"}):
        return False
    if not all(isinstance(x[name], list) for name in "ABC"):
        return False
    rows = [*x["A"], x["B"], x["C"]]
    if not all(isinstance(row, list) and len(row) == len(x["B"]) for row in rows) or len(x["A"]) != len(x["B"]):
        return False
    return all(_is_entry(entry) for _, entry in _entries(x))


def _values(coefficient: Coefficient) -> Any:
    """The number that a coefficient is, or those that it has at the probes; None for what is not known."""
    if callable(coefficient) or isinstance(coefficient, PerLeafSchedule):
        return [_number(value_at(coefficient, step, age)) for step, age in PROBES]
    return _number(coefficient)


def _number(value: Any) -> float | None:
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _entries(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows = [(f"A[{i}][{j}]", x) for i, row in enumerate(found["A"]) for j, x in enumerate(row)]
    columns = [(f"{name}[{i}]", x) for name in "BC" for i, x in enumerate(found[name])]
    return [*rows, *columns, ("D", found["D"])]


def _is_entry(x: Any) -> bool:
    if isinstance(x, list):
        return len(x) == len(PROBES) and not any(isinstance(y, list) or not _is_entry(y) for y in x)
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool))


def _at_probes(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry] * len(PROBES)


def _agree(x: float | None, y: float | None) -> bool:
    if x is None or y is None or x == y or (math.isnan(x) and math.isnan(y)):
        return True
    return abs(x - y) <= _ABSOLUTE + _RELATIVE * max(abs(x), abs(y))
