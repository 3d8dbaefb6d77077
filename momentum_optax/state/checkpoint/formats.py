"""The format of this package's states, and the functions that bring older ones up to date."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from ..._typing import Leaf
from . import one_byte

# Takes what `fields` returns, and returns the same for the next format or version.
Migration: TypeAlias = Callable[[dict[str, Leaf]], Mapping[str, Leaf]]


# A change of the format adds a function to `UPGRADES`, under the number before.
FORMAT = 2


UPGRADES: dict[int, Migration] = {1: one_byte.upgraded}
