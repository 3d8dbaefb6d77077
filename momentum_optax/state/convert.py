"""`convert`: a running optimizer's state from one storage to another, or in the form of another optimizer's."""

import functools
from collections.abc import Collection, Mapping

import jax
import optax

from .. import _checks
from .._boxes import in_box
from .._tree import boxes_of, is_live, live, reboxed, unboxed
from .._typing import PyTree
from ..storage._by_leaf import AnyStorage
from ..wrappers.selection import SECOND_MOMENTS
from .fitting import fitted
from .reencoding import Targets, check_storages, fields_of, reencoded, refitted


def convert(
    opt_state: optax.OptState,
    storage: AnyStorage | Mapping[str, AnyStorage],
    *,
    like: optax.OptState | None = None,
    second_moments: Collection[str] = SECOND_MOMENTS,
) -> optax.OptState:
    """Keep the velocities in a running optimizer's state in another storage.

        state = mo.convert(state, "int8")
        tx = mo.sgd(0.1, 0.9, storage="int8")         # and continue with this one

    The state is that of the new optimizer, with two exceptions that `like` settles: a step that only the old storage
    read remains (and does no harm), and float64 velocities that went through fewer bytes come back as float32.
    Velocities that are in this storage already keep their bits.

    With `like` the other optimizer may also differ in its wrappers, or in the counts that its rule reads:

        tx = mo.sgd(0.1, optax.linear_schedule(0.9, 0.5, 1000))          # a schedule for a running state
        state = mo.convert(state, "float32", like=tx.init(params))

    * a step that the state lacks is taken from `like`, 0 from `init`: schedules and noise begin there. So are the
      counters of learning-rate schedules, of `guarded`, `monitor` and restarts, and injected hyperparameters. The
      memory of a monitor (`gain`, `mean_lag`) then covers later gradients only;
    * the ages that a first step or dampening reads: for a leaf that holds a velocity, the first step is over. Its age
      is the number of steps counted so far, or 1 if none were; a leaf whose velocities are all zero has age 0;
    * the gains of `debias=True` can be left out, but not added: they depend on the rule and on every step so far;
    * `accumulated` begins a cycle, or must have finished one; its `gradient_step` is the step of schedules;
    * fields of `compress` are compressed in `storage` or decompressed;
    * a momentum that only one of the optimizers has begins at zero, or is left out.

    Velocities do not depend on the rule: another order is refused, another rule of the same order continues with them
    (`checkpoint.check` with `rules` notices that).

    Args:
      opt_state: Any state that holds states of `scale_by_momentum` or `compress`.
      storage: As for `scale_by_momentum`; or a mapping from fields of `compress`, and "velocity" for the velocities of
        `scale_by_momentum`, to one each. Other fields keep their storage. A mapping whose keys are all identifiers is
        from fields, any other one from patterns; `storage.by_leaf` makes patterns of either.
      like: The state that `init` of the new optimizer returns; the result has its structure, shapes and dtypes. A
        `ShapeDtypeStruct` is enough where no value is taken from it.
      second_moments: The names of fields of `compress` that hold squares, as given to it.

    Returns:
      A state of the same structure, with other parts. A storage that reads a step begins to count at zero if the old
      state did not count.

    Raises:
      ValueError: If there is no such storage; if `opt_state` holds no such state or no such field; if a field
        would go to a storage that is not fit for it; if the result cannot be `like`, saying why.
      TypeError: If an argument is of the wrong type.
    """
    _checks.state("opt_state", opt_state)
    if like is not None:
        _checks.state("like", like)
    targets = Targets(storage, second_moments)
    check_storages(unboxed(opt_state), targets)
    new = reencoded(opt_state, targets)
    if like is not None:
        new = fitted(unboxed(new), unboxed(like), functools.partial(refitted, targets))
    _check_found(opt_state, targets, like is not None)
    if like is None:
        return live(new) if is_live(opt_state) else new
    return live(_in_variables(new, opt_state)) if is_live(opt_state) else reboxed(new, like)


def _check_found(opt_state: PyTree, targets: Targets, fitting: bool) -> None:
    """Raise if the state holds nothing to convert, or lacks a field that was named."""
    missing = targets.missing()
    if missing or not (targets.found or fitting):
        fields = ", ".join(map(repr, sorted(fields_of(opt_state)))) or "none"
        asked = ", ".join(map(repr, missing)) or "a state without any"
        raise ValueError(f"opt_state must hold a state of scale_by_momentum or compress (it has {fields}), got {asked}")


def _in_variables(bare: PyTree, old: PyTree) -> PyTree:
    """Arrays of `bare` in the variables that `old` has at their paths, where it has any."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(unboxed(old))]
    boxes = dict(zip(paths, boxes_of(old), strict=True))
    return jax.tree_util.tree_map_with_path(lambda path, x: in_box(boxes.get(path, x), x), bare)
