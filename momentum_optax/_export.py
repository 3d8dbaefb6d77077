"""States of this package in what `jax.export` writes.

A function of `jax.export` that takes or returns a NamedTuple can be serialized only if its class is registered under a
name, in the process that writes and in the one that reads. The names hold no module, so that classes may move.
"""

from typing import TypeVar

import jax.export

State = TypeVar("State", bound=type)


def serializable(state: State) -> State:
    """Register a NamedTuple class of states with `jax.export`; a class decorator.

    Raises:
      ValueError: If a class of this name is registered already.
    """
    jax.export.register_namedtuple_serialization(state, serialized_name=f"{__package__}.{state.__name__}")
    return state
