"""`describe` and `check`: the form and the bits of a state as JSON, and whether another state has the same."""

from ... import _checks
from ..._typing import JSON, PyTree
from ...filters import Filter
from . import formats
from .entries import CheckpointError, compare, described
from .rules import compare_rules, fingerprints
from .validation import checked_fields


def describe(state: PyTree, *, version: int = 0, rules: JSON | Filter = None) -> dict[str, JSON]:
    """The form and the checksums of `state`, to save beside its arrays: JSON-able, the same on every mesh.

        layout = mo.checkpoint.describe({"params": params, "opt_state": opt_state})

    The checksum of an array is a sum modulo 2^32 of a hash of the bits and the place of each element, computed on the
    array's devices. A change of one element (in elements of 8 bytes, of one half) always changes it; any other
    difference goes unnoticed with a chance of 2^-32. Python's floats count in the dtype that JAX gives them, its whole
    numbers at any size.

    Args:
      state: An optimizer's state, or any tree with it; arrays or `ShapeDtypeStruct`. These have no checksums, and one
        of them is enough for the description to have none.
      version: The number of your own layout, a whole number from 0, for `migrate`.
      rules: The rules of the optimizer, which its state does not hold: what `rules_of(tx, params)` returns, a `Filter`
        or a list of them. `check` then notices another rule whose state has the same form.

    Returns:
      A dictionary: `format`, the number of the form of this package's states; `version`; `checksums`, whether arrays
      have them; `fields`, which maps paths such as "opt_state/0/velocity/codes/0/w" to the shape, dtype and checksum of
      an array, or to the type of a NamedTuple; and, if given, `rules`.

    Raises:
      TypeError: If a leaf is not an array or a number, `version` is not a whole number, or `rules` is something else.
      ValueError: If two leaves have the same path, or `version` is negative.
    """
    _checks.integer("version", version, 0)
    entries = described(state)
    arrays = [entry for entry in entries.values() if "type" not in entry]
    whole = all("checksum" in entry for entry in arrays)
    if not whole:
        entries = {path: {k: x for k, x in entry.items() if k != "checksum"} for path, entry in entries.items()}
    found = {"format": formats.FORMAT, "version": int(version), "checksums": whole, "fields": entries}
    return found if rules is None else found | {"rules": fingerprints(rules)}


def check(description: JSON, target: PyTree, *, version: int = 0, rules: JSON | Filter = None) -> None:
    """Raise unless a checkpoint fits: before it is restored, and after.

        mo.checkpoint.check(layout, jax.eval_shape(make_state))     # does it fit the state that is wanted?
        mo.checkpoint.check(layout, restored)                       # are these the bits that were saved?

    Learning rates and seeds are not part of a state and are not compared; rules are compared only if they are given
    here and were given to `describe`.

    Args:
      description: The dictionary that `describe` returned when the checkpoint was saved.
      target: The state that is wanted, or that was restored: where it holds arrays, checksums are compared too.
      version: As for `describe`.
      rules: Those of the optimizer that continues, as for `describe`. A coefficient that is unknown on one side agrees
        with any.

    Raises:
      CheckpointError: Naming the first field that differs, what is expected and what the checkpoint has; if
        `description` is not a description, naming the entry; if it has another format or version, see `migrate`.
      TypeError: As `describe` does.
    """
    _checks.integer("version", version, 0)
    saved = checked_fields(description)
    for name, now in (("format", formats.FORMAT), ("version", version)):
        number = description[name]
        if number != now:
            hint = "migrate(...) brings it there" if number < now else "it was written by newer code"
            raise CheckpointError(f"the checkpoint must have {name} {now}, got {number}: {hint}")
    compare(saved, described(target))
    if rules is not None:
        compare_rules(description.get("rules"), fingerprints(rules))
