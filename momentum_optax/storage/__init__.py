"""Ways to keep a velocity. Give one to `scale_by_momentum(storage=...)`, by name or as an object."""

from collections.abc import Mapping

from .. import _checks
from . import names
from ._bfloat16 import bfloat16 as bfloat16
from ._by_leaf import AnyStorage, ByLeaf
from ._by_leaf import by_leaf as by_leaf
from ._float32 import float32 as float32
from ._int4 import int4 as int4
from ._int8 import int8 as int8
from ._uint8 import uint8 as uint8
from .protocol import EncodeContext as EncodeContext
from .protocol import Storage as Storage
from .protocol import StoredVelocity as StoredVelocity
from .rows import ROW_SIZE as ROW_SIZE


def resolve(storage: AnyStorage) -> Storage | ByLeaf:
    """The storage that is meant, or the way to choose one for each leaf.

    Args:
      storage: A name, such as "int8", or an object; or as for `by_leaf`.

    Raises:
      ValueError: If there is no storage of a name, or as `by_leaf`.
      TypeError: If `storage` is none of these.
    """
    if isinstance(storage, ByLeaf):
        return storage
    if isinstance(storage, Mapping) or (_checks.is_schedule(storage) and not hasattr(storage, "encode")):
        return by_leaf(storage)
    return names.named(storage)
