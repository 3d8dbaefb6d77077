"""A storage for each leaf: by patterns of paths, or by a function of path and shape."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp

from .. import _checks, _tree
from .._paths import compiled, first_match, slash_path
from .._typing import KeyPath, Leaf, PyTree
from ._float32 import float32
from .mixed import Layout
from .names import named
from .protocol import Storage

Patterns: TypeAlias = Mapping[str, str | Storage]
Choose: TypeAlias = Callable[[str, jax.ShapeDtypeStruct], str | Storage]

# The layouts of functions, in the order of calls of `init`: those that are noted, and those to be used again.
_NOTED: ContextVar[dict["ByLeaf", list[Layout]] | None] = ContextVar("layouts_noted", default=None)
_REPLAYED: ContextVar[dict["ByLeaf", list[Layout]] | None] = ContextVar("layouts_replayed", default=None)


class ByLeaf:
    """A choice of a storage for each leaf.

    Attributes:
      everywhere: The storage of all leaves; None if paths are asked.
    """

    everywhere: Storage | None = None

    @property
    def known(self) -> tuple[Storage, ...] | None:
        """The storages that can be chosen; None if that depends on the tree."""
        raise NotImplementedError

    def at(self, path: KeyPath, leaf: Leaf) -> Storage:
        """The storage of one leaf, by its path in a tree like the parameters."""
        raise NotImplementedError

    @property
    def reads_step(self) -> bool:
        """Whether a state must count steps: some storage reads them, or might."""
        return self.known is None or any(storage.reads_step for storage in self.known)

    def of_order(self, order: int) -> "ByLeaf":
        """The choice for that number of velocities: float32 for none, whose state is then the same for every choice."""
        return self if order or self.everywhere is not None else _Everywhere(float32())

    def among(self, tree: PyTree) -> tuple[Storage, ...]:
        """The storages that can be chosen for the leaves of a bare tree like the parameters."""
        if self.known is not None:
            return self.known
        return tuple(self.at(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree))

    def layout(self, tree: PyTree, order: int) -> Layout:
        """The form of `order` velocities of a tree like the parameters, boxed or not.

        Raises:
          ValueError: If it depends on the tree, and that is the placeholder of `optax.tree.map_params`.
        """
        if self.known is not None:
            return Layout.of(self.known, order)
        found = self.among(_tree.unboxed(tree))
        replayed = (_REPLAYED.get() or {}).get(self)
        if not found and replayed:
            return replayed.pop(0) if len(replayed) > 1 else replayed[0]
        if not found and type(tree).__module__.partition(".")[0] == "optax" and not _tree.absent(tree):
            raise ValueError(
                "storage must be a mapping of patterns for optax.tree.map_params, which does not show the parameters "
                f"to {self}; mo.sharding.state_shardings takes either"
            )
        layout = Layout.of(found or (float32(),), order)
        noted = _NOTED.get()
        if noted is not None:
            noted.setdefault(self, []).append(layout)
        return layout


# What the argument `storage` may be.
AnyStorage: TypeAlias = str | Storage | ByLeaf | Patterns | Choose


@dataclasses.dataclass(frozen=True)
class _Everywhere(ByLeaf):
    """One storage for all leaves."""

    everywhere: Storage

    @property
    def known(self) -> tuple[Storage, ...]:
        """The storage."""
        return (self.everywhere,)

    def at(self, path: KeyPath, leaf: Leaf) -> Storage:
        """The storage."""
        return self.everywhere


@dataclasses.dataclass(frozen=True)
class _ByPattern(ByLeaf):
    """The storage of the first pattern that matches a path."""

    patterns: tuple[tuple[re.Pattern[str], Storage], ...]

    @property
    def known(self) -> tuple[Storage, ...]:
        """Those of all patterns."""
        return tuple(storage for _, storage in self.patterns)

    def at(self, path: KeyPath, leaf: Leaf) -> Storage:
        """The storage of the first pattern that matches."""
        return self.patterns[first_match("storage", (pattern for pattern, _ in self.patterns), path)][1]


@dataclasses.dataclass(frozen=True)
class _ByFunction(ByLeaf):
    """The storage that a function returns."""

    function: Choose
    known: ClassVar[None] = None

    def __hash__(self) -> int:
        """The same for all: a function may be an object that cannot be hashed, such as a dataclass with `__call__`."""
        return hash(_ByFunction)

    def __str__(self) -> str:
        """The function, for a message."""
        return _checks.shown(self.function)

    def at(self, path: KeyPath, leaf: Leaf) -> Storage:
        """The storage that the function returns for the path and the shape and dtype of the leaf."""
        name = slash_path(path)
        chosen = self.function(name, jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)))
        try:
            return named(chosen)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"{problem} from the function for {name!r}") from None


def by_leaf(choice: Patterns | Choose) -> ByLeaf:
    """A storage for each leaf, so that heads and embeddings, say, stay in float32.

        mo.sgd(0.1, 0.9, storage={"head/.*": "float32", ".*embed.*": "bfloat16", ".*": "int8"})
        mo.compress(optax.adamw(1e-3), {"mu": {"head/.*": "float32", ".*": "int8"}, "nu": "bfloat16"})
        mo.sgd(0.1, 0.9, storage=lambda path, leaf: "int8" if leaf.ndim == 2 else "float32")

    Every argument `storage` takes such a mapping or function directly. This function makes an object of one, which
    `optax.inject_hyperparams` does not take for a schedule and `convert` not for a mapping from fields.

    A path is the parameter's, its keys, names of fields and indices written "layers/0/kernel", without boxes of Flax.
    Each leaf is kept as if all were in its storage, with the same noise. A state holds every class of storages that the
    patterns name, or that the function returned at `init`, with a bool for each leaf that is in another one.

    Args:
      choice: A mapping from regular expressions to storages, by name or as objects: the first that matches the whole
        path counts. Or a function of the path and the leaf, a `ShapeDtypeStruct`, that returns one: the parameter at
        `init`, the gradient at `update`, so that it must not depend on more than path and shape unless they share
        their dtype.

    Returns:
      An object for every argument `storage`.

    Raises:
      TypeError: If `choice` is neither of these, a pattern is not a string, or a storage is not one.
      ValueError: If there is no pattern, one is not a regular expression, or there is no storage of a name; at `init`
        and `update` if no pattern matches a path.
    """
    if isinstance(choice, ByLeaf):
        return choice
    if not isinstance(choice, Mapping):
        if not _checks.is_schedule(choice):
            raise TypeError(f"choice must be a mapping of patterns or a function, got {_checks.shown(choice)}")
        return _ByFunction(choice)
    if not choice:
        raise ValueError("storage must have at least one pattern, such as '.*', got none")
    return _ByPattern(tuple((compiled("storage", pattern), named(storage)) for pattern, storage in choice.items()))


def chooser_of(storage: Storage | ByLeaf) -> ByLeaf:
    """The choice of one storage for all leaves, or the choice that it is already."""
    return storage if isinstance(storage, ByLeaf) else _Everywhere(storage)


@contextlib.contextmanager
def layouts_noted() -> Iterator[dict[ByLeaf, list[Layout]]]:
    """The layouts that depend on trees whose `init` is called inside."""
    found: dict[ByLeaf, list[Layout]] = {}
    token = _NOTED.set(found)
    try:
        yield found
    finally:
        _NOTED.reset(token)


@contextlib.contextmanager
def layouts_replayed(layouts: Mapping[ByLeaf, list[Layout]]) -> Iterator[None]:
    """Within it these are the layouts of trees that do not show their leaves, in the same order of calls."""
    token = _REPLAYED.set({choice: list(several) for choice, several in layouts.items()})
    try:
        yield
    finally:
        _REPLAYED.reset(token)
