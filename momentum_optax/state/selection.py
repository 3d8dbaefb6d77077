"""The parameters that `reset` and `rescale` are asked to change."""

from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from .. import _checks
from .._paths import slash_path
from .._typing import KeyPath, Number, PyTree

# True, False or a traced bool for the path of a parameter, such as "dense/kernel".
Select: TypeAlias = "Callable[[str], bool | jax.Array]"


class Selection:
    """The parameters for which `select` is true, all of them if it is None. Counts the states that were changed."""

    def __init__(self, select: "Select | None") -> None:
        if select is not None and not callable(select):
            raise TypeError(
                "select must be a function of a path such as 'dense/kernel', or None for all parameters, got "
                f"{_checks.shown(select)}"
            )
        self._select = select
        self._answers: dict[str, bool | jax.Array] = {}
        self._states = 0

    def count(self) -> None:
        """Note that there was a state to change."""
        self._states += 1

    def of(self, path: KeyPath) -> bool | jax.Array:
        """Whether a parameter is selected, by its key path in a tree like the parameters."""
        if self._select is None:
            return True
        name = slash_path(path)
        if name not in self._answers:
            answer = self._select(name)
            is_known = isinstance(answer, bool | np.bool_)
            if not is_known and jnp.result_type(answer) != jnp.bool_:
                raise TypeError(f"select must return True or False, got {_checks.shown(answer)} for {name!r}")
            self._answers[name] = bool(answer) if is_known else answer
        return self._answers[name]

    def pick(self, path: KeyPath, old: PyTree, new: PyTree) -> PyTree:
        """`new` where the parameter at `path` is selected, else `old`."""
        chosen = self.of(path)
        return (new if chosen else old) if isinstance(chosen, bool) else jnp.where(chosen, new, old)

    def pick_leaves(self, old: PyTree, new: PyTree, depth: int) -> PyTree:
        """`pick` for each leaf of a tree in which the paths of parameters begin at `depth`."""
        return jax.tree_util.tree_map_with_path(lambda path, a, b: self.pick(path[depth:], a, b), old, new)

    def factor(self, path: KeyPath, number: Number) -> "Number | None":
        """The factor for the parameter at `path`; None if it is not selected."""
        chosen = self.of(path)
        if isinstance(chosen, bool):
            return number if chosen else None
        return jnp.where(chosen, jnp.asarray(number, jnp.float32), 1)

    def check_found(self, what: str) -> None:
        """Raise if there was nothing to change."""
        if not self._states:
            raise ValueError(f"opt_state must hold {what}, got none")
        if self._select is not None and all(answer is False for answer in self._answers.values()):
            raise ValueError(f"select must be true of a parameter, and is false of all: {listed(self._answers)}")


def listed(names: Iterable[str]) -> str:
    """Names in a message."""
    return ", ".join(map(repr, sorted(names))) or "none"
