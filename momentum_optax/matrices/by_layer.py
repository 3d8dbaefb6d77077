"""Dimension numbers of a model: from the kinds of its layers in Flax, and by the names of parameters anywhere."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks, _tree
from .._paths import slash_path
from .._typing import KeyPath, PyTree
from .dimensions import STATIC, axes_of_leaves

# A module of Flax, and the names that lead to it or to a parameter.
Module: TypeAlias = Any
Names: TypeAlias = tuple[str, ...]
MuonDimensionNumbers = optax.contrib.MuonDimensionNumbers


def excluding(*names: str) -> Callable[[optax.Params], PyTree]:
    """Dimension numbers for all parameters with two axes but those with one of these names on their path.

        mo.muon(0.02, weight_dimension_numbers=mo.matrices.excluding("embed", "head"), others=optax.adamw(3e-4))

    Args:
      names: A parameter is left to `others` if a key on its path, in lower case, contains one of them.

    Returns:
      A function for `weight_dimension_numbers`.

    Raises:
      TypeError: If a name is not a string.
    """
    _check_names(names)

    def numbers(params: optax.Params) -> PyTree:
        if hasattr(params, "dtype") and jnp.issubdtype(params.dtype, jnp.integer):
            raise TypeError(f"weight_dimension_numbers must be given parameters, got a step; {STATIC}")
        axes = iter(axes_of_leaves(None, _tree.unboxed(params)))

        def entry(path: KeyPath, _: PyTree) -> PyTree:
            return None if next(axes) is None or _is_named(_names(path), names) else MuonDimensionNumbers()

        return jax.tree_util.tree_map_with_path(entry, _tree.unboxed(params))

    return numbers


def of_model(model: Module, *inputs: PyTree, exclude: Sequence[str] = (), **options: object) -> PyTree:
    """Dimension numbers of a model of Flax, from the kinds of its layers.

        numbers = mo.matrices.of_model(model, exclude=("head",))             # NNX
        numbers = mo.matrices.of_model(model, tokens, exclude=("head",))     # Linen, with inputs as for `init`

    | layer, also within others | inputs | outputs |
    |---|---|---|
    | `Dense`, `Linear` | the last axis but one | the last axis |
    | `DenseGeneral`, `LinearGeneral`, as in attention | the axes that it sums over | the others, all heads together |
    | `Conv`, `ConvTranspose` | the window and the channels of its input | the last axis |

    Axes in front of those, of scanned or vectorized layers, count matrices. Embeddings, norms, biases and parameters of
    other layers are left to `others`. Flax is imported only if the model is of it.

    Args:
      model: A module of NNX, or of Linen.
      inputs: For Linen what its `init` takes behind the key, arrays or shapes.
      exclude: Names of what is left to `others`, as for `excluding`.
      options: For Linen keyword arguments of `init`.

    Returns:
      For Linen a tree like the collection "params", for NNX one like `nnx.state(model, nnx.Param)`, with
      `optax.contrib.MuonDimensionNumbers` and None.

    Raises:
      TypeError: If `model` is not a module of Flax, or a name is not a string.
    """
    _check_names(exclude)
    if _is_of(model, "flax.linen", "Module"):
        params, modules = _linen(model, inputs, options)
    elif _is_of(model, "flax.nnx", "Module"):
        params, modules = _nnx(model)
    else:
        raise TypeError(f"model must be a module of Flax, NNX or Linen, got {_checks.shown(model)}")

    def entry(path: KeyPath, x: PyTree) -> PyTree:
        names = _names(path)
        module = modules.get(names[:-1])
        if module is None or names[-1] != "kernel" or _is_named(names, exclude):
            return None
        return _numbers(module, len(x.shape))

    return jax.tree_util.tree_map_with_path(entry, params)


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be strings such as 'embed', got {_checks.shown(names)}")


def _is_of(model: Module, module: str, name: str) -> bool:
    """Whether `model` is of a class of Flax, which has been imported if it is."""
    return isinstance(model, getattr(sys.modules.get(module), name, ()))


def _names(path: KeyPath) -> Names:
    """The keys of a path as texts."""
    return tuple(slash_path((key,)) for key in path)


def _is_named(path: Names, names: Sequence[str]) -> bool:
    return any(name.lower() in key.lower() for key in path for name in names)


def _linen(
    model: Module, inputs: Sequence[PyTree], options: Mapping[str, object]
) -> tuple[PyTree, dict[Names, Module]]:
    """The shapes of the parameters, and the modules by their path."""
    linen = sys.modules["flax.linen"]
    modules: dict[Names, Module] = {}

    def note(call: Callable[..., PyTree], args: Any, kwargs: Any, context: Any) -> PyTree:
        modules[tuple(map(str, context.module.path))] = context.module
        return call(*args, **kwargs)

    with linen.intercept_methods(note):
        variables = jax.eval_shape(lambda *x: model.init(jax.random.key(0), *x, **options), *inputs)
    # A model without parameters has no such collection.
    return _tree.unboxed(variables.get("params", {})), modules


def _nnx(model: Module) -> tuple[PyTree, dict[Names, Module]]:
    nnx = sys.modules["flax.nnx"]
    params = _tree.unboxed(nnx.state(model, nnx.Param))
    graph = ((path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module))
    return params, {tuple(map(str, path)): module for path, module in graph}


_LAYERS = ("Dense", "Linear", "DenseGeneral", "LinearGeneral", "Conv", "ConvTranspose")


def _kind(module: Module) -> str | None:
    """Which of `_LAYERS` a module is, or derives from, as what Linen's `vmap` and `remat` make of a class does."""
    classes = (c for c in type(module).__mro__ if c.__module__.partition(".")[0] == "flax")
    return next((c.__name__ for c in classes if c.__name__ in _LAYERS), None)


def _numbers(module: Module, rank: int) -> PyTree:
    """The dimension numbers of the kernel of a layer, counted from the last axis; None for other layers."""
    kind = _kind(module)
    if kind in ("Dense", "Linear"):
        inputs, outputs = 1, 1
    elif kind in ("DenseGeneral", "LinearGeneral"):
        inputs = _count(module.axis)
        outputs = _count(module.features if kind == "DenseGeneral" else module.out_features)
    elif kind is not None:
        inputs, outputs = _count(module.kernel_size) + 1, 1
    else:
        return None
    ends = inputs + outputs
    return MuonDimensionNumbers(tuple(range(-ends, -outputs)), tuple(range(-outputs, 0))) if rank >= ends else None


def _count(axes: int | Sequence[int]) -> int:
    return len(axes) if isinstance(axes, Sequence) else 1
