"""States of this package in what `jax.export` writes.

A function of `jax.export` that takes or returns a NamedTuple can be serialized only if its class has a name there, in
the process that writes and in the one that reads. The names hold no module, so that classes may move.
"""

import sys
from typing import Any

import jax.export


def _register(name: str, module: Any) -> None:
    """Name the public NamedTuple classes that a module defines."""
    for thing in vars(module).values():
        if (
            isinstance(thing, type)
            and issubclass(thing, tuple)
            and hasattr(thing, "_fields")
            and thing.__module__ == name
            and not thing.__name__.startswith("_")
        ):
            jax.export.register_namedtuple_serialization(thing, serialized_name=f"{__package__}.{thing.__name__}")


for _name, _module in sorted(sys.modules.items()):
    if _name.startswith(f"{__package__}."):
        _register(_name, _module)
