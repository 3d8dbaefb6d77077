"""`telemetry`: the figures of a `monitor` as a dictionary of numbers."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from .._tree import Leaves, absent, find_all, unboxed
from .._typing import DType
from .figures import Figures
from .monitor import MonitorState
from .observed import Codes, stored_velocities


def telemetry(opt_state: optax.OptState) -> dict[str, Any]:
    """The figures of a `monitor` in any optimizer state: chained, masked, injected, accumulated, ...

    Args:
      opt_state: A state, or any tree, that holds a state of `monitor`; the live one of an `nnx.Optimizer` too.

    Returns:
      A dictionary of numbers, for a progress bar or a log: those that `monitor` names, `bytes` of the monitored state,
      and `bytes_per_parameter` for parameters with a velocity (an int4 counts half a byte, as TPUs and GPUs keep it).
      Of several velocities each has an entry, "cosine/0", "cosine/1", in the order of `velocity`; fields of `compress`
      have theirs by name, "cosine/mu". Figures of the second of several monitors begin with "1/". Python floats; under
      a transformation such as `jax.jit` traced scalars, and arrays where the state is batched.

    Raises:
      ValueError: If there is no state of `monitor`.
    """
    _checks.state("opt_state", opt_state)
    states = [state for _, state in find_all(unboxed(opt_state), MonitorState)]
    if not states:
        raise ValueError("opt_state must hold a state of monitor, got one without")
    found: dict[str, Any] = {}
    for i, state in enumerate(states):
        prefix = f"{i}/" if len(states) > 1 else ""
        found |= {prefix + name: value for name, value in _numbers(state).items()}
    return found


def _numbers(state: MonitorState) -> dict[str, Any]:
    """The figures of one monitor by name."""
    figures, memory = state.figures, state.memory
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((figures, memory))):
        figures, memory = jax.device_get((figures, memory))
    velocities = stored_velocities(state.inner)
    names = _labels(velocities)
    found: dict[str, Any] = {name: getattr(figures, name) for name in Figures._fields[:2]}
    for name in Figures._fields[2:]:
        found |= _each(name, getattr(figures, name), names)
    if memory is not None:
        found |= {"gain": memory.gain, "mean_lag": memory.mean_lag}
        found |= _each("age", memory.age, [n for n, v in zip(names, velocities, strict=True) if v.field is None])
    found |= _sizes(state.inner, velocities)
    return {
        name: float(x) if isinstance(x, np.ndarray | np.generic) and x.ndim == 0 else x for name, x in found.items()
    }


def _sizes(state: optax.OptState, velocities: list[Codes]) -> dict[str, float]:
    """The bytes of a state, and over the number of its parameters with a velocity, if there are any."""
    total = sum(x.size * _bits(x.dtype) / 8 for x in jax.tree.leaves(state))
    sizes = zip(*([0 if absent(x) else x.size for x in Leaves(v.tree).values] for v in velocities), strict=True)
    parameters = sum(map(max, sizes))
    return {"bytes": total} | ({"bytes_per_parameter": total / parameters} if parameters else {})


def _labels(velocities: list[Codes]) -> list[str]:
    """Labels that tell the velocities apart: their numbers, or the fields of `compress` where these differ."""
    count = itertools.count()
    names = [str(next(count)) if v.field is None else v.field for v in velocities]
    return names if len(set(names)) == len(names) else [str(i) for i in range(len(names))]


def _each(name: str, values: jax.Array, suffixes: list[str]) -> dict[str, Any]:
    """An entry for each velocity; a lone one needs no suffix."""
    if len(suffixes) == 1:
        suffixes = [""]
    return {f"{name}/{suffix}" if suffix else name: values[..., i] for i, suffix in enumerate(suffixes)}


def _bits(dtype: DType) -> int:
    return int(jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize)
