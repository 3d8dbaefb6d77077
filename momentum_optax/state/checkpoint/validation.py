"""Validation of a description that came with a checkpoint."""

from collections.abc import Callable, Mapping
from typing import NoReturn, TypeGuard

from ..._typing import JSON
from ...filters.fingerprints import is_fingerprint
from .entries import CheckpointError, clipped


def checked_fields(description: JSON) -> dict[str, dict[str, JSON]]:
    """The entries of a description, once all of it has the form that `describe` gives it."""
    if not isinstance(description, Mapping):
        _refuse("format, version and fields", description)
    for name in ("format", "version"):
        if not is_whole(description.get(name)):
            _refuse("a whole number from 0", description.get(name), name)
    entries = description.get("fields")
    if not isinstance(entries, Mapping):
        _refuse("a mapping from paths", entries, "fields")
    for path, entry in entries.items():
        if not isinstance(path, str):
            _refuse("paths as keys", path, "fields")
        _check_entry(path, entry)
    _check_checksums(description, entries)
    rules = description.get("rules", [])
    if not (isinstance(rules, list) and all(map(is_fingerprint, rules))):
        _refuse("what rules_of gives", rules, "rules")
    return dict(entries)


def is_whole(x: object) -> TypeGuard[int]:
    """Whether `x` is an int from 0, and not a bool."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _check_entry(path: str, entry: JSON) -> None:
    """Raise unless `entry` is a type, or a shape and a dtype with or without a checksum."""
    if not isinstance(entry, Mapping):
        _refuse("a mapping", entry, f"fields/{path}")
    if "type" in entry:
        if set(entry) != {"type"} or not isinstance(entry["type"], str):
            _refuse("the name of a type", dict(entry), f"fields/{path}")
        return
    for name, test in _TESTS.items():
        if not (test(entry[name]) if name in entry else name == "checksum"):
            _refuse(f"a {name}", entry.get(name), f"fields/{path}/{name}")
    odd = sorted(map(str, set(entry) - set(_TESTS)))
    if odd:
        _refuse("shape, dtype and checksum", odd, f"fields/{path}")


_TESTS: dict[str, Callable[[JSON], bool]] = {
    "shape": lambda x: isinstance(x, list) and all(map(is_whole, x)),
    "dtype": lambda x: isinstance(x, str),
    "checksum": lambda x: is_whole(x) and x < 2**32,
}


def _check_checksums(description: Mapping[str, JSON], entries: Mapping[str, JSON]) -> None:
    """Raise where a checksum has been lost: all arrays have one, or the state that was described had no values."""
    arrays = {path: "checksum" in entry for path, entry in entries.items() if "type" not in entry}
    whole = description.get("checksums", any(arrays.values()))
    if not isinstance(whole, bool):
        _refuse("True or False", whole, "checksums")
    for path, has_one in arrays.items():
        if has_one != whole:
            what = "a checksum, as checksums says" if whole else "no checksum, as checksums says"
            _refuse(what, entries[path].get("checksum"), f"fields/{path}/checksum")


def _refuse(what: str, got: object, where: str = "") -> NoReturn:
    at = f" at {where}" if where else ""
    raise CheckpointError(f"description must be what describe gives, with {what}, got {clipped(got)}{at}")
