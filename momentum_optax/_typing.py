"""Types that the package shares: names for what JAX and Optax leave untyped."""

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar, cast

import jax
import numpy as np

# Any tree of JAX: containers around leaves, with None and `optax.MaskedNode` for what is left out.
PyTree: TypeAlias = Any
# The structure of a tree; JAX's stubs hide its methods.
TreeDef: TypeAlias = Any
# The keys that lead to a leaf, as `jax.tree_util.tree_leaves_with_path` gives them.
KeyPath: TypeAlias = tuple[Any, ...]
# What a tree holds where an array is, or will be.
Leaf: TypeAlias = jax.Array | np.ndarray | jax.ShapeDtypeStruct
# What a tree of gradients or updates holds for one parameter: an array, None or `optax.MaskedNode`.
Entry: TypeAlias = Any
# A condition: known when the program is traced, or computed by it.
Condition: TypeAlias = bool | jax.Array
# A real number: Python's or NumPy's, or a scalar array, traced or not.
Number: TypeAlias = float | np.ndarray | jax.Array
# The number of a step, of a leaf or of its gradients.
Count: TypeAlias = int | jax.Array
# A function of the step.
Schedule: TypeAlias = Callable[[Count], Number]
DType: TypeAlias = Any
# The axis of `shard_map` or `vmap` along which workers are, or several; None for a single worker.
AxisName: TypeAlias = "str | tuple[str, ...] | None"
# What `json` reads and writes.
JSON: TypeAlias = Any
Function = TypeVar("Function", bound=Callable[..., object])


def jitted(function: Function) -> Function:
    """`jax.jit` as a decorator that keeps the types of a function: it is traced once for all leaves of a shape."""
    return cast(Function, jax.jit(function))
