"""Arguments that finished optimizers share: learning rate, decay or rule, storage, weight decay and its mask."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks, _tree
from .._tree_arguments import broadcast
from .._typing import DType, PyTree
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero
from ..storage import Storage, bfloat16, resolve
from ..storage._by_leaf import AnyStorage, ByLeaf
from ..storage._float32 import Float32
from ..transform import RAW
from .gradient_dtype import in_gradient_dtype

# A tree of bools, or a function from the parameters to one.
Mask: TypeAlias = PyTree | Callable[[optax.Params], PyTree]


def descent(
    learning_rate: optax.ScalarOrSchedule, *transformations: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The optimizer that chains these transformations and steps down by the learning rate, in the gradients' dtypes."""
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(optax.chain(*transformations, optax.scale_by_learning_rate(learning_rate)))


def rule_of(momentum: "Scalar | Filter", make: Callable[[Scalar], Filter]) -> Filter:
    """`momentum` itself if it is a rule, else `make(momentum)` of a decay."""
    if isinstance(momentum, Filter):
        return momentum
    _checks.within("momentum", momentum, "[0, 1)")
    return make(momentum)


def storage_of(storage: AnyStorage, name: str, dtype: DType | None) -> Storage | ByLeaf:
    """The storage for the argument `storage`, or for Optax's argument `name`, a dtype."""
    resolved = resolve(storage)
    if dtype is None:
        return resolved
    if hasattr(dtype, "shape") and not isinstance(dtype, type | np.dtype):
        # A dtype that can be called, such as jnp.bfloat16, is a schedule to Optax.
        raise TypeError(f"{name} must be a dtype, got {_checks.shown(dtype)}{_checks.static(name, dtype)}")
    if not isinstance(resolved, Float32):
        both = f"{_checks.shown(dtype)} and {_checks.shown(storage)}"
        raise ValueError(f"{name} and storage say the same: give one of them, got {both}")
    return _storage_of_dtype(name, dtype, resolved)


def _storage_of_dtype(name: str, dtype: DType, float32: Storage) -> Storage:
    """The storage that keeps a velocity in `dtype`, rounded to nearest as Optax does."""
    storages: dict[DType, Storage] = {np.dtype(jnp.float32): float32, np.dtype(jnp.bfloat16): bfloat16("nearest")}
    try:
        found = storages.get(jnp.dtype(dtype))
    except TypeError:
        found = None
    if found is None:
        raise ValueError(
            f"{name} must be None, float32 (float64 where a parameter is) or bfloat16, got {_checks.shown(dtype)}; "
            "storage= has more"
        )
    return found


def weight_decay_of(weight_decay: "Scalar | None", mask: Mask | None) -> optax.GradientTransformation:
    """`add_decayed_weights` of checked arguments; the identity for None."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError("mask needs a weight_decay to act on, got weight_decay None")
        return optax.identity()
    _checks.within("weight_decay", weight_decay, "[0, inf)")
    if isinstance(mask, bool) or getattr(mask, "shape", None) == ():
        # The result of a function that `optax.inject_hyperparams` takes for a schedule.
        raise TypeError(
            f"mask must be a tree of bools or a function of the parameters, got {_checks.shown(mask)}; "
            "a function must be named in optax.inject_hyperparams(..., static_args='mask')"
        )
    return add_decayed_weights(weight_decay, mask)


def add_decayed_weights(weight_decay: Scalar, mask: Mask | None = None) -> optax.GradientTransformation:
    """`optax.add_decayed_weights` for trees in boxes or not; the identity for the number 0.

    A mask that is a function is asked of the parameters: where a gradient is None its result would be, too.

    Raises:
      TypeError: At `init` and `update` if the mask holds anything but bools, with the path of the parameter.
      ValueError: At `init` and `update` if the mask does not fit the parameters; at `update` if there are none, or the
        gradients do not fit them; with the path of one that does not.
    """
    if is_zero(weight_decay):
        return optax.identity()

    def decay_of(params: optax.Params) -> optax.GradientTransformation:
        return optax.add_decayed_weights(weight_decay, None if mask is None else _resolved(mask, params))

    def init(params: optax.Params) -> optax.OptState:
        return decay_of(params).init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise ValueError("weight_decay needs the parameters: update(gradients, state, params), got None")
        _tree.paired(updates, params)
        decayed, state = decay_of(params).update(_tree.unboxed(updates), state, _tree.unboxed(params))
        return _tree.reboxed(decayed, updates), state

    return optax.GradientTransformation(init, update)


def _resolved(mask: Mask, params: optax.Params) -> PyTree:
    """A mask as a tree of bools like the bare parameters."""
    bare = _tree.unboxed(params)
    pairs = jax.tree_util.tree_leaves_with_path(bare)
    if not pairs:  # nor need it be like them: Optax finds copies of the parameters in a state by a stand-in
        return True
    # A tree of bools that can be called, as a module of Equinox, is no function.
    parts = jax.tree.leaves(mask)
    given = mask(params) if callable(mask) and parts and all(map(callable, parts)) else mask
    entries = broadcast("mask", given, bare, _tree.absent)
    for (path, _), entry in zip(pairs, entries, strict=True):
        if not _is_bool(entry):
            raise TypeError(
                f"mask must hold True or False for each parameter, got {_checks.shown(entry)} for "
                f"{_tree.path_name(path)}"
            )
    return _tree.map_together(lambda _: [bool(entry) for entry in entries], bare)


def _is_bool(x: object) -> bool:
    """Whether `x` is true or false and known when a program is traced."""
    if isinstance(x, jax.core.Tracer):
        return False
    return isinstance(x, bool | np.bool_) or (isinstance(x, np.ndarray | jax.Array) and x.dtype == bool and x.ndim == 0)


def with_raw_gradient(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A chain whose momentum is told of the gradients before what the chain adds to them.

    A storage in bytes looks at a part of them before each step. XLA's TPU backend computes all of a sum first, of which
    a part is read.
    """
    run = optax.with_extra_args_support(tx)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        out: tuple[optax.Updates, optax.OptState] = run.update(updates, state, params, **{RAW: updates, **extra})
        return out

    return optax.GradientTransformationExtraArgs(tx.init, update)
