"""States of older versions and of other optimizers in the form of the one that is wanted."""

import functools
from collections.abc import Mapping

import jax

from ... import _checks
from ..._typing import JSON, Leaf, PyTree
from . import formats
from .entries import CheckpointError, clipped, compare, described, entry_of, field_path, fields
from .formats import Migration
from .validation import checked_fields, is_whole


def from_fields(leaves: Mapping[str, Leaf], target: PyTree) -> PyTree:
    """The inverse of `fields`: a state of the structure of `target`.

    Args:
      leaves: An array for each path.
      target: The state that is wanted; arrays or `ShapeDtypeStruct`. Where a leaf has a sharding, the array is put
        there.

    Returns:
      A state. Nothing is cast.

    Raises:
      CheckpointError: Naming the first field that is missing, unexpected, or of another shape or dtype.
      TypeError: If `leaves` is not a mapping.
    """
    if not isinstance(leaves, Mapping):
        raise TypeError(f"leaves must be a mapping from paths to arrays, as fields gives, got {_checks.shown(leaves)}")
    expected = fields(target)
    compare(*({path: entry_of(path, x) for path, x in each.items()} for each in (leaves, expected)))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _placed(leaves[field_path(path)], getattr(x, "sharding", None)), target
    )


def migrate(
    saved: PyTree, description: JSON, target: PyTree, migrations: Mapping[int, Migration] | None = None
) -> PyTree:
    """A state that was saved under an older version, or by another optimizer, in the form of `target`.

        def renamed(leaves):                                   # from version 0 to version 1
            return {path.replace("/trace/", "/velocity/values/0/"): x for path, x in leaves.items()}

        state = mo.checkpoint.migrate(saved, layout, target, {0: renamed})

    First `saved` is checked against its description. Then this package's own changes of format are applied, and the
    functions of `migrations` from the version of the checkpoint upwards; the result is checked against `target`. A
    function may build states in between: `fields(mo.convert(from_fields(leaves, old), "int8", like=target))`.

    Format 1 did not keep the look-ahead of a rule, which `eval_params` reads. It is taken from `target` where that
    holds arrays, of the same step if steps are counted; else it is unknown, which `eval_params` says, until the next
    update.

    Args:
      saved: The restored state, also one without its NamedTuples, as Orbax returns it without a target.
      description: The dictionary that `describe` returned when it was saved.
      target: The state that is wanted; arrays or `ShapeDtypeStruct`, with a sharding where one is wanted.
      migrations: For each older version the function from there to the next: it takes what `fields` returns, and
        returns the same for the next version. The newest version is the greatest key plus one.

    Returns:
      A state of the structure, shapes and dtypes of `target`.

    Raises:
      CheckpointError: Naming the first field that differs, or the entry of `description` that is wrong; if a version
        has no migration, or is newer than all of them; if `migrations` does not map whole numbers to functions.
      TypeError: If a migration does not return a mapping.
    """
    arrays = {path: entry for path, entry in checked_fields(description).items() if "type" not in entry}
    leaves = fields(saved)
    found = described(saved)
    steps = _checked_migrations(migrations)
    compare(arrays, {path: found[path] for path in leaves})
    wanted = fields(target)
    upgrades = {number: functools.partial(step, wanted) for number, step in formats.UPGRADES.items()}
    leaves = _chained(leaves, "format", description["format"], formats.FORMAT, upgrades)
    newest = max(steps) + 1 if steps else description["version"]
    leaves = _chained(leaves, "version", description["version"], newest, steps)
    return from_fields(leaves, target)


def _placed(x: Leaf, sharding: jax.sharding.Sharding | None) -> Leaf:
    return x if sharding is None else jax.device_put(x, sharding)


def _chained(leaves: dict[str, Leaf], what: str, old: int, new: int, steps: Mapping[int, Migration]) -> dict[str, Leaf]:
    """`leaves` after the steps from `old` to `new`."""
    if old > new:
        raise CheckpointError(f"the checkpoint must have {what} {new} or an older one, got {old}")
    for number in range(old, new):
        if number not in steps:
            raise CheckpointError(f"migrations must hold a function from {what} {number}, got {sorted(steps)}")
        result = steps[number](dict(leaves))
        if not isinstance(result, Mapping):
            raise TypeError(
                f"the migration from {what} {number} must return a mapping from paths, got {_checks.shown(result)}"
            )
        leaves = dict(result)
    return leaves


def _checked_migrations(migrations: object) -> dict[int, Migration]:
    steps = {} if migrations is None else migrations
    if not isinstance(steps, Mapping):
        raise CheckpointError(f"migrations must map versions to functions, got {clipped(steps)}")
    for number, step in steps.items():
        if not is_whole(number):
            raise CheckpointError(f"migrations must have whole numbers as keys, got {clipped(number)}")
        if not callable(step):
            raise CheckpointError(f"migrations must hold a function from version {number}, got {clipped(step)}")
    return dict(steps)
