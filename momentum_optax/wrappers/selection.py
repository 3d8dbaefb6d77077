"""Which fields of an optimizer's state `compress` keeps in which storage."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import jax

from .. import _checks
from .._tree import unboxed
from .._typing import KeyPath, Leaf, PyTree
from ..state.mismatch import StateMismatchError
from ..storage import Storage, resolve
from ..storage._by_leaf import AnyStorage, ByLeaf, chooser_of
from ..storage.directions import check_directions
from ..storage.protocol import SUPPORTED, is_signed
from ..storage.rows import reaches
from .fields import field_name, is_compressed

# Optax's fields of squares: never negative, and divided by the square root of, so that small ones must not become zero.
SECOND_MOMENTS = frozenset(
    (
        *("nu", "nu_max", "n", "v", "v_row", "v_col", "e_g", "e_x", "sum_of_squares", "grad_sum_sq", "exp_avg_sq"),
        *("grad_sum_of_squares", "sum_sq_diff_grads", "variance_grads_ema"),
    )
)


# The same name for something of either sign: Adan's v is an average of differences of gradients.
SIGNED = {("ScaleByAdanState", "v")}
# What Optax's Muon orthogonalises. Adam's field of this name, for other parameters, is in the same state.
ORTHOGONALIZED = {("MuonState", "mu")}


Predicate: TypeAlias = Callable[[KeyPath, Leaf], bool]
Select: TypeAlias = Collection[str] | Mapping[str, AnyStorage] | Predicate


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A tree of the parameters' structure in an optimizer's state.

    Attributes:
      path: Its path there.
      owner: The class of the innermost NamedTuple around it.
      tree: The tree.
      is_orthogonalized: Whether an `orthogonalize` follows it in a chain.
    """

    path: KeyPath
    owner: str
    tree: PyTree
    is_orthogonalized: bool = False


@dataclasses.dataclass(frozen=True)
class Selection:
    """The arguments of `compress`, checked.

    Attributes:
      by_field: The storages of each selected field; None with a predicate.
      predicate: Selects leaves; None with names of fields.
      storages: The storages of the leaves that the predicate selects.
      second_moments: Names of fields that hold squares.
    """

    by_field: dict[str, ByLeaf] | None
    predicate: Predicate | None
    storages: ByLeaf
    second_moments: frozenset[str]

    @property
    def reads_step(self) -> bool:
        """Whether a storage needs the number of the step."""
        used = [self.storages] if self.by_field is None else self.by_field.values()
        return any(storages.reads_step for storages in used)

    def storages_at(self, path: KeyPath) -> ByLeaf:
        """The storages of the field at `path`."""
        return self.storages if self.by_field is None else self.by_field[field_name(path) or ""]

    def leaves(self, path: KeyPath, tree: PyTree) -> list[bool] | None:
        """Which leaves of the field `tree` are compressed; None if the field is not selected."""
        if self.by_field is not None and field_name(path) not in self.by_field:
            return None
        pairs = jax.tree_util.tree_leaves_with_path(unboxed(tree))
        possible = [can_be_compressed(x) for _, x in pairs]
        if self.predicate is None:
            return None if pairs and not any(is_float(x) for _, x in pairs) else possible
        return [ok and bool(self.predicate((*path, *p), x)) for ok, (p, x) in zip(possible, pairs, strict=True)]

    def check_fit(self, storages: ByLeaf, field: Candidate) -> None:
        """Raise unless `storages` are fit for a field."""
        name, tree = field_name(field.path) or "", field.tree
        check_fit(storages, name, name in self.second_moments and (field.owner, name) not in SIGNED, tree)
        if field.is_orthogonalized or (field.owner, name) in ORTHOGONALIZED:
            check_directions(storages.at(path, x) for path, x in jax.tree_util.tree_leaves_with_path(unboxed(tree)))

    def check_state(self, pairs: list[tuple[KeyPath, PyTree]]) -> None:
        """Raise unless the fields that a state compresses are those that are selected by name."""
        found = {field_name(path) or "" for path, x in pairs if is_compressed(x)}
        if self.by_field is None or found == set(self.by_field):
            return
        there, wanted = (", ".join(map(repr, sorted(names))) or "no field" for names in (found, self.by_field))
        raise StateMismatchError(
            f"the state compresses {there}, and this optimizer {wanted}: mo.convert(opt_state, storages, "
            "like=tx.init(params)) makes it fit"
        )


def selection(select: Select, storages: ByLeaf, second_moments: Collection[str]) -> Selection:
    """The `Selection` that the arguments of `compress` describe.

    Raises:
      TypeError: If `select` or `second_moments` is of the wrong type.
      ValueError: If `select` is empty or names an unknown storage.
    """
    squares = checked_second_moments(second_moments)
    if isinstance(select, Collection) and not isinstance(select, str) and not _are_names(select):
        raise TypeError(f"select must hold names of fields, got {_checks.shown(select)}")
    if isinstance(select, Mapping):
        by_field = {name: chooser_of(resolve(value)) for name, value in select.items()}
    elif isinstance(select, Collection) and not isinstance(select, str):
        by_field = {name: storages for name in sorted(select)}
    elif callable(select) and not isinstance(select, type):
        return Selection(None, select, storages, squares)
    else:
        raise TypeError(
            f"select must be a set of names, a mapping from names or a predicate, got {_checks.shown(select)}"
        )
    if not by_field:
        raise ValueError(f"select must name at least one field, got {_checks.shown(select)}")
    return Selection(by_field, None, storages, squares)


def checked_second_moments(names: Collection[str]) -> frozenset[str]:
    """The names of fields of squares as a set."""
    if isinstance(names, str) or not _are_names(names):
        raise TypeError(f"second_moments must be a collection of names, got {_checks.shown(names)}")
    return frozenset(names)


def _are_names(value: object) -> bool:
    return isinstance(value, Collection) and all(isinstance(name, str) for name in value)


def check_fit(storages: ByLeaf, field: str, squares: bool, tree: PyTree) -> None:
    """Raise unless `storages` are fit for `field`, which is `tree` and holds `squares` or values of either sign."""
    for storage in storages.among(unboxed(tree)):
        _check_one(storage, field, squares)


def _check_one(storage: Storage, field: str, squares: bool) -> None:
    """`check_fit` of one storage."""
    if squares and not getattr(storage, "nonnegative", False):
        raise ValueError(
            f"{field!r} holds second moments, which are divided by and so need relative accuracy: its storage must be "
            "'float32', 'bfloat16', 'uint8' or an object whose nonnegative is true (or its name left out of "
            f"second_moments, if it holds something else), got {storage!r}"
        )
    if not squares and not is_signed(storage):
        raise ValueError(
            f"{field!r} may hold values of either sign: its storage must keep them (or its name be among "
            f"second_moments, if they are never negative), got {storage!r}"
        )


def is_float(x: Leaf) -> bool:
    """Whether a leaf has a dtype that a storage can keep."""
    return str(getattr(x, "dtype", None)) in SUPPORTED


def can_be_compressed(x: Leaf) -> bool:
    """Whether a leaf has such a dtype and more than one element."""
    return is_float(x) and reaches(x.shape, 2, "one element")
