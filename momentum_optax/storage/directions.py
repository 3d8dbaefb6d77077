"""Storages of what is orthogonalised: those that lose its direction are refused, or warned of."""

from collections.abc import Iterable
from typing import NamedTuple

from .. import _checks
from .._export import serializable
from ._int4 import Int4
from ._int8 import Int8
from .protocol import Storage


@serializable
class OrthogonalizeState(NamedTuple):
    """State of `orthogonalize`: nothing. Its name tells `compress` what becomes of the fields before it in a chain."""


def check_directions(storages: Iterable[Storage]) -> None:
    """Raise or warn unless roundings in these storages leave a direction; `benchmarks/muon_storages.py` measures it.

    Raises:
      ValueError: If one of them is int4.
    """
    kinds = {type(one) for one in storages}
    if Int4 in kinds:
        raise ValueError(
            "storage must not be int4 here: orthogonalising gives all singular values one size, and four bits keep few "
            "of them, so that little of the direction is left; take 'bfloat16' or 'int8'"
        )
    if Int8 in kinds:
        _checks.warn(
            "storage int8 turns the orthogonalised direction where gradients have little noise: singular values below "
            "its rounding become as large as the others. Take 'bfloat16' unless a short run in int8 trains as well"
        )
