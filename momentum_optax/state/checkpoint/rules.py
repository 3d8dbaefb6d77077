"""The rules of an optimizer in a description: its state holds velocities, and not what they mean."""

import functools

import jax
import optax

from ... import _checks
from ..._typing import JSON
from ...filters import Filter
from ...filters.fingerprints import difference, fingerprint, is_fingerprint, noted
from .entries import CheckpointError, clipped


def rules_of(tx: optax.GradientTransformation, params: optax.Params) -> list[dict[str, JSON]]:
    """The rules that an optimizer runs, for `describe` and `check`: in the order in which it makes their states.

        rules = mo.checkpoint.rules_of(tx, params)
        layout = mo.checkpoint.describe(state, rules=rules)

    Nothing is computed with `params`. Coefficients that are traced or injected (`optax.inject_hyperparams`) are unknown
    here; the state holds their values, and these are compared there.

    Args:
      tx: Any optimizer.
      params: The parameters, arrays or `ShapeDtypeStruct`.

    Returns:
      For each rule a dictionary of A, B, C and D, with the values of schedules at steps from 0 to 100,000.

    Raises:
      TypeError: If `tx` is not a transformation.
    """
    _checks.transformation("tx", tx)
    with noted() as found:
        # A new function each time: JAX caches shapes by function and would not run `tx.init` again.
        jax.eval_shape(functools.partial(tx.init), params)
    return found


def fingerprints(rules: JSON | Filter) -> list[dict[str, JSON]]:
    """The fingerprints of rules; what is a fingerprint already stays."""
    several = rules if isinstance(rules, list | tuple) else [rules]
    for rule in several:
        if not isinstance(rule, Filter) and not is_fingerprint(rule):
            raise TypeError(f"rules must be what rules_of gives, a Filter or a list of them, got {clipped(rule)}")
    return [fingerprint(rule) if isinstance(rule, Filter) else rule for rule in several]


def compare_rules(saved: list[dict[str, JSON]] | None, wanted: list[dict[str, JSON]]) -> None:
    """Raise at the first difference of the rules."""
    if saved is None:
        raise CheckpointError("the checkpoint must be described with rules= to compare them, got none")
    if len(saved) != len(wanted):
        raise CheckpointError(f"the checkpoint must be of {len(wanted)} rules, got {len(saved)}")
    for i, (old, now) in enumerate(zip(saved, wanted, strict=True)):
        problem = difference(now, old)
        if problem:
            raise CheckpointError(f"rule {i} of the checkpoint is another one: {problem}")
