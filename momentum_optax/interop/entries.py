"""Entries of another library's state matched with parameters here: by name, by layout of axes, as NumPy arrays."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from .. import _checks

Layouts: TypeAlias = Mapping[str, "str | tuple[int, ...]"]
# What a state dictionary calls a parameter: its number or its name.
EntryName: TypeAlias = "int | str"

# Axes of ours from axes of PyTorch's: `ours = theirs.transpose(axes)`.
LAYOUTS = {"linear": (1, 0), "conv1d": (2, 1, 0), "conv2d": (2, 3, 1, 0), "conv3d": (2, 3, 4, 1, 0)}


def checked_names(
    names: Mapping[str, EntryName], ours: Iterable[str], theirs: Iterable[EntryName], kind: str
) -> dict[str, EntryName]:
    """`names` as a dictionary, if it pairs every path of ours with an entry of theirs, and the reverse.

    Args:
      names: From paths of ours to entries of theirs.
      ours: Paths.
      theirs: Names of entries.
      kind: What the other library calls an entry: "parameter" or "variable".
    """
    if not isinstance(names, Mapping):
        raise TypeError(
            f"names must be a mapping from paths such as 'dense/kernel' to {kind}s, got {_checks.shown(names)}"
        )
    ours, theirs = list(ours), list(theirs)
    problems: tuple[tuple[str, list[EntryName]], ...] = (
        ("lacks the path {} of opt_state", [p for p in ours if p not in names]),
        (f"has the path {{}}, which is not in opt_state ({listed(ours)})", [p for p in names if p not in ours]),
        (f"lacks the {kind} {{}}", [t for t in theirs if t not in names.values()]),
        (f"has the {kind} {{}}, which is not there ({listed(theirs)})", [t for t in names.values() if t not in theirs]),
    )
    for problem, found in problems:
        if found:
            raise ValueError(f"names {problem.format(repr(found[0]))}")
    if len(set(names.values())) < len(names):
        raise ValueError(f"names must give each {kind} once, got {_checks.shown(dict(names))}")
    return dict(names)


def check_same_paths(ours: Iterable[str], theirs: Iterable[str]) -> None:
    """Raise unless two states have the same parameters."""
    ours, theirs = list(ours), list(theirs)
    for missing in [p for p in ours if p not in theirs]:
        raise ValueError(f"the other state lacks the entry {missing!r}")
    for extra in [p for p in theirs if p not in ours]:
        raise ValueError(f"the other state has the entry {extra!r}, which is not in opt_state")


def checked_layouts(layouts: Layouts | None, ours: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The permutation of axes for each path that has one."""
    if layouts is not None and not isinstance(layouts, Mapping):
        raise TypeError(f"layouts must be a mapping from paths to layouts, got {_checks.shown(layouts)}")
    ours, out = list(ours), {}
    for path, layout in (layouts or {}).items():
        if path not in ours:
            raise ValueError(f"layouts has the path {path!r}, which is not in opt_state; that has {listed(ours)}")
        axes = LAYOUTS.get(layout) if isinstance(layout, str) else layout
        are_whole = isinstance(axes, tuple) and all(isinstance(axis, int | np.integer) for axis in axes)
        if axes is None or not are_whole or sorted(axes) != list(range(len(axes))):
            named = ", ".join(map(repr, LAYOUTS))
            raise ValueError(
                f"layouts[{path!r}] must be {named} or a permutation such as (1, 0), got {_checks.shown(layout)}"
            )
        out[path] = axes
    return out


def to_ours(path: str, entry: EntryName, array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """An array of the other library with its axes in our order."""
    if axes is None:
        return array
    if array.ndim != len(axes):
        raise ValueError(f"entry {entry!r} for {path!r} must have {len(axes)} axes as its layout, got {array.shape}")
    return array.transpose(axes)


def to_theirs(path: str, entry: EntryName, array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """The inverse of `to_ours`, as a contiguous array that owns its memory."""
    back = None if axes is None else tuple(int(i) for i in np.argsort(axes))
    return np.array(to_ours(path, entry, array, back), order="C")


def as_array(entry: EntryName, value: Any) -> np.ndarray:
    """A NumPy array of a number, an array, or a tensor of PyTorch or Keras, without importing either."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # NumPy knows no bfloat16, so PyTorch cannot convert one.
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    array = np.asarray(value)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.complexfloating)):
        raise TypeError(f"entry {entry!r} must be an array of floats, got {array.dtype}")
    return array


def checked_steps(steps: int | None) -> int | None:
    """`steps` as an int or None."""
    if steps is not None:
        _checks.integer("steps", steps, 0)
    return None if steps is None else int(steps)


def listed(names: Iterable[EntryName]) -> str:
    """Names in a message."""
    return ", ".join(map(repr, names)) or "none"
