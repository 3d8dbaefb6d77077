"""What looks at the gradient or the loss: guarded steps, restarts, cautious masks, and directions after the rule.

None of it is a linear filter, so none of it is an option of `scale_by_momentum`: each is a wrapper around a
transformation, or a transformation of its own to put into a chain.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import checks

SCOPES = ("tree", "leaf")


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

    Old and new state are selected elementwise, in the pass that writes the state anyway; there is no `lax.cond`, whose
    branches would copy it. Unlike `optax.apply_if_finite` it never gives up.

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
    run = _checked_transformation("tx", tx)
    checks.choice("scope", scope, SCOPES)

    def init(params: optax.Params) -> GuardedState:
        return GuardedState(
            tx.init(params), _flags(scope, params, 0, jnp.int32), _flags(scope, params, True, jnp.bool_)
        )

    def update(
        updates: optax.Updates, state: GuardedState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, GuardedState]:
        leaves = _Leaves(updates)
        each = [None if _absent(g) else jnp.all(jnp.isfinite(g)) for g in leaves.values]
        whole = _all(each)
        if scope == "tree":
            each = [None if ok is None else whole for ok in each]
        shared = whole if scope == "tree" or len(each) == 1 else None
        out, inner = run.update(updates, state.inner, params, **extra)
        kept = leaves.select(each, shared, inner, state.inner)
        out = leaves.map(lambda u, ok: u if ok is None else jnp.where(ok, u, jnp.zeros_like(u)), out, each)
        finite = whole if scope == "tree" else leaves.map(_flag_like, state.finite, each)
        skipped = jax.tree.map(lambda n, ok: jnp.where(ok, n, optax.safe_increment(n)), state.skipped, finite)
        return out, GuardedState(kept, skipped, finite)

    return optax.GradientTransformationExtraArgs(init, update)


class _Leaves:
    """The leaves of a tree of gradients, None and masked ones among them, and what in a state belongs to which."""

    def __init__(self, updates: Any) -> None:
        treedef: Any
        self.values, treedef = jax.tree.flatten(updates, is_leaf=_absent)
        self.treedef = treedef

    def map(self, function: Callable[..., Any], tree: Any, each: list[Any]) -> Any:
        """`function(leaf, entry)` for each leaf of `tree` and entry of `each`; what is absent stays."""
        pairs = zip(self.treedef.flatten_up_to(tree), each, strict=True)
        return self.treedef.unflatten([x if _absent(x) else function(x, entry) for x, entry in pairs])

    def select(self, each: list[Any], shared: Any, yes: Any, no: Any) -> Any:
        """The state `yes` where the condition of a leaf holds, else `no`, with all that belongs to the leaf.

        A subtree of the parameters' structure belongs to the leaves, everything else to `shared`. A condition of None
        takes `yes`.
        """

        def pick(path: Any, a: Any, b: Any) -> Any:
            if self._is_ours(a):
                pairs = zip(self.treedef.flatten_up_to(a), each, self.treedef.flatten_up_to(b), strict=True)
                return self.treedef.unflatten([x if _absent(x) else _where(ok, x, y) for x, ok, y in pairs])
            if shared is None and jnp.ndim(a) > 0:
                raise ValueError(
                    f"scope must be 'tree' for a state with arrays that belong to no single leaf, got 'leaf' and "
                    f"state{jax.tree_util.keystr(path)} of shape {jnp.shape(a)}"
                )
            return _where(shared, a, b)

        return jax.tree_util.tree_map_with_path(pick, yes, no, is_leaf=self._is_ours)

    def _is_ours(self, node: Any) -> bool:
        structure: Any = jax.tree.structure(node, is_leaf=_absent)
        return bool(structure == self.treedef)


def _absent(x: Any) -> bool:
    """Whether a leaf is left out: None, or masked by Optax."""
    return x is None or isinstance(x, optax.MaskedNode)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    """`yes` or `no`, of the dtype of `no`; `yes` without a condition."""
    if condition is None:
        return yes
    return jnp.where(condition, yes if yes.dtype == no.dtype else yes.astype(no.dtype), no)


def _all(conditions: list[Any]) -> jax.Array:
    """Whether all conditions hold; those of None do."""
    known = [c for c in conditions if c is not None]
    return jnp.all(jnp.stack(known)) if known else jnp.array(True)


def _flags(scope: str, params: Any, value: Any, dtype: Any) -> Any:
    """A scalar, or an entry of the leaf's rank for each leaf."""
    if scope == "tree":
        return jnp.full([], value, dtype)
    return jax.tree.map(lambda x: jnp.full((1,) * jnp.ndim(x), value, dtype), params)


def _flag_like(old: Any, new: Any) -> Any:
    """`new` of the shape of `old`; True where there is none."""
    return jnp.ones_like(old) if new is None else jnp.broadcast_to(new, old.shape)


def _checked_transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{name} must be a transformation with init and update, got {tx!r}")
    return optax.with_extra_args_support(tx)
