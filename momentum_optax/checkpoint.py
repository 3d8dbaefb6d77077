"""What to save beside a state, so that a checkpoint that does not fit is an error which names the field.

A library such as Orbax keeps arrays. What it does not know is what they mean: it restores into another optimizer whose
fields have the same names, and casts where dtypes differ. `describe` gives what to keep as JSON beside the arrays,
`check` compares that with a state, and `migrate` brings an older or another state into the form of today's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import checks
from .storage.noise import mix, random_bits

# The form of this package's states. A change of it adds a function to `_UPGRADES`, under the number before.
FORMAT = 1
Migration = Callable[[dict[str, Any]], Mapping[str, Any]]
_UPGRADES: dict[int, Migration] = {}


class CheckpointError(ValueError):
    """A checkpoint is not what is expected; the message names the first field that differs."""


def describe(state: Any, *, version: int = 0) -> dict[str, Any]:
    """What a checkpoint of `state` should hold beside the arrays: JSON-able, the same on every mesh.

        layout = mo.checkpoint.describe({"params": params, "opt_state": opt_state})

    The checksum of an array is a sum modulo 2^32 of a hash of the bits and the place of each element, made where the
    array is: one other element always changes it, any other difference leaves it the same with a chance of 2^-32.

    Args:
      state: An optimizer's state, or any tree with it; arrays or `ShapeDtypeStruct`, which have no checksums.
      version: The number of your own layout, a whole number from 0, for `migrate`.

    Returns:
      A dictionary: `format`, the number of the form of this package's states; `version`; and `fields`, which maps paths
      such as "opt_state/0/velocity/codes/0/w" to the shape, dtype and checksum of an array, or to the type of a
      NamedTuple.

    Raises:
      TypeError: If a leaf is no array or number, or `version` is no whole number.
      ValueError: If two leaves have the same path, or `version` is negative.
    """
    checks.integer("version", version, 0)
    entries: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for path, x in _parts(state):
        if path in entries:
            raise ValueError(f"state must have a path of its own for each part, got two at {path}")
        if isinstance(x, type):
            entries[path] = {"type": x.__name__}
            continue
        if not (hasattr(x, "dtype") or checks.is_number(x) or isinstance(x, bool)):
            raise TypeError(f"state must hold arrays and numbers, got {checks.shown(x)} at {path}")
        entries[path] = _entry(x)
        if not isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
            known[path] = _checksum(_on_device(x))
    for path, checksum in jax.device_get(known).items():
        entries[path]["checksum"] = int(checksum)
    return {"format": FORMAT, "version": int(version), "fields": entries}


def check(description: Any, target: Any, *, version: int = 0) -> None:
    """Raise unless a checkpoint fits: before it is restored, and after.

        mo.checkpoint.check(layout, jax.eval_shape(make_state))     # does it fit the state that is wanted?
        mo.checkpoint.check(layout, restored)                       # are these the bits that were saved?

    What is no part of a state cannot be compared: rates, coefficients, seeds.

    Args:
      description: What `describe` gave when the checkpoint was saved.
      target: The state that is wanted, or that was restored: where it holds arrays, checksums are compared too.
      version: As for `describe`.

    Raises:
      CheckpointError: Naming the first field that differs, what is expected and what the checkpoint has; if
        `description` is none; if it has another format or version, see `migrate`.
    """
    saved = _checked(description)
    for name, number, now in (("format", description["format"], FORMAT), ("version", description["version"], version)):
        if number != now:
            hint = "migrate(...) brings it there" if number < now else "it was written by newer code"
            raise CheckpointError(f"the checkpoint must have {name} {now}, got {number}: {hint}")
    _compare(saved, describe(target)["fields"])


def fields(state: Any) -> dict[str, Any]:
    """The leaves of a state by path, such as "0/velocity/codes/0/w"; the same for what Orbax restores without a target.

    Args:
      state: Any tree.

    Returns:
      A dictionary in the order of the tree.

    Raises:
      ValueError: If two leaves have the same path, since a key holds a slash.
    """
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if _name(path) in found:
            raise ValueError(f"state must have a path of its own for each leaf, got two at {_name(path)}")
        found[_name(path)] = x
    return found


def from_fields(leaves: Mapping[str, Any], target: Any) -> Any:
    """The inverse of `fields`: a state of the structure of `target`.

    Args:
      leaves: An array for each path.
      target: The state that is wanted; arrays or `ShapeDtypeStruct`. Where a leaf has a sharding, the array is put
        there.

    Returns:
      A state. Nothing is cast.

    Raises:
      CheckpointError: Naming the first field that is missing, too many, or of another shape or dtype.
    """
    expected = fields(target)
    described = {path: _entry(x) for path, x in expected.items()}
    _compare({path: _entry(x) for path, x in leaves.items()}, described)
    placed = [
        jax.device_put(leaves[path], x.sharding) if getattr(x, "sharding", None) is not None else leaves[path]
        for path, x in expected.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(target), placed)


def migrate(saved: Any, description: Any, target: Any, migrations: Mapping[int, Migration] | None = None) -> Any:
    """A state that was saved under an older version, or by another optimizer, in the form of `target`.

        def renamed(leaves):                                   # from version 0 to version 1
            return {path.replace("/trace/", "/velocity/values/0/"): x for path, x in leaves.items()}

        state = mo.checkpoint.migrate(saved, layout, target, {0: renamed})

    First `saved` is checked against its description, then come this package's own changes of format, then the functions
    of `migrations`, from the version of the checkpoint upwards; the result is checked against `target`. A function may
    build states on its way: `fields(mo.convert(from_fields(leaves, old), "int8", like=target))`.

    Args:
      saved: The restored state, also one without its NamedTuples, as Orbax gives without a target.
      description: What `describe` gave when it was saved.
      target: The state that is wanted; arrays or `ShapeDtypeStruct`, with a sharding where one is wanted.
      migrations: For each older version the function from there to the next: it takes what `fields` gives, and returns
        the same for the next version. The newest version is the greatest key plus one.

    Returns:
      A state of the structure, shapes and dtypes of `target`.

    Raises:
      CheckpointError: Naming the first field that differs; if a version has no migration, or is newer than all of them.
      TypeError: If a migration returns no mapping.
    """
    arrays = {path: entry for path, entry in _checked(description).items() if "type" not in entry}
    leaves = fields(saved)
    found = describe(saved)["fields"]
    _compare(arrays, {path: found[path] for path in leaves})
    leaves = _chained(leaves, "format", description["format"], FORMAT, _UPGRADES)
    steps = dict(migrations or {})
    newest = max(steps) + 1 if steps else description["version"]
    leaves = _chained(leaves, "version", description["version"], newest, steps)
    return from_fields(leaves, target)


def _chained(leaves: dict[str, Any], what: str, old: int, new: int, steps: Mapping[int, Migration]) -> dict[str, Any]:
    """`leaves` after the steps from `old` to `new`."""
    if old > new:
        raise CheckpointError(f"the checkpoint must have {what} {new} or an older one, got {old}")
    for number in range(old, new):
        if number not in steps:
            raise CheckpointError(f"migrations must hold a function from {what} {number}, got {sorted(steps)}")
        result = steps[number](dict(leaves))
        if not isinstance(result, Mapping):
            raise TypeError(
                f"the migration from {what} {number} must return a mapping from paths, got {checks.shown(result)}"
            )
        leaves = dict(result)
    return leaves


def _checked(description: Any) -> dict[str, Any]:
    """The fields of a description."""
    numbers = ("format", "version")
    if not (
        isinstance(description, Mapping)
        and all(isinstance(description.get(name), int) for name in numbers)
        and isinstance(description.get("fields"), Mapping)
        and all(isinstance(x, Mapping) and ("type" in x or "dtype" in x) for x in description["fields"].values())
    ):
        got = f"keys {sorted(map(str, description))}" if isinstance(description, Mapping) else repr(description)
        raise CheckpointError(f"description must be what describe gives, with format, version and fields, got {got}")
    return dict(description["fields"])


def _compare(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise at the first difference of two descriptions, in the order of what is wanted."""
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


def _text(entry: Mapping[str, Any]) -> str:
    return f"a {entry['type']}" if "type" in entry else f"{entry['dtype']}{list(entry['shape'])}"


def _parts(node: Any, path: Any = ()) -> Iterator[tuple[str, Any]]:
    """Paths with the leaves of a tree, and with the classes of its NamedTuples, in the order of the tree."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        yield _name(path), type(node)
    treedef: Any
    pairs, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if jax.tree_util.treedef_is_leaf(treedef):
        if treedef.num_leaves:
            yield _name(path), node
        return
    for key, child in pairs:
        yield from _parts(child, (*path, *key))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/") or "."


def _entry(x: Any) -> dict[str, Any]:
    return {"shape": list(jnp.shape(x)), "dtype": str(x.dtype if hasattr(x, "dtype") else jnp.result_type(x))}


def _on_device(x: Any) -> Any:
    """`x` where it can be computed with: not in the host's memory."""
    if not isinstance(x, jax.Array):
        return jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    usual = next(iter(x.sharding.device_set)).default_memory().kind
    return x if x.sharding.memory_kind in (None, usual) else jax.device_put(x, x.sharding.with_memory_kind(usual))


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    """A uint32: a sum over the elements, in whole numbers, and so the same on every mesh. Compiled once a shape."""
    if jnp.iscomplexobj(x):
        both: jax.Array = _checksum(jnp.real(x)) + mix(_checksum(jnp.imag(x)))
        return both
    if x.dtype in (jnp.bool_, jnp.int4, jnp.uint4):
        x = x.astype(jnp.int8)
    width = x.dtype.itemsize
    # Eight bytes become two words, along an axis of their own.
    words = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)).astype(jnp.uint32)
    # The bits and the place are hashed one after the other, so that neither can make up for the other.
    return jnp.sum(mix(mix(words) ^ random_bits(words.shape, jnp.uint32(0))), dtype=jnp.uint32)
