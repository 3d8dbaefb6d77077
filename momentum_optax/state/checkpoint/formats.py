"""The format of this package's states, and the functions that bring older ones up to date."""

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import numpy as np

from ..._typing import Leaf
from . import few_bits

# Takes what `fields` returns, and returns the same for the next version.
Migration: TypeAlias = Callable[[dict[str, Leaf]], Mapping[str, Leaf]]
# The same for the next format; the first argument is what `fields` returns of the state that is wanted.
Upgrade: TypeAlias = Callable[[Mapping[str, Leaf], dict[str, Leaf]], Mapping[str, Leaf]]

# A change of the format adds a function to `UPGRADES`, under the number before.
FORMAT = 2

_LOOKAHEAD = re.compile(r"(|.*/)lookahead/\d+")


def _with_lookahead(target: Mapping[str, Leaf], leaves: dict[str, Leaf]) -> dict[str, Leaf]:
    """Format 2 keeps the look-ahead of a rule: the target's, where it holds one that belongs to the saved step.

    Elsewhere NaN, which `eval_params` refuses, until the next update writes it.
    """
    added: dict[str, Leaf] = {}
    for path, x in target.items():
        place = _LOOKAHEAD.fullmatch(path)
        if place is None or path in leaves or not any(name.startswith(f"{place[1]}velocity/") for name in leaves):
            continue
        step, saved = (where.get(f"{place[1]}step") for where in (target, leaves))
        known = saved is None or (_is_value(step) and int(np.asarray(step)) == int(np.asarray(saved)))
        added[path] = x if _is_value(x) and known else np.full((), np.nan, x.dtype)
    return leaves | added


def _is_value(x: object) -> bool:
    return x is not None and not isinstance(x, jax.ShapeDtypeStruct)


def _from_first(target: Mapping[str, Leaf], leaves: dict[str, Leaf]) -> Mapping[str, Leaf]:
    """Format 2 has other velocities in int8 and int4, and the look-ahead of a rule."""
    return few_bits.upgraded(_with_lookahead(target, leaves))


UPGRADES: dict[int, Upgrade] = {1: _from_first}
