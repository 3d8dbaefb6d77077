"""`apply_updates`: the last line of a training step."""

import jax
import jax.numpy as jnp
import optax

from . import _checks
from ._tree import empty, map_numbered, reboxed, unboxed
from ._typing import Count
from .storage.noise import stamp_of_step
from .storage.protocol import check_whole
from .storage.rounding import is_narrow, rounded_at

_ROUNDINGS = ("nearest", "stochastic")
# Distinguishes the noise of weights from that of their velocities, which are rounded in the same step.
_WEIGHTS = 0x57454947


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    *,
    rounding: str = "nearest",
    step: Count | None = None,
    seed: int = 0,
) -> optax.Params:
    r"""`optax.apply_updates` that skips None and can round 16-bit weights stochastically: $\theta' = \theta + u$.

        params = mo.apply_updates(params, updates, rounding="stochastic", step=step)

    Weights in bfloat16 stall when rounded to nearest: 1 plus an update of 0.001 is 1 again, however often it is added.
    Rounded stochastically they move by the sum of their updates in the mean.

    The noise is a function of (seed, step, leaf, element): a resumed run is bit-equal to an uninterrupted one, on any
    mesh under `jit`. It is independent of the noise in the velocities' storages, also at the same seed. Members under
    `jax.vmap` round alike unless each has steps of its own, such as `step + member * steps`. Weights on two meshes are
    equal where the updates are: XLA may keep 16-bit intermediate values of one program in more bits than those of
    another, unless `XLA_FLAGS` say `--xla_allow_excess_precision=false`.

    Args:
      params: A tree of arrays, in boxes of Flax or not.
      updates: A tree of the same structure, boxes apart, with None for parameters that received no gradient, or what
        Optax masks with.
      rounding: "nearest", or "stochastic" for leaves in bfloat16 and float16; wider leaves are never affected.
      step: Number of the step, an integer or an integer scalar array; needed for "stochastic" and refused otherwise.
      seed: Of the noise, a whole number in [0, 2^32); for "stochastic" only.

    Returns:
      The new parameters, of the dtypes and in the boxes of `params`.

    Raises:
      ValueError: If `rounding` is neither of these; if `step` is missing for "stochastic", or `step` or `seed` is given
        without it; if `seed` is out of range.
      TypeError: If `seed` is not a whole number, or `step` is not an integer.

    Reference:
      Gupta et al., "Deep learning with limited numerical precision", ICML 2015, arXiv:1502.02551.
    """
    _checks.choice("rounding", rounding, _ROUNDINGS)
    _checks.seed(seed)
    if rounding == "nearest":
        if step is not None or seed:
            raise ValueError(f"step and seed need rounding='stochastic', got step {step!r} and seed {seed!r}")
        return reboxed(jax.tree.map(_nearest, unboxed(updates), unboxed(params), is_leaf=empty), params)
    if step is None:
        raise ValueError("rounding='stochastic' needs step, the number of this update: its noise depends on it")
    is_scalar = _checks.is_number(step) or _checks.is_scalar_array(step)
    if not (is_scalar and jnp.issubdtype(jnp.result_type(step), jnp.integer)):
        raise TypeError(f"step must be an integer or an integer scalar array, got {_checks.shown(step)}")
    stamp = stamp_of_step(step)
    new = map_numbered(
        lambda place, u, p: _stochastic(u, p, stamp, (_WEIGHTS, seed, place[1])),
        unboxed(updates),
        unboxed(params),
        is_leaf=empty,
    )
    return reboxed(new, params)


def _nearest(update: jax.Array | None, param: jax.Array) -> jax.Array:
    if empty(update) or empty(param):
        return param
    new: jax.Array = optax.apply_updates(param, update)
    return new


def _stochastic(update: jax.Array | None, param: jax.Array, stamp: jax.Array, numbers: tuple[int, ...]) -> jax.Array:
    # Either may be left out, or a number of Python, as in Optax.
    if empty(update) or empty(param) or not is_narrow(jnp.result_type(param)):
        return _nearest(update, param)
    wide = param.astype(jnp.float32) + jnp.asarray(update).astype(jnp.float32)
    check_whole("rounding='stochastic'", wide, "round outside of it")
    new: jax.Array = rounded_at(wide, stamp, numbers, param.dtype)
    return new
