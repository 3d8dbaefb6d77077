"""Live velocities to and from the variables of Keras' optimizers; nothing here imports Keras."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .. import _checks
from .slots import (
    Layouts,
    Slot,
    as_array,
    checked_layouts,
    checked_names,
    checked_steps,
    counted,
    has_velocity,
    permuted,
    read_one,
    write,
)


def from_keras(
    opt_state: Any,
    variables: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    layouts: Layouts | None = None,
    steps: int | None = None,
) -> Any:
    """The velocities of a `keras.optimizers.SGD` (or Lion) put into the state of our optimizer.

        variables = {v.path: v for v in keras_optimizer.variables}
        state = mo.interop.from_keras(tx.init(params), variables, {"dense/kernel": "SGD/dense_kernel_momentum", ...})

    In the basis of `keras_sgd` (Keras' velocity has the learning rate and the sign in it) or `lion`.

    Args:
      opt_state: What `init` of our optimizer gave, velocities in float32.
      variables: Keras' optimizer variables, or arrays, by name. Names that end in "iteration" and "learning_rate" are
        known: the first gives `steps`, the second is the optimizer's own here.
      names: For every parameter, from its path here to its velocity's name there.
      layouts: As for `from_torch`; Keras and Flax lay layers out alike.
      steps: The number of updates made, if `variables` has no iteration.

    Returns:
      A state like `opt_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if `steps` is needed or is not the
        iteration.
      TypeError: If an argument or entry is of the wrong type.

    Reference:
      Keras 3.15, `keras/src/optimizers/sgd.py`.
    """
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a mapping from names to arrays, got {_checks.shown(variables)}")
    known = {key.rsplit("/", 1)[-1]: value for key, value in variables.items()}
    count = checked_steps(steps)
    if "iteration" in known:
        iteration = int(np.asarray(known["iteration"]))
        if count is not None and count != iteration:
            raise ValueError(f"steps must be the iteration of variables, {iteration}, or None, got {steps!r}")
        count = iteration
    entries = {k: v for k, v in variables.items() if k.rsplit("/", 1)[-1] not in ("iteration", "learning_rate")}
    if not has_velocity(opt_state):
        for key in entries:
            raise ValueError(f"variables has {key!r}, and opt_state no velocity to put it into")
        return counted(opt_state, count)
    ours = read_one(opt_state)
    axes = checked_layouts(layouts, ours)
    slots = {}
    for path, key in checked_names(names, ours, entries, "variable").items():
        value = permuted(path, key, as_array(key, entries[key]), axes.get(path))
        slots[path] = Slot((value,), max(count or 1, 1))
    return write(opt_state, slots, count)


def to_keras(opt_state: Any, names: Mapping[str, str], *, layouts: Layouts | None = None) -> dict[str, np.ndarray]:
    """The inverse of `from_keras`: arrays by the name of Keras' variables, for `variable.assign`.

    The iteration is not among them: `keras_optimizer.iterations.assign(steps)`.

    Args:
      opt_state: Of our optimizer, velocities in any storage.
      names: As for `from_keras`.
      layouts: As for `from_keras`, in the same direction.

    Returns:
      A dictionary of NumPy arrays. A masked parameter has none.

    Raises:
      ValueError: Naming the entry, if one is missing or too many, or a layout does not fit.
      TypeError: If an argument is of the wrong type.

    Reference:
      As for `from_keras`.
    """
    if not has_velocity(opt_state):
        return {}
    ours = read_one(opt_state)
    axes = checked_layouts(layouts, ours)
    out = {}
    for path, key in checked_names(names, ours, list(getattr(names, "values", list)()), "variable").items():
        velocities = ours[path].velocities
        if velocities is not None:
            back = tuple(int(i) for i in np.argsort(axes[path])) if path in axes else None
            out[key] = np.array(permuted(path, key, np.array(velocities[0]), back), order="C")
    return out
