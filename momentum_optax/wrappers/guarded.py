"""`guarded`: steps with non-finite gradients are skipped."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import checks
from .._tree import absent
from .leaves import SCOPES, Leaves, checked_transformation, counted, flags, where


class GuardedState(NamedTuple):
    """State of `guarded`.

    Attributes:
      inner: The state of the guarded transformation.
      skipped: int32: the number of steps skipped, a scalar; with `scope="leaf"` a tree with one entry for each leaf, of
        the leaf's rank and shape (1, ..., 1).
      finite: bool: whether the last gradients were finite, of the form of `skipped`.
    """

    inner: Any
    skipped: Any
    finite: Any


def guarded(tx: optax.GradientTransformation, scope: str = "tree") -> optax.GradientTransformationExtraArgs:
    r"""Skip steps whose gradients hold NaN or infinity: the update is zero and the state stays as it was, to the bit.

    $$ (u, s') = \begin{cases} \mathrm{tx}(g, s) & \text{if every element of } g \text{ is finite} \\
       (0, s) & \text{otherwise} \end{cases} $$

    Old and new state are selected elementwise, without the branches of a `lax.cond`, so that it works under `vmap` and
    can be fused with the step. XLA's CPU backend still makes temporary copies of what the selection reads and replaces.
    Unlike `optax.apply_if_finite` it never gives up.

    Under float16 loss scaling, guard what receives the unscaled gradients, and halve the scale where `finite` of the
    state is False: a division by a finite scale leaves infinity infinite. Only what is inside skips: around the whole
    optimizer also the weight decay and the learning-rate schedule stand still.

    Args:
      tx: Any transformation, such as `scale_by_momentum(rule)` or a finished optimizer.
      scope: `"tree"`: one bad element anywhere skips the step, with every counter in the state. `"leaf"`: only the
        leaves that hold one skip it, as if their gradient were None; what the leaves share, such as the step that
        schedules read, goes on.

    Returns:
      A transformation whose state is a `GuardedState`. A gradient of None counts as finite.

    Raises:
      TypeError: If `tx` is no transformation.
      ValueError: If there is no such scope; with `scope="leaf"` at `update` if the state of `tx` has an array with
        axes that belongs to no single leaf, as after `optax.flatten`.

    Reference:
      Micikevicius et al., "Mixed precision training", ICLR 2018, arXiv:1710.03740: skipped steps under loss scaling.
    """
    run = checked_transformation("tx", tx)
    checks.choice("scope", scope, SCOPES)

    def init(params: optax.Params) -> GuardedState:
        return GuardedState(tx.init(params), flags(scope, params, 0, jnp.int32), flags(scope, params, True, jnp.bool_))

    def update(
        updates: optax.Updates, state: GuardedState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, GuardedState]:
        leaves = Leaves(updates)
        each = [True if absent(g) else jnp.all(jnp.isfinite(g)) for g in leaves.values]
        whole = _all(each)
        if scope == "tree":
            each = [whole] * len(each)
        shared = whole if scope == "tree" or len(each) == 1 else True
        out, inner = run.update(updates, state.inner, params, **extra)
        kept = leaves.select(each, shared, inner, state.inner)
        pairs = zip(each, leaves.of(out), strict=True)
        out = leaves.joined([u if absent(u) else where(ok, u, jnp.zeros_like(u)) for ok, u in pairs], out)
        finite = whole if scope == "tree" else leaves.spread(each, state.finite)
        skipped = jax.tree.map(lambda n, ok: counted(n, ~ok), state.skipped, finite)
        return out, GuardedState(kept, skipped, finite)

    return optax.GradientTransformationExtraArgs(init, update)


def _all(conditions: list[Any]) -> jax.Array:
    return jnp.all(jnp.array(conditions, jnp.bool_))
