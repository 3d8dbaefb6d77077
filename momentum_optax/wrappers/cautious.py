"""Cautious updates and cautious weight decay: only where update and gradient, or update and weight, agree."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import absent, as_array, empty, map_together, paired, path_name, reboxed, unboxed
from .._typing import Entry, KeyPath, Leaf, PyTree
from ..filters.coefficients import Scalar, value_at
from ..state.mismatch import ANYTHING, check_state
from ..storage.protocol import arithmetic_dtype
from .leaves import checked_transformation


def cautious(tx: optax.GradientTransformation, scaling: str) -> optax.GradientTransformationExtraArgs:
    r"""Keep only the elements of an update that agree with the gradient, rescaled to make up for the others.

    With $m = 1$ where update and gradient agree and 0 elsewhere, per leaf of n elements, $u \leftarrow \alpha m u$:

    * `"count"`: agree where $u g > 0$; $\alpha = n / (\sum m + 1)$. The authors' Lion (`c_lion`), pytorch_optimizer.
    * `"mean"`: agree where $u g > 0$; $\alpha = 1 / \max(\sum m / n, 10^{-3})$. The authors' AdamW and Muon
      (`c_adamw`, `c_muon`), timm.
    * `"sign_bit"`: agree where the sign bits are equal, so that a zero counts as positive;
      $\alpha = n / \max(\sum m, 1)$. HeavyBall.

    The sign of $u g$ is taken from the signs of both, so that a tiny product does not vanish. The state of `tx` is not
    masked. `tx` must give a direction that is not negated yet, like `scale_by_momentum`; the learning rate follows:

        lion = optax.chain(mo.scale_by_momentum(mo.lion_mix()), optax.scale_by_sign())
        optax.chain(mo.cautious(lion, "count"), optax.scale_by_learning_rate(1e-4))

    The authors' Muon masks the input of the orthogonalization:
    `chain(cautious(scale_by_momentum(rule), "mean"), orthogonalize())`.

    Args:
      tx: Any transformation.
      scaling: `"count"`, `"mean"` or `"sign_bit"`. Published results differ between them, so there is no default.

    Returns:
      A transformation with the state of `tx`. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If `tx` is not a transformation; at `update` if a leaf is complex, whose elements have no sign.
      ValueError: If there is no such scaling.

    Reference:
      Liang et al., "Cautious optimizers: improving training with one line of code", 2024, arXiv:2411.16085, and the
      code of C-Optim, timm and HeavyBall.
    """
    run = checked_transformation("tx", tx)
    _checks.choice("scaling", scaling, tuple(_CAUTIOUS))
    mask, least = _CAUTIOUS[scaling]

    def masked(path: KeyPath, u: Entry, g: Entry) -> Entry:
        if absent(u) or absent(g) or jnp.size(u) == 0:
            return u
        u, g = as_array(u), as_array(g)
        _check_real(f"the update of {path_name(path)}", u)
        agrees, dtype = mask(u, g), arithmetic_dtype(u.dtype)
        share = least(jnp.sum(agrees, dtype=jnp.int32).astype(dtype), float(u.size))
        return jnp.where(agrees, u.astype(dtype) * (u.size / share).astype(dtype), 0).astype(u.dtype)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, optax.OptState]:
        out, state = run.update(updates, state, params, **extra)
        out_masked = jax.tree_util.tree_map_with_path(masked, unboxed(out), unboxed(updates), is_leaf=absent)
        return reboxed(out_masked, out), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _check_real(what: str, leaf: jax.Array) -> None:
    """Raise for a leaf whose elements have no sign."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"{what} must be real, got {leaf.dtype}; leave it out with optax.masked")


def _same_sign(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sign(a) * jnp.sign(b).astype(a.dtype) > 0


def _same_sign_bit(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.signbit(a) == jnp.signbit(b)


_Mask: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
# The mask, and what n is divided by, from the sum of the mask and n.
_CAUTIOUS: dict[str, tuple[_Mask, Callable[[jax.Array, float], jax.Array]]] = {
    "count": (_same_sign, lambda total, n: total + 1),
    "mean": (_same_sign, lambda total, n: jnp.maximum(total, 1e-3 * n)),
    "sign_bit": (_same_sign_bit, lambda total, n: jnp.maximum(total, 1)),
}


@serializable
class CautiousDecayState(NamedTuple):
    """State of `add_cautious_weight_decay`.

    Attributes:
      step: int32 scalar, the number of updates made; None unless the weight decay is scheduled.
    """

    step: jax.Array | None


def add_cautious_weight_decay(weight_decay: Scalar, agreement: str) -> optax.GradientTransformationExtraArgs:
    r"""Decay only the weights that the update shrinks anyway: $u \leftarrow u + \lambda\, m\, \theta$.

    * `"product"`: $m = 1$ where $u \theta \ge 0$, so that an update of zero decays. Chen et al., dion.
    * `"sign_bit"`: $m = 1$ where the sign bits of u and theta are equal, a zero counting as positive. HeavyBall.

    In place of `optax.add_decayed_weights`: after the direction and before the learning rate, u not negated yet. For
    some parameters only, put `optax.masked` around it.

    Args:
      weight_decay: lambda in [0, inf): a number, a scalar array or a schedule.
      agreement: `"product"` or `"sign_bit"`; they differ where an update is zero.

    Returns:
      A transformation whose `update` needs `params`. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If `weight_decay` is not a coefficient; at `update` if an update or a parameter is
        complex.
      ValueError: If a number is out of range or there is no such agreement; at `update` without `params`, or if the
        updates do not fit them, with the path of a leaf.

    Reference:
      Chen et al., "Cautious weight decay", 2025, arXiv:2510.12402, and the code of dion and HeavyBall.
    """
    _checks.within("weight_decay", weight_decay, "[0, inf)")
    _checks.choice("agreement", agreement, ("product", "sign_bit"))
    agrees = _same_sign_bit if agreement == "sign_bit" else lambda u, p: jnp.sign(u) * jnp.sign(p).astype(u.dtype) >= 0

    def init(params: optax.Params) -> CautiousDecayState:
        del params
        return CautiousDecayState(jnp.zeros([], jnp.int32) if callable(weight_decay) else None)

    def update(
        updates: optax.Updates, state: CautiousDecayState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, CautiousDecayState]:
        del extra
        if params is None:
            raise ValueError("params must be given to update for a weight decay, got None")
        check_state(state, CautiousDecayState(ANYTHING if callable(weight_decay) else None))
        rate = value_at(weight_decay, state.step)

        def decayed(path: KeyPath, u: Leaf, p: Leaf) -> jax.Array:
            u, p = jnp.asarray(u), jnp.asarray(p)
            _check_real(f"the update of {path_name(path)}", u)
            _check_real(path_name(path), p)
            dtype = arithmetic_dtype(u.dtype, p.dtype)
            decay = jnp.asarray(rate, dtype) * p.astype(dtype)
            return (u.astype(dtype) + jnp.where(agrees(u, p), decay, 0)).astype(u.dtype)

        rows = paired(_without_masks(updates), _without_masks(params))
        out = map_together(lambda _: [decayed(path, u, p) for path, u, p in rows if u is not None], updates)
        return out, CautiousDecayState(None if state.step is None else optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(init, update)


def _without_masks(tree: PyTree) -> PyTree:
    """The tree with None for what Optax masks."""
    return jax.tree.map(lambda x: None if empty(x) else x, tree, is_leaf=empty)
