"""Live velocities to and from the state dictionaries of PyTorch's optimizers.

Nothing here imports PyTorch: plain dictionaries of arrays, or of its tensors on any device, suffice.
"""

__all__ = ["from_torch", "to_torch"]

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import numpy as np
import optax

from .. import _checks
from .entries import Layouts, as_array, checked_layouts, checked_names, checked_steps, to_ours, to_theirs
from .velocities import ParameterVelocity, counted, has_velocity, read_one, write

# A dictionary of PyTorch's, with values of many types.
StateDict: TypeAlias = Mapping[str, Any]


def from_torch(
    opt_state: optax.OptState,
    state_dict: StateDict,
    names: Mapping[str, int | str],
    *,
    layouts: Layouts | None = None,
    steps: int | None = None,
    key: str = "momentum_buffer",
) -> optax.OptState:
    """The velocities of a `torch.optim.SGD` (or timm, Apex, Signum, ...) put into the state of our optimizer.

        tx = mo.interop.torch_sgd(lr=0.1, momentum=0.9)
        state = mo.interop.from_torch(tx.init(params), torch_optimizer.state_dict(), {"dense/kernel": 0, "dense/bias": 1},
                                      layouts={"dense/kernel": "linear"})

    A parameter that PyTorch has no buffer for has had no gradient yet; its first step is still to come here too.
    The velocities are in the basis of the dialect's own function (`torch_sgd`, `timm_sgdw`, ...), or of `sgd` with the
    same numbers; for another rule, `change_basis` afterwards. For another storage, `convert` afterwards. Parameter
    groups with different hyperparameters are `optax.partition` here, with a dialect for each group.

    Args:
      opt_state: The result of our optimizer's `init`, with velocities in float32.
      state_dict: That of the PyTorch optimizer; its tensors may be arrays.
      names: For every parameter, from its path here ("dense/kernel") to its number in PyTorch's optimizer, or to its
        name where the state dictionary has `param_names`. Ignored without momentum, and so without velocities.
      layouts: For paths whose axes are in another order here: "linear" (out, in to in, out), "conv1d", "conv2d",
        "conv3d" (out, in, ... to ..., in, out), or a permutation p for `theirs.transpose(p)`. Others keep their axes.
      steps: The number of updates made; needed where a schedule or the storage counts them.
      key: The name of the velocity there; "exp_avg" in Lions.

    Returns:
      A state like `opt_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, of another shape or kind; if the first step of a
        parameter is pending and undampened there, which the state here cannot express; if `steps` is needed.
      TypeError: If an argument or entry is of the wrong type.

    Reference:
      PyTorch 2.13, `torch/optim/sgd.py` and `Optimizer.state_dict`.
    """  # noqa: E501  an example, to be copied
    _checks.state("opt_state", opt_state)
    groups = _torch_groups(state_dict)
    buffers = _torch_buffers(state_dict, groups, key)
    count = checked_steps(steps)
    if not has_velocity(opt_state):
        for number in buffers:
            raise ValueError(f"entry {number!r} has a {key}, and opt_state no velocity to put it into")
        return counted(opt_state, count)
    ours = read_one(opt_state)
    chosen = _torch_numbers(names, groups, ours)
    axes = checked_layouts(layouts, ours)
    velocities = {}
    for path, number in chosen.items():
        buffer = buffers.get(number)
        if buffer is None:
            _check_pending(path, number, ours[path], groups[number])
            velocities[path] = ParameterVelocity(None, 0)
        else:
            velocities[path] = ParameterVelocity((to_ours(path, number, buffer, axes.get(path)),), count or 1)
    return write(opt_state, velocities, count)


def to_torch(
    opt_state: optax.OptState,
    state_dict: StateDict,
    names: Mapping[str, int | str],
    *,
    layouts: Layouts | None = None,
    key: str = "momentum_buffer",
    array: Callable[[np.ndarray], Any] = np.asarray,
) -> dict[str, Any]:
    """The inverse of `from_torch`: a state dictionary for PyTorch's `load_state_dict`.

    Args:
      opt_state: Of our optimizer, velocities in any storage, in the basis that `from_torch` says.
      state_dict: That of the PyTorch optimizer to load, new or used; its groups are kept, its state replaced.
      names: As for `from_torch`.
      layouts: As for `from_torch`, in the same direction.
      key: As for `from_torch`.
      array: Makes a tensor from a NumPy array that owns its memory: `torch.from_numpy`.

    Returns:
      A new dictionary. A parameter whose first step is pending has no buffer in it, as in PyTorch.

    Raises:
      ValueError: Naming the entry, if one is missing or too many, or a layout does not fit.
      TypeError: If an argument is of the wrong type.

    Reference:
      As for `from_torch`.
    """
    _checks.state("opt_state", opt_state)
    groups = _torch_groups(state_dict)
    if not has_velocity(opt_state):
        return {**state_dict, "state": {}}
    ours = read_one(opt_state)
    axes = checked_layouts(layouts, ours)
    state = {}
    for path, number in _torch_numbers(names, groups, ours).items():
        velocities, age = ours[path]
        if velocities is None or age == 0:
            continue
        state[number] = {key: array(to_theirs(path, number, np.asarray(velocities[0]), axes.get(path)))}
    return {**state_dict, "state": dict(sorted(state.items()))}


def _check_pending(path: str, number: int, ours: ParameterVelocity, group: StateDict) -> None:
    """Raise if a first step is pending and undampened there, and has passed or is dampened here."""
    here = ours.age is not None or ours.velocities is None
    if group.get("dampening", 0) and not here:
        raise ValueError(
            f"entry {number!r} for {path!r} has had no gradient yet, and its first one will enter undampened "
            "there: the rule of opt_state has no such first step"
        )


def _torch_groups(state_dict: StateDict) -> dict[int, StateDict]:
    """The group of each parameter, by number."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"state_dict must be that of a PyTorch optimizer, with state and param_groups, got "
            f"{_checks.shown(state_dict)}"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping) or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise TypeError(f"state of state_dict must map parameters to mappings, got {_checks.shown(state)}")
    if not isinstance(groups, list | tuple) or not all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    ):
        raise TypeError(f"param_groups of state_dict must be mappings that list params, got {_checks.shown(groups)}")
    return {number: group for group in groups for number in group["params"]}


def _torch_numbers(
    names: Mapping[str, int | str], groups: Mapping[int, StateDict], ours: Mapping[str, ParameterVelocity]
) -> dict[str, int]:
    """From paths to the numbers of PyTorch's parameters."""
    called: dict[int | str, int] = {}
    for group in {id(g): g for g in groups.values()}.values():
        called.update(zip(group.get("param_names", ()), group["params"], strict=False))
    if isinstance(names, Mapping):
        for path, name in names.items():
            if isinstance(name, str) and name not in called:
                known = ", ".join(map(repr, called)) or "none: give its number"
                raise ValueError(
                    f"names[{path!r}] must be a parameter of state_dict, which names {known}, got {name!r}"
                )
        names = {path: called.get(name, name) if isinstance(name, str) else name for path, name in names.items()}
    return cast("dict[str, int]", checked_names(names, ours, groups, "parameter"))


def _torch_buffers(state_dict: StateDict, groups: Mapping[int, StateDict], key: str) -> dict[int, np.ndarray]:
    """The velocities by number, where there is one."""
    found = {}
    for number, entry in state_dict["state"].items():
        extra = sorted(set(entry) - {key})
        if number not in groups:
            raise ValueError(f"state_dict has state for {number!r}, which is not a parameter of its groups")
        if extra:
            raise ValueError(f"entry {number!r} of state_dict must hold {key} alone, got {', '.join(extra)} too")
        if entry.get(key) is not None:
            found[number] = as_array(number, entry[key])
    return found
