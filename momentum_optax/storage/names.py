"""Storages by name."""

from collections.abc import Callable

from .. import _checks
from ._bfloat16 import bfloat16
from ._float32 import float32
from ._int4 import int4
from ._int8 import int8
from ._uint8 import uint8
from .protocol import Storage

_ALL: tuple[Callable[[], Storage], ...] = (float32, bfloat16, int8, int4, uint8)
_BY_NAME = {storage.__name__: storage for storage in _ALL}


def named(storage: object) -> Storage:
    """The storage of that name, or `storage` itself if it is one; errors as `resolve`."""
    if isinstance(storage, str):
        if storage not in _BY_NAME:
            raise ValueError(
                f"storage must be one of {', '.join(map(repr, _BY_NAME))} or an object, got {_checks.shown(storage)}"
            )
        return _BY_NAME[storage]()
    if isinstance(storage, type) or not all(
        hasattr(storage, name) for name in ("state_type", "reads_step", "init", "encode")
    ):
        raise TypeError(
            "storage must be a name or an object with state_type, reads_step, init and encode, got "
            + _checks.shown(storage)
        )
    found: Storage = storage  # type: ignore[assignment] # it has what one needs
    return found
