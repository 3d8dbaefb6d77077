"""The entries of a description, one for each array and NamedTuple of a state, and their comparison."""

from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp

from ... import _checks
from ..._paths import slash_path
from ..._tree import children
from ..._typing import JSON, KeyPath, Leaf, PyTree
from .checksums import checksum, dtype_name, has_checksum

# Characters of a value in a message.
_SHOWN = 80


class CheckpointError(ValueError):
    """A checkpoint is not what is expected; the message names the first field that differs."""

    __module__ = __package__


def fields(state: PyTree) -> dict[str, Leaf]:
    """The leaves of a state by path, such as "0/velocity/codes/0/w"; the same for what Orbax restores without a target.

    Args:
      state: Any tree.

    Returns:
      A dictionary in the order of the tree.

    Raises:
      ValueError: If two leaves have the same path, since a key holds a slash.
    """
    found: dict[str, Leaf] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        name = field_path(path)
        if name in found:
            raise ValueError(f"state must have a different path for each leaf, got two at {name}")
        found[name] = x
    return found


def described(state: PyTree) -> dict[str, dict[str, JSON]]:
    """An entry for each array and NamedTuple of a state; checksums where there are values."""
    entries: dict[str, dict[str, JSON]] = {}
    sums: dict[str, jax.Array] = {}
    for path, x in _nodes(state):
        if path in entries:
            raise ValueError(f"state must have a different path for each part, got two at {path}")
        if isinstance(x, type):
            entries[path] = {"type": x.__name__}
            continue
        if not has_checksum(x):
            raise TypeError(f"state must hold arrays and numbers, got {clipped(x)} at {path}")
        entries[path] = entry_of(path, x)
        if not isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
            sums[path] = checksum(x)
    for path, number in jax.device_get(sums).items():
        entries[path]["checksum"] = int(number)
    return entries


def entry_of(path: str, x: Leaf) -> dict[str, JSON]:
    """The entry of one array or number, without a checksum."""
    if not has_checksum(x):
        raise CheckpointError(f"{path} must be an array or a number, got {clipped(x)}")
    return {"shape": list(jnp.shape(x)), "dtype": dtype_name(x)}


def compare(saved: Mapping[str, JSON], wanted: Mapping[str, JSON]) -> None:
    """Raise at the first difference of two descriptions, in the order of the wanted one."""
    for path, entry in wanted.items():
        if path not in saved:
            raise CheckpointError(f"{path} must be {_text(entry)}, got nothing")
        old = saved[path]
        if any(old.get(key) != entry.get(key) for key in ("type", "shape", "dtype")):
            raise CheckpointError(f"{path} must be {_text(entry)}, got {_text(old)}")
        sums = (old.get("checksum"), entry.get("checksum"))
        if None not in sums and sums[0] != sums[1]:
            raise CheckpointError(f"{path} must have the checksum {sums[0]} with which it was saved, got {sums[1]}")
    for path, entry in saved.items():
        if path not in wanted:
            raise CheckpointError(f"{path} must not be there, got {_text(entry)}")


def clipped(x: object) -> str:
    """A short text for a value in a message."""
    text = repr(x)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _text(entry: Mapping[str, JSON]) -> str:
    return _checks.with_article(entry["type"]) if "type" in entry else f"{entry['dtype']}{list(entry['shape'])}"


def _nodes(node: PyTree, path: KeyPath = ()) -> Iterator[tuple[str, PyTree]]:
    """Paths with the leaves of a tree, and with the classes of its NamedTuples, in the order of the tree."""
    if _checks.is_named_tuple(node):
        yield field_path(path), type(node)
    if jax.tree_util.all_leaves([node]):
        yield field_path(path), node
    for key, child in children(node):
        yield from _nodes(child, (*path, *key))


def field_path(path: KeyPath) -> str:
    """The path of a leaf as `fields` and descriptions name it."""
    return slash_path(path) or "."
