"""Storages of what is orthogonalised: those that lose its direction are refused, or warned of."""

from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakValueDictionary

import jax

from .. import _checks
from .._export import serializable
from ._int4 import Int4
from ._int8 import Int8
from .protocol import Storage


@serializable
class OrthogonalizeState(NamedTuple):
    """State of `orthogonalize`: nothing. Its name tells `compress` what becomes of the fields before it in a chain."""


# The updates that were read from velocities in these storages, by identity, for as long as they live.
_READ_FROM: dict[type, WeakValueDictionary[int, jax.Array]] = {kind: WeakValueDictionary() for kind in (Int4, Int8)}


def check_directions(storages: Iterable[Storage]) -> None:
    """Raise or warn unless roundings in these storages leave a direction; `benchmarks/muon_storages.py` measures it.

    Raises:
      ValueError: If one of them is int4.
    """
    _check_kinds({type(one) for one in storages})


def read_from(storage: Storage, update: jax.Array) -> jax.Array:
    """`update`, of which `check_updates` will know that its velocity is in this storage."""
    if type(storage) in _READ_FROM:
        _READ_FROM[type(storage)][id(update)] = update
    return update


def check_updates(updates: Iterable[jax.Array]) -> None:
    """`check_directions` of the storages from which updates were read, if nothing was done to these since.

    In a chain no transformation sees the state of another, so that the updates themselves must tell.
    """
    _check_kinds({kind for x in updates for kind, known in _READ_FROM.items() if known.get(id(x)) is x})


def checked_already(updates: Iterable[jax.Array]) -> None:
    """Let `check_updates` pass these: their storage was checked where it was said."""
    for x in updates:
        for known in _READ_FROM.values():
            known.pop(id(x), None)


def _check_kinds(kinds: set[type]) -> None:
    """See `check_directions`."""
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
