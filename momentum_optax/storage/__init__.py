"""Ways to keep a velocity. Give one to `scale_by_momentum(storage=...)`, by name or as an object."""

from collections.abc import Callable

from .. import _checks
from ._bfloat16 import bfloat16 as bfloat16
from ._float32 import float32 as float32
from ._int4 import int4 as int4
from ._int8 import int8 as int8
from ._uint8 import uint8 as uint8
from .protocol import EncodeContext as EncodeContext
from .protocol import Storage as Storage
from .protocol import StoredVelocity as StoredVelocity
from .rows import ROW_SIZE as ROW_SIZE

_BY_NAME: dict[str, Callable[[], Storage]] = {
    "float32": float32,
    "bfloat16": bfloat16,
    "int8": int8,
    "int4": int4,
    "uint8": uint8,
}


def resolve(storage: str | Storage) -> Storage:
    """The storage of that name, or `storage` itself if it is one.

    Args:
      storage: A name, such as "int8", or an object.

    Raises:
      ValueError: If there is no storage of that name.
      TypeError: If `storage` is neither a name nor a storage.
    """
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
    return storage
