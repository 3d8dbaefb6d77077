"""Live velocities to and from the variables of Keras' optimizers; nothing here imports Keras."""

__all__ = ["from_keras", "to_keras"]

from collections.abc import Iterable, Mapping
from typing import cast

import numpy as np
import optax

from .. import _checks
from .entries import Layouts, as_array, checked_layouts, checked_names, checked_steps, to_ours, to_theirs
from .velocities import ParameterVelocity, counted, has_velocity, read_one, write


def from_keras(
    opt_state: optax.OptState,
    variables: Mapping[str, object],
    names: Mapping[str, str],
    *,
    layouts: Layouts | None = None,
    steps: int | None = None,
) -> optax.OptState:
    """The velocities of a `keras.optimizers.SGD` (or Lion) put into the state of our optimizer.

        variables = {v.path: v for v in keras_optimizer.variables}
        state = mo.interop.from_keras(tx.init(params), variables, {"dense/kernel": "SGD/dense_kernel_momentum", ...})

    In the basis of `keras_sgd` (Keras' velocity has the learning rate and the sign in it) or `lion`.

    Args:
      opt_state: The result of our optimizer's `init`, with velocities in float32.
      variables: Keras' optimizer variables, or arrays, by name. Names that end in "iteration" and "learning_rate" are
        known: the first gives `steps`, the second belongs to our optimizer's arguments.
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
    _checks.state("opt_state", opt_state)
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
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
    velocities = {}
    for path, key in _variable_names(names, ours, entries).items():
        value = to_ours(path, key, as_array(key, entries[key]), axes.get(path))
        velocities[path] = ParameterVelocity((value,), count or 1)
    return write(opt_state, velocities, count)


def to_keras(
    opt_state: optax.OptState, names: Mapping[str, str], *, layouts: Layouts | None = None
) -> dict[str, np.ndarray]:
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
    _checks.state("opt_state", opt_state)
    if not has_velocity(opt_state):
        return {}
    ours = read_one(opt_state)
    axes = checked_layouts(layouts, ours)
    out = {}
    theirs = names.values() if isinstance(names, Mapping) else ()
    for path, key in _variable_names(names, ours, theirs).items():
        velocities = ours[path].velocities
        if velocities is not None:
            out[key] = to_theirs(path, key, np.asarray(velocities[0]), axes.get(path))
    return out


def _variable_names(names: Mapping[str, str], ours: Iterable[str], theirs: Iterable[str]) -> dict[str, str]:
    return cast("dict[str, str]", checked_names(names, ours, theirs, "variable"))
