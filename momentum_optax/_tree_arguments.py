"""Arguments of users that are trees beside the parameters: placements, masks, dimension numbers."""

from typing import NoReturn

import jax

from . import _checks
from ._boxes import BoxKind, box_kind, content
from ._tree import IsLeaf, absent, empty, flatten_up_to, flatten_with_path, path_name, unboxed
from ._typing import KeyPath, PyTree


def check_entries(name: str, what: str, tree: PyTree, params: PyTree, is_entry: IsLeaf) -> None:
    """Raise unless the argument `name` is a tree with an entry for each parameter; both in boxes or not.

    Args:
      name: That of the argument.
      what: What its entries are, in a message: "PartitionSpecs".
      tree: The argument. Where a parameter is left out it may hold anything.
      params: Arrays or shapes.
      is_entry: Whether a node is an entry.

    Raises:
      ValueError: If the argument has another structure, naming a path that differs.
      TypeError: If an entry is something else, with its path.
    """
    pairs, treedef = flatten_with_path(unboxed(params), empty)
    bare = unboxed(tree)
    entries = flatten_up_to(treedef, bare)
    if entries is None:
        there = [path for path, _ in flatten_with_path(bare, is_entry)[0]]
        known = [path for path, _ in pairs]
        problems = [f"without {path_name(path)}" for path in known if path not in there]
        problems += [f"with {path_name(path)} too" for path in there if path not in known]
        problem = "a single one" if there == [()] else f"one {(problems or ['with other containers'])[0]}"
        raise ValueError(f"{name} must be a tree of {what} like the parameters, got {problem}")
    for (path, p), entry in zip(pairs, entries, strict=True):
        if not empty(p) and not is_entry(entry):
            got = f"{_checks.shown(entry)} for {path_name(path)}"
            raise TypeError(f"{name} must be a tree of {what} like the parameters, got {got}")


def broadcast(name: str, prefix: PyTree, tree: PyTree, is_entry: IsLeaf) -> list[PyTree]:
    """For each leaf of the bare `tree` the entry of `prefix` that stands for it.

    Args:
      name: The argument that `prefix` was given as, for errors.
      prefix: A tree like `tree`, or like its upper part, in boxes or not; an entry stands for all that is below it.
      tree: A bare tree of the parameters or the gradients.
      is_entry: Says what an entry is, beside other leaves.

    Raises:
      ValueError: If `prefix` is not like `tree`, with the paths that differ.
    """
    pairs, treedef = flatten_with_path(prefix, lambda x: is_entry(x) or box_kind(type(x)) is not BoxKind.NONE)
    below = flatten_up_to(treedef, tree)
    if below is None:
        _raise_no_prefix(name, [path for path, _ in pairs], tree)
    rows = zip(pairs, below, strict=True)
    return [content(entry) for (_, entry), part in rows for _ in jax.tree.leaves(part)]


def _raise_no_prefix(name: str, there: list[KeyPath], tree: PyTree) -> NoReturn:
    """Say which parameters no path of an entry leads to, and which entry leads to none."""
    here = [path for path, _ in flatten_with_path(tree, absent)[0]]
    missing = [path for path in here if not any(path[: len(entry)] == entry for entry in there)]
    extra = [entry for entry in there if not any(path[: len(entry)] == entry for path in here)]
    lacks = [f"lacks {path_name(missing[0])}"] if missing else []
    has = [f"has {path_name(extra[0])}, which is no parameter"] if extra else []
    what = " and ".join(lacks + has) or "has other containers"
    raise ValueError(f"{name} must be a tree like the parameters or a prefix of it: it {what}")
