"""Live velocities to and from other libraries' optimizer states, and from one of our rules to another.

Nothing here imports PyTorch or Keras: plain dictionaries of arrays (or of their tensors, on the CPU) suffice.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..filters import Filter, equivalent
from ..transform import MomentumState
from .slots import (
    Slot,
    as_array,
    by_path,
    checked_layouts,
    checked_names,
    checked_steps,
    counted,
    has_velocity,
    only_state,
    order_of,
    path_name,
    permuted,
    read,
    write,
)

Layouts = Mapping[str, str | tuple[int, ...]]

# Where a rule with a special first step is looked at again: it must have settled.
_AGES = (2, 3, 10, 100, 1000, 100_000)
# Where Optax keeps a velocity.
_OPTAX_FIELDS = {
    optax.TraceState: "trace",
    optax.EmaState: "ema",
    optax.ScaleByLionState: "mu",
    optax.ScaleByAdamState: "mu",
}


def from_torch(
    opt_state: Any,
    state_dict: Mapping[str, Any],
    names: Mapping[str, int | str],
    *,
    layouts: Layouts | None = None,
    steps: int | None = None,
    key: str = "momentum_buffer",
) -> Any:
    """The velocities of a `torch.optim.SGD` (or timm, Apex, Signum, ...) put into the state of our optimizer.

        tx = mo.interop.torch_sgd(lr=0.1, momentum=0.9)
        state = mo.interop.from_torch(tx.init(params), torch_optimizer.state_dict(), {"dense/kernel": 0, "dense/bias": 1},
                                      layouts={"dense/kernel": "linear"})

    A parameter that PyTorch has no buffer for has had no gradient yet; its first step is still to come here too.
    The velocities are in the basis of the dialect's own function (`torch_sgd`, `timm_sgdw`, ...), or of `sgd` with the
    same numbers; for another rule, `change_basis` afterwards. For another storage, `convert` afterwards.

    Args:
      opt_state: What `init` of our optimizer gave, velocities in float32.
      state_dict: That of the PyTorch optimizer; its tensors may be arrays.
      names: For every parameter, from its path here ("dense/kernel") to its number in PyTorch's optimizer, or to its
        name where the state dictionary has `param_names`. Not looked at where there is no momentum, and so no velocity.
      layouts: For paths whose axes are in another order here: "linear" (out, in to in, out), "conv1d", "conv2d",
        "conv3d" (out, in, ... to ..., in, out), or a permutation p for `theirs.transpose(p)`. Others keep their axes.
      steps: The number of updates made; needed where a schedule or the storage counts them.
      key: What the velocity is called there; "exp_avg" in Lions.

    Returns:
      A state like `opt_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, of another shape or kind; if the first step of a
        parameter is pending and undampened there, which the state here cannot express; if `steps` is needed.
      TypeError: If an argument or entry is of the wrong type.

    Reference:
      PyTorch 2.13, `torch/optim/sgd.py` and `Optimizer.state_dict`.
    """  # noqa: E501  an example, to be copied
    groups = _torch_groups(state_dict)
    buffers = _torch_buffers(state_dict, groups, key)
    count = checked_steps(steps)
    if not has_velocity(opt_state):
        for number in buffers:
            raise ValueError(f"entry {number!r} has a {key}, and opt_state no velocity to put it into")
        return counted(opt_state, count)
    ours = read(_of_order_one(opt_state))
    chosen = _torch_numbers(names, groups, ours)
    axes = checked_layouts(layouts, ours)
    slots = {}
    for path, number in chosen.items():
        buffer = buffers.get(number)
        if buffer is None:
            pending_ok = only_state(opt_state).age is not None or ours[path].velocities is None
            if groups[number].get("dampening", 0) and not pending_ok:
                raise ValueError(
                    f"entry {number!r} for {path!r} has had no gradient yet, and its first one will enter undampened "
                    "there: the rule of opt_state has no such first step"
                )
            slots[path] = Slot(None, 0)
        else:
            slots[path] = Slot((permuted(path, number, buffer, axes.get(path)),), max(count or 1, 1))
    return write(opt_state, slots, count)


def to_torch(
    opt_state: Any,
    state_dict: Mapping[str, Any],
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
      array: What makes a tensor of a NumPy array of its own memory: `torch.from_numpy`.

    Returns:
      A new dictionary. A parameter whose first step is pending has no buffer in it, as in PyTorch.

    Raises:
      ValueError: Naming the entry, if one is missing or too many, or a layout does not fit.
      TypeError: If an argument is of the wrong type.

    Reference:
      As for `from_torch`.
    """
    groups = _torch_groups(state_dict)
    if not has_velocity(opt_state):
        return {**state_dict, "state": {}}
    ours = read(_of_order_one(opt_state))
    axes = checked_layouts(layouts, ours)
    state = {}
    for path, number in _torch_numbers(names, groups, ours).items():
        slot = ours[path]
        if slot.velocities is None or slot.age == 0:
            continue
        value = np.array(slot.velocities[0])
        back = tuple(int(i) for i in np.argsort(axes[path])) if path in axes else None
        state[number] = {key: array(np.array(permuted(path, number, value, back), order="C"))}
    return {**state_dict, "state": dict(sorted(state.items()))}


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
        raise TypeError(f"variables must be a mapping from names to arrays, got {variables!r}")
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
    ours = read(_of_order_one(opt_state))
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
    ours = read(_of_order_one(opt_state))
    axes = checked_layouts(layouts, ours)
    out = {}
    for path, key in checked_names(names, ours, list(getattr(names, "values", list)()), "variable").items():
        velocities = ours[path].velocities
        if velocities is not None:
            back = tuple(int(i) for i in np.argsort(axes[path])) if path in axes else None
            out[key] = np.array(permuted(path, key, np.array(velocities[0]), back), order="C")
    return out


def from_optax(opt_state: Any, optax_state: Any, *, rule: Filter | None = None, steps: int | None = None) -> Any:
    """The velocity of `optax.trace`, `ema`, `scale_by_lion` or `scale_by_adam` put into the state of our optimizer.

    In the basis of `heavy_ball` (also `sgd` and `torch_sgd`, without dampening) for `TraceState.trace`, of `ema` for
    `EmaState.ema` and `ScaleByAdamState.mu`, and of `lion_mix` for `ScaleByLionState.mu`.

    Args:
      opt_state: What `init` of our optimizer gave, velocities in float32.
      optax_state: Any state that holds exactly one of these.
      rule: The rule of `opt_state`; needed only where it debiases.
      steps: The number of updates made, if `optax_state` does not count them and something here does.

    Returns:
      A state like `opt_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if there is not exactly one state
        with a velocity; if `steps` or `rule` is needed, or `steps` is not the count.
      TypeError: If an argument or entry is of the wrong type.

    Reference:
      Optax 0.2.8, `optax/transforms/_accumulation.py` and `optax/_src/transform.py`.
    """
    ours = read(_of_order_one(opt_state))
    source = _optax_state(optax_state)
    count = checked_steps(steps)
    if "count" in source._fields:
        if count is not None and count != int(source.count):
            raise ValueError(f"steps must be the count of optax_state, {int(source.count)}, or None, got {steps!r}")
        count = int(source.count)
    paths, leaves = by_path(getattr(source, _OPTAX_FIELDS[type(source)]))
    there = dict(zip(paths, leaves, strict=True))
    _same_paths(ours, there)
    gains = None
    if only_state(opt_state).gain is not None:
        if not isinstance(rule, Filter) or count is None:
            raise ValueError(f"rule and the number of steps must be given, since opt_state debiases; got {rule!r}")
        gains = _gains(rule, count)
    slots = {
        path: Slot(None, 0) if not hasattr(x, "shape") else Slot((as_array(path, x),), 1 if count is None else count)
        for path, x in there.items()
    }
    return write(opt_state, slots, count, gains)


def to_optax(opt_state: Any, optax_state: Any, *, steps: int | None = None) -> Any:
    """The inverse of `from_optax`: `optax_state` with our velocity in place of its own, in its dtypes.

    Everything else in it, such as Adam's second moment, stays.

    Args:
      opt_state: Of our optimizer, velocities in any storage, in the basis that `from_optax` says.
      optax_state: What `init` of the Optax optimizer gave; holds exactly one state with a velocity.
      steps: The number of updates made; needed if that state counts them and ours does not.

    Returns:
      A state like `optax_state`.

    Raises:
      ValueError: Naming the entry, if one is missing, too many, or of another shape; if there is not exactly one state
        with a velocity; if `steps` is needed, or is not what our state has counted.
      TypeError: If an argument is of the wrong type.

    Reference:
      As for `from_optax`.
    """
    state = _of_order_one(opt_state)
    ours, target = read(state), _optax_state(optax_state)
    field = _OPTAX_FIELDS[type(target)]
    _same_paths(ours, dict(zip(*by_path(getattr(target, field)), strict=True)))

    def put(path: Any, old: Any) -> Any:
        velocities = ours[path_name(path)].velocities
        if velocities is None or not hasattr(old, "shape"):
            return old
        if velocities[0].shape != old.shape:
            raise ValueError(
                f"the velocity for {path_name(path)!r} must have shape {old.shape}, got {velocities[0].shape}"
            )
        return jnp.array(velocities[0], old.dtype)

    new = target._replace(**{field: jax.tree_util.tree_map_with_path(put, getattr(target, field))})
    if "count" in target._fields:
        count = checked_steps(steps)
        known = None if state.step is None else int(state.step)
        if count is None and known is None:
            raise ValueError("steps must be given, since optax_state counts them and opt_state does not; got None")
        if count is not None and known is not None and count != known:
            raise ValueError(f"steps must be what opt_state has counted, {known}, or None, got {steps!r}")
        new = new._replace(count=jnp.asarray(known if count is None else count, jnp.int32))
    return jax.tree.map(lambda x: new if x is target else x, optax_state, is_leaf=_is_optax)


def change_basis(opt_state: Any, source: Filter, target: Filter, *, into: Any, steps: int | None = None) -> Any:
    r"""The velocities of one rule as those of another with the same updates: $w = T^{-1} v$.

    Two rules of equal order with the same input-output map, neither of which has a velocity to spare, differ by exactly
    one change of basis. With $\mathcal{C} = [B, AB, \ldots]$ it is $T^{-1} = \mathcal{C}_w \mathcal{C}_v^{-1}$.

        source = mo.interop.Recipe("torch_sgd", lr=0.1, momentum=0.9).filter()
        target = mo.interop.Recipe("keras_sgd", learning_rate=0.1, momentum=0.9).filter()
        state = mo.interop.change_basis(state, source, target, into=keras_like.init(params))

    Args:
      opt_state: Of the optimizer to leave, velocities in any storage.
      source: Its rule, times its learning rate: of `scale_by_momentum(rule)` followed by a rate eta,
        `rule.scale(-eta)`; of a dialect, `Recipe(...).filter()`. Constant coefficients; for scheduled ones those of the
        step, `rule.at(step)`. A special first step may differ.
      target: The same of the optimizer to go on with.
      into: What `init` of that optimizer gave, velocities in float32.
      steps: The number of updates made; needed where something in `into` counts them and `opt_state` does not.

    Returns:
      A state like `into`.

    Raises:
      ValueError: If the rules differ in order or updates, change after the first gradient, or have a velocity to spare;
        if a state is not of its rule, or `into` debiases; naming the entry, if one is missing or too many, of another
        shape, or pending (its first step differs from the later ones in `source`, and `into` has no such first step);
        if `steps` is needed.
      TypeError: If an argument is of the wrong type.

    Reference:
      Kalman, "Mathematical description of linear dynamical systems", SIAM J. Control 1963.
    """
    s, t = _settled("source", source), _settled("target", target)
    state, new = only_state(opt_state), only_state(into)
    for name, rule, holder in (("source", s, state), ("target", t, new)):
        if rule.order != order_of(holder):
            raise ValueError(f"{name} must be the rule of its state, of order {order_of(holder)}, got {rule.order}")
    if s.order != t.order or not equivalent(s, t):
        n = s.order + t.order + 1
        responses = f"{s.impulse_response(n).tolist()} and {t.impulse_response(n).tolist()}"
        raise ValueError(f"source and target must have the same updates and order, got impulse responses {responses}")
    matrix = _reachable("target", t) @ np.linalg.inv(_reachable("source", s))
    count = checked_steps(steps)
    if count is None and state.step is not None:
        count = int(state.step)
    ours, there = read(state), read(new)
    _same_paths(there, ours)
    slots = {}
    for path, slot in ours.items():
        if slot.age == 0 and new.age is None:
            raise ValueError(
                f"the first step of {path!r} is pending and differs in source: into has no such first step"
            )
        if slot.velocities is None:
            slots[path] = Slot(None, 0)
            continue
        mixed = tuple(
            jnp.asarray(sum(float(m) * v for m, v in zip(row, slot.velocities, strict=True))) for row in matrix
        )
        slots[path] = Slot(mixed, max(count or 1, 1) if slot.age is None else slot.age)
    return write(into, slots, count)


def _of_order_one(opt_state: Any) -> MomentumState:
    state = only_state(opt_state)
    if order_of(state) != 1:
        raise ValueError(f"opt_state must hold one velocity per parameter, got {order_of(state)}")
    return state


def _torch_groups(state_dict: Any) -> dict[int, Mapping[str, Any]]:
    """The group of each parameter, by number."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"state_dict must be that of a PyTorch optimizer, with state and param_groups, got {state_dict!r}"
        )
    return {number: group for group in state_dict["param_groups"] for number in group["params"]}


def _torch_numbers(names: Any, groups: dict[int, Mapping[str, Any]], ours: Mapping[str, Any]) -> dict[str, int]:
    """From paths to the numbers of PyTorch's parameters."""
    called: dict[Any, int] = {}
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
    return checked_names(names, ours, groups, "parameter")


def _torch_buffers(state_dict: Mapping[str, Any], groups: Mapping[int, Any], key: str) -> dict[int, np.ndarray]:
    """The velocities by number, where there is one."""
    found = {}
    for number, entry in state_dict["state"].items():
        extra = sorted(set(entry) - {key})
        if number not in groups:
            raise ValueError(f"state_dict has state for {number!r}, which is no parameter of its groups")
        if extra:
            raise ValueError(f"entry {number!r} of state_dict must hold {key} alone, got {', '.join(extra)} too")
        if entry.get(key) is not None:
            found[number] = as_array(number, entry[key])
    return found


def _is_optax(x: Any) -> bool:
    return type(x) in _OPTAX_FIELDS


def _optax_state(optax_state: Any) -> Any:
    found = [x for x in jax.tree.leaves(optax_state, is_leaf=_is_optax) if _is_optax(x)]
    if len(found) != 1:
        kinds = ", ".join(kind.__name__ for kind in _OPTAX_FIELDS)
        raise ValueError(f"optax_state must hold one state of {kinds}, got {len(found)}")
    return found[0]


def _same_paths(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for missing in [p for p in ours if p not in theirs]:
        raise ValueError(f"the other state lacks the entry {missing!r}")
    for extra in [p for p in theirs if p not in ours]:
        raise ValueError(f"the other state has the entry {extra!r}, which is not in opt_state")


def _gains(rule: Filter, steps: int) -> tuple[float, ...]:
    """The velocities of a gradient that was always 1, after `steps` steps."""
    rule = rule.pruned()
    v = np.zeros(rule.order)
    for t in range(steps):
        A, B, _, _ = rule.at(t).matrices()
        v = A @ v + B
    return tuple(v.tolist())


def _settled(name: str, rule: Any) -> Filter:
    """The rule past its first step."""
    if not isinstance(rule, Filter):
        raise TypeError(f"{name} must be a Filter such as heavy_ball(0.9), got {rule!r}")
    if rule.reads_step:
        raise ValueError(f"{name} must have constant coefficients: give {name}.at(step)")
    settled = rule.at(1, 1)
    settled.matrices()
    for age in _AGES:
        pairs: Any = zip(settled.matrices(), rule.at(age, age).matrices(), strict=True)
        if not all(np.array_equal(x, y) for x, y in pairs):
            raise ValueError(f"{name} must not change after the first gradient, got one that does at the {age + 1}th")
    return settled.pruned()


def _reachable(name: str, rule: Filter) -> np.ndarray:
    """The matrix [B, AB, A^2 B, ...]."""
    A, B, _, _ = rule.matrices()
    columns = [B]
    for _ in range(rule.order - 1):
        columns.append(A @ columns[-1])
    matrix = np.stack(columns, axis=1) if columns else np.zeros((0, 0))
    if not rule.is_minimal() or not np.linalg.cond(matrix) < 1e12:
        raise ValueError(f"{name} must need all its velocities, got a rule that fewer could express")
    return matrix
