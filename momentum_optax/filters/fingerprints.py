"""Fingerprints: the coefficients of a rule in a form that can be stored beside an optimizer's state.

A state holds velocities but not the rule that gives them their meaning, and the states of two rules of one order have
the same structure. Each coefficient becomes a number, null where its value is traced and so unknown, or, for a
schedule, its values at a few steps.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeGuard

import jax

from .._typing import Number
from .coefficients import Coefficient, PerLeafSchedule, value_at
from .filter import Filter

# A fingerprint: A, B, C and D, each an entry or lists of entries as in `Filter`; JSON-able.
Fingerprint: TypeAlias = dict[str, Any]
# A coefficient in it: a number, None, or the values at `PROBES`.
Entry: TypeAlias = "float | list[float | None] | None"

# (step, age) at which a schedule is evaluated.
PROBES = ((0, 0), (1, 1), (2, 2), (3, 3), (10, 10), (100, 0), (100, 1), (100, 100), (1000, 1000), (100_000, 100_000))


# Schedules may be evaluated in float32, where 1 - decay loses digits.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-7


_NOTED: ContextVar[list[Fingerprint] | None] = ContextVar("noted", default=None)


def fingerprint(rule: Filter) -> Fingerprint:
    """The fingerprint of the rule without the velocities that it never reads."""
    rule = rule.pruned()
    # Inside a traced `init` too, schedules must give numbers.
    with jax.ensure_compile_time_eval():
        return {
            "A": [[_values(c) for c in row] for row in rule.A],
            "B": [_values(c) for c in rule.B],
            "C": [_values(c) for c in rule.C],
            "D": _values(rule.D),
        }


@contextlib.contextmanager
def noted() -> Iterator[list[Fingerprint]]:
    """The fingerprints of the rules whose `init` is called inside."""
    found: list[Fingerprint] = []
    token = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(token)


def note(rule: Filter) -> None:
    """Record the fingerprint of a rule for an enclosing `noted`."""
    found = _NOTED.get()
    if found is not None:
        found.append(fingerprint(rule))


def difference(expected: Fingerprint, got: Fingerprint) -> str | None:
    """The first difference of two fingerprints, such as "A[0][0] must be 0.9, got 0.99"; None if they agree."""
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


def is_fingerprint(x: object) -> TypeGuard[Fingerprint]:
    """Whether `x` has the form of a fingerprint."""
    if not (isinstance(x, Mapping) and set(x) == {"A", "B", "C", "D"}):
        return False
    if not all(isinstance(x[name], list) for name in "ABC"):
        return False
    rows = [*x["A"], x["B"], x["C"]]
    if not all(isinstance(row, list) and len(row) == len(x["B"]) for row in rows) or len(x["A"]) != len(x["B"]):
        return False
    return all(_is_entry(entry) for _, entry in _entries(x))


def _values(coefficient: Coefficient) -> Entry:
    """The value of a coefficient, or its values at `PROBES`; None for an unknown value."""
    if callable(coefficient) or isinstance(coefficient, PerLeafSchedule):
        return [_number(value_at(coefficient, step, age)) for step, age in PROBES]
    return _number(coefficient)


def _number(value: Number) -> float | None:
    return None if isinstance(value, jax.core.Tracer) else float(value)


def _entries(found: Mapping[str, Any]) -> list[tuple[str, Entry]]:
    rows = [(f"A[{i}][{j}]", x) for i, row in enumerate(found["A"]) for j, x in enumerate(row)]
    columns = [(f"{name}[{i}]", x) for name in "BC" for i, x in enumerate(found[name])]
    return [*rows, *columns, ("D", found["D"])]


def _is_entry(x: object) -> bool:
    if isinstance(x, list):
        return len(x) == len(PROBES) and not any(isinstance(y, list) or not _is_entry(y) for y in x)
    return x is None or (isinstance(x, int | float) and not isinstance(x, bool))


def _at_probes(entry: Entry) -> list[float | None]:
    return entry if isinstance(entry, list) else [entry] * len(PROBES)


def _agree(x: float | None, y: float | None) -> bool:
    if x is None or y is None or x == y or (math.isnan(x) and math.isnan(y)):
        return True
    return abs(x - y) <= _ABSOLUTE + _RELATIVE * max(abs(x), abs(y))
