"""What to save beside a state, so that a checkpoint that does not fit is an error which names the field.

A library such as Orbax keeps arrays. What it does not know is what they mean: it restores into another optimizer whose
fields have the same names, and casts where dtypes differ. `describe` gives what to keep as JSON beside the arrays,
`check` compares that with a state, and `migrate` brings an older or another state into the form of today's.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from ..filters import Filter
from ..filters.fingerprints import difference, fingerprint, is_fingerprint, noted
from .checksums import checksum, dtype_name, has_checksum

# The form of this package's states. A change of it adds a function to `_UPGRADES`, under the number before.
FORMAT = 1


Migration = Callable[[dict[str, Any]], Mapping[str, Any]]


_UPGRADES: dict[int, Migration] = {}


class CheckpointError(ValueError):
    """A checkpoint is not what is expected; the message names the first field that differs."""


def describe(state: Any, *, version: int = 0, rules: Any = None) -> dict[str, Any]:
    """What a checkpoint of `state` should hold beside the arrays: JSON-able, the same on every mesh.

        layout = mo.checkpoint.describe({"params": params, "opt_state": opt_state})

    The checksum of an array is a sum modulo 2^32 of a hash of the bits and the place of each element, made where the
    array is: one other element always changes it (in elements of 8 bytes, one other half), any other difference leaves
    it the same with a chance of 2^-32. Python's floats count as JAX takes them, its whole numbers at any size.

    Args:
      state: An optimizer's state, or any tree with it; arrays or `ShapeDtypeStruct`, which have no checksums: where
        there is one, nothing has.
      version: The number of your own layout, a whole number from 0, for `migrate`.
      rules: The rules of the optimizer, which its state does not hold: what `rules_of(tx, params)` gives, a `Filter`
        or a list of them. `check` then notices another rule of the same form.

    Returns:
      A dictionary: `format`, the number of the form of this package's states; `version`; `checksums`, whether arrays
      have them; `fields`, which maps paths such as "opt_state/0/velocity/codes/0/w" to the shape, dtype and checksum of
      an array, or to the type of a NamedTuple; and, if given, `rules`.

    Raises:
      TypeError: If a leaf is no array or number, `version` no whole number, or `rules` something else.
      ValueError: If two leaves have the same path, or `version` is negative.
    """
    _checks.integer("version", version, 0)
    entries = _described(state)
    arrays = [entry for entry in entries.values() if "type" not in entry]
    whole = all("checksum" in entry for entry in arrays)
    if not whole:
        entries = {path: {k: x for k, x in entry.items() if k != "checksum"} for path, entry in entries.items()}
    described = {"format": FORMAT, "version": int(version), "checksums": whole, "fields": entries}
    return described if rules is None else described | {"rules": _fingerprints(rules)}


def rules_of(tx: optax.GradientTransformation, params: optax.Params) -> list[dict[str, Any]]:
    """The rules that an optimizer runs, for `describe` and `check`: in the order in which it makes their states.

        rules = mo.checkpoint.rules_of(tx, params)
        layout = mo.checkpoint.describe(state, rules=rules)

    Nothing is computed with `params`. What is traced or injected (`optax.inject_hyperparams`) is not known here; it is
    in the state, where its value counts.

    Args:
      tx: Any optimizer.
      params: The parameters, arrays or `ShapeDtypeStruct`.

    Returns:
      For each rule a dictionary of A, B, C and D, with the values of schedules at steps from 0 to 100,000.
    """
    with noted() as found:
        jax.eval_shape(tx.init, params)
    return found


def check(description: Any, target: Any, *, version: int = 0, rules: Any = None) -> None:
    """Raise unless a checkpoint fits: before it is restored, and after.

        mo.checkpoint.check(layout, jax.eval_shape(make_state))     # does it fit the state that is wanted?
        mo.checkpoint.check(layout, restored)                       # are these the bits that were saved?

    What is no part of a state cannot be compared, such as rates and seeds; rules only if they are given here and were
    given to `describe`.

    Args:
      description: What `describe` gave when the checkpoint was saved.
      target: The state that is wanted, or that was restored: where it holds arrays, checksums are compared too.
      version: As for `describe`.
      rules: Those of the optimizer that goes on, as for `describe`. Coefficients that are unknown on one side agree.

    Raises:
      CheckpointError: Naming the first field that differs, what is expected and what the checkpoint has; if
        `description` is none, naming the entry; if it has another format or version, see `migrate`.
      TypeError: As `describe` does.
    """
    _checks.integer("version", version, 0)
    saved = _checked(description)
    for name, number, now in (("format", description["format"], FORMAT), ("version", description["version"], version)):
        if number != now:
            hint = "migrate(...) brings it there" if number < now else "it was written by newer code"
            raise CheckpointError(f"the checkpoint must have {name} {now}, got {number}: {hint}")
    _compare(saved, _described(target))
    if rules is not None:
        _compare_rules(description.get("rules"), _fingerprints(rules))


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
    _compare(*({path: _entry(path, x) for path, x in each.items()} for each in (leaves, expected)))
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
      CheckpointError: Naming the first field that differs, or the entry of `description` that is none; if a version
        has no migration, or is newer than all of them; if `migrations` is no mapping from whole numbers to functions.
      TypeError: If a migration returns no mapping.
    """
    arrays = {path: entry for path, entry in _checked(description).items() if "type" not in entry}
    leaves = fields(saved)
    found = _described(saved)
    steps = _checked_migrations(migrations)
    _compare(arrays, {path: found[path] for path in leaves})
    leaves = _chained(leaves, "format", description["format"], FORMAT, _UPGRADES)
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
                f"the migration from {what} {number} must return a mapping from paths, got {_checks.shown(result)}"
            )
        leaves = dict(result)
    return leaves


def _checked_migrations(migrations: Any) -> dict[int, Migration]:
    steps = {} if migrations is None else migrations
    if not isinstance(steps, Mapping):
        raise CheckpointError(f"migrations must map versions to functions, got {_clipped(steps)}")
    for number, step in steps.items():
        if not _is_whole(number):
            raise CheckpointError(f"migrations must have whole numbers as keys, got {_clipped(number)}")
        if not callable(step):
            raise CheckpointError(f"migrations must hold a function from version {number}, got {_clipped(step)}")
    return dict(steps)


def _checked(description: Any) -> dict[str, Any]:
    """The fields of a description."""
    if not isinstance(description, Mapping):
        _refuse("format, version and fields", description)
    for name in ("format", "version"):
        if not _is_whole(description.get(name)):
            _refuse("a whole number from 0", description.get(name), name)
    entries = description.get("fields")
    if not isinstance(entries, Mapping):
        _refuse("a mapping from paths", entries, "fields")
    for path, entry in entries.items():
        if not isinstance(path, str):
            _refuse("paths as keys", path, "fields")
        _check_entry(path, entry)
    _check_whole(description, entries)
    rules = description.get("rules", [])
    if not (isinstance(rules, list) and all(map(is_fingerprint, rules))):
        _refuse("what rules_of gives", rules, "rules")
    return dict(entries)


def _check_entry(path: str, entry: Any) -> None:
    """Raise unless `entry` is a type, or a shape and a dtype with or without a checksum."""
    if not isinstance(entry, Mapping):
        _refuse("a mapping", entry, f"fields/{path}")
    if "type" in entry:
        if set(entry) != {"type"} or not isinstance(entry["type"], str):
            _refuse("the name of a type", dict(entry), f"fields/{path}")
        return
    tests: dict[str, Callable[[Any], bool]] = {
        "shape": lambda x: isinstance(x, list) and all(map(_is_whole, x)),
        "dtype": lambda x: isinstance(x, str),
        "checksum": lambda x: _is_whole(x) and x < 2**32,
    }
    for name, test in tests.items():
        if not (test(entry[name]) if name in entry else name == "checksum"):
            _refuse(f"a {name}", entry.get(name), f"fields/{path}/{name}")
    odd = sorted(map(str, set(entry) - set(tests)))
    if odd:
        _refuse("shape, dtype and checksum", odd, f"fields/{path}")


def _check_whole(description: Mapping[str, Any], entries: Mapping[str, Any]) -> None:
    """Raise where a checksum has been lost: all arrays have one, or the state that was described had no values."""
    arrays = {path: "checksum" in entry for path, entry in entries.items() if "type" not in entry}
    whole = description.get("checksums", any(arrays.values()))
    if not isinstance(whole, bool):
        _refuse("True or False", whole, "checksums")
    for path, has_one in arrays.items():
        if has_one != whole:
            what = "a checksum, as checksums says" if whole else "no checksum, as checksums says"
            _refuse(what, entries[path].get("checksum"), f"fields/{path}/checksum")


def _refuse(what: str, got: Any, where: str = "") -> NoReturn:
    at = f" at {where}" if where else ""
    raise CheckpointError(f"description must be what describe gives, with {what}, got {_clipped(got)}{at}")


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _clipped(x: Any) -> str:
    text = repr(x)
    return text if len(text) <= 80 else text[:77] + "..."


def _fingerprints(rules: Any) -> list[dict[str, Any]]:
    """The fingerprints of rules, or those that were made before."""
    several = rules if isinstance(rules, list | tuple) else [rules]
    found: list[dict[str, Any]] = []
    for rule in several:
        if not isinstance(rule, Filter) and not is_fingerprint(rule):
            raise TypeError(f"rules must be what rules_of gives, a Filter or a list of them, got {_clipped(rule)}")
        found.append(fingerprint(rule) if isinstance(rule, Filter) else rule)
    return found


def _compare_rules(saved: Any, wanted: list[dict[str, Any]]) -> None:
    """Raise at the first difference of the rules."""
    if saved is None:
        raise CheckpointError("the checkpoint must be described with rules= to compare them, got none")
    if len(saved) != len(wanted):
        raise CheckpointError(f"the checkpoint must be of {len(wanted)} rules, got {len(saved)}")
    for i, (old, now) in enumerate(zip(saved, wanted, strict=True)):
        problem = difference(now, old)
        if problem:
            raise CheckpointError(f"rule {i} of the checkpoint is another one: {problem}")


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


def _described(state: Any) -> dict[str, Any]:
    """An entry for each part of a state; checksums where there are values."""
    entries: dict[str, Any] = {}
    known: dict[str, Any] = {}
    for path, x in _parts(state):
        if path in entries:
            raise ValueError(f"state must have a path of its own for each part, got two at {path}")
        if isinstance(x, type):
            entries[path] = {"type": x.__name__}
            continue
        if not has_checksum(x):
            raise TypeError(f"state must hold arrays and numbers, got {_clipped(x)} at {path}")
        entries[path] = _entry(path, x)
        if not isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
            known[path] = checksum(x)
    for path, number in jax.device_get(known).items():
        entries[path]["checksum"] = int(number)
    return entries


def _entry(path: str, x: Any) -> dict[str, Any]:
    if not has_checksum(x):
        raise CheckpointError(f"{path} must be an array or a number, got {_clipped(x)}")
    return {"shape": list(jnp.shape(x)), "dtype": dtype_name(x)}
