"""Arguments that finished optimizers share: a decay or a rule, a dtype or a storage, a weight decay and its mask."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from .. import _checks
from ..filters import Filter
from ..filters.coefficients import Scalar, is_zero
from ..storage import Storage, bfloat16, resolve
from ..storage._float32 import Float32


def rule_of(momentum: "Scalar | Filter", make: Callable[[Any], Filter]) -> Filter:
    """The rule, or what `make` makes of a decay."""
    if isinstance(momentum, Filter):
        return momentum
    _checks.within("momentum", momentum, "[0, 1)")
    return make(momentum)


def storage_of(storage: str | Storage, name: str, dtype: Any) -> Storage:
    """The storage that `storage` or Optax's argument `name`, a dtype, asks for."""
    asked = resolve(storage)
    if dtype is None:
        return asked
    if hasattr(dtype, "shape") and not isinstance(dtype, type | np.dtype):
        # A dtype that can be called, such as jnp.bfloat16, is a schedule to Optax.
        raise TypeError(f"{name} must be a dtype, got {dtype!r}{_checks.static(name, dtype)}")
    if not isinstance(asked, Float32):
        raise ValueError(f"{name} and storage say the same: give one of them, got {dtype!r} and {storage!r}")
    kinds: dict[Any, Storage] = {np.dtype(jnp.float32): asked, np.dtype(jnp.bfloat16): bfloat16("nearest")}
    try:
        kept = kinds.get(jnp.dtype(dtype))
    except TypeError:
        kept = None
    if kept is None:
        raise ValueError(
            f"{name} must be None, float32 (float64 where a parameter is) or bfloat16, got {dtype!r}; storage= has more"
        )
    return kept


def weight_decay_of(weight_decay: "Scalar | None", mask: Any) -> optax.GradientTransformation:
    """`add_decayed_weights` of checked arguments; nothing for None."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError("mask needs a weight_decay to act on, got weight_decay None")
        return optax.identity()
    _checks.within("weight_decay", weight_decay, "[0, inf)")
    if isinstance(mask, bool) or getattr(mask, "shape", None) == ():
        # What Optax makes of a function that it takes for a schedule.
        raise TypeError(
            f"mask must be a tree of bools or a function of the parameters, got {mask!r}; "
            "a function must be named in optax.inject_hyperparams(..., static_args='mask')"
        )
    return add_decayed_weights(weight_decay, mask)


def add_decayed_weights(weight_decay: Scalar, mask: Any = None) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`; nothing for the number 0, and an error that names it without parameters."""
    if is_zero(weight_decay):
        return optax.identity()
    tx = optax.add_decayed_weights(weight_decay, mask)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight_decay needs the parameters: update(gradients, state, params), got None")
        decayed: tuple[Any, Any] = tx.update(updates, state, params)
        return decayed

    return optax.GradientTransformation(tx.init, update)
