"""What looks at the gradient or the loss: guarded steps, restarts, cautious masks, and directions after the rule.

None of it is a linear filter, so none of it is an option of `scale_by_momentum`: each is a wrapper around a
transformation, or a transformation of its own to put into a chain.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import checks
from .coefficients import Scalar, is_zero, value_at
from .filters import Filter
from .schedules import restarted
from .storage import Storage
from .storage.protocol import arithmetic_dtype
from .transform import MomentumState, scale_by_momentum, velocity

_SCOPES = ("tree", "leaf")


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
    run = _checked_transformation("tx", tx)
    checks.choice("scope", scope, _SCOPES)

    def init(params: optax.Params) -> GuardedState:
        return GuardedState(
            tx.init(params), _flags(scope, params, 0, jnp.int32), _flags(scope, params, True, jnp.bool_)
        )

    def update(
        updates: optax.Updates, state: GuardedState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, GuardedState]:
        leaves = _Leaves(updates)
        each = [True if _absent(g) else jnp.all(jnp.isfinite(g)) for g in leaves.values]
        whole = _all(each)
        if scope == "tree":
            each = [whole] * len(each)
        shared = whole if scope == "tree" or len(each) == 1 else True
        out, inner = run.update(updates, state.inner, params, **extra)
        kept = leaves.select(each, shared, inner, state.inner)
        pairs = zip(each, leaves.of(out), strict=True)
        out = leaves.treedef.unflatten([u if _absent(u) else _where(ok, u, jnp.zeros_like(u)) for ok, u in pairs])
        finite = whole if scope == "tree" else leaves.spread(each, state.finite)
        skipped = jax.tree.map(lambda n, ok: _counted(n, ~ok), state.skipped, finite)
        return out, GuardedState(kept, skipped, finite)

    return optax.GradientTransformationExtraArgs(init, update)


class RestartState(NamedTuple):
    """State of `adaptive_restart` and `scheduled_restart`.

    Attributes:
      inner: The state of the transformation that restarts.
      restarts: int32: the number of restarts so far, a scalar; with `scope="leaf"` a tree with one entry for each leaf,
        of the leaf's rank and shape (1, ..., 1).
      last: For the function test, the loss at the step before; for scheduled restarts, int32, the number of updates
        made; None for the gradient test.
    """

    inner: Any
    restarts: Any
    last: Any


def adaptive_restart(
    rule: Filter, test: str = "gradient", scope: str = "tree", *, storage: str | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""`scale_by_momentum(rule)` that drops its velocity where the momentum works against descent.

    With x the point that `eval_params` gives, $x_{t+1} - x_t = -\eta d_t$ with $d = u - \ell' v' + \ell v$: for the
    heavy ball d is v', for Nesterov's rule v + g.

    * `"gradient"`: where $\langle g, d \rangle < 0$, the step was uphill. Then the stored point becomes x and the
      state that of `init`: $u \leftarrow u - \ell' v'$, $v' \leftarrow 0$.
    * `"function"`: where the loss given to `update` as `value=` is above the one before, the state becomes that of
      `init` before the gradient is used. The paper's loss is that at x, `loss(eval_params(...))`; at the stored
      parameters it is the usual approximation.

    The state of `init` also means step 0, so that `nesterov(schedules.fista())` begins anew. The test assumes that the
    learning rate follows in the chain.

    Args:
      rule: A `Filter`.
      test: `"gradient"` or `"function"`.
      scope: `"tree"`: one test for all parameters. `"leaf"`, for the gradient test: each leaf has its own and restarts
        alone; the step that schedules read is shared and goes on.
      storage: How velocities are kept, see `scale_by_momentum`. One in few bits learns its scale anew after a restart,
        as at the start.

    Returns:
      A transformation whose state is a `RestartState`. A leaf whose gradient is None takes no part and keeps its
      velocity. A test of NaN is not met.

    Raises:
      TypeError: If `rule` is no `Filter`; at `update` if the function test gets no `value`.
      ValueError: If there is no such test, scope or storage, or the function test is asked of a leaf; at `update` if
        `value` has axes.

    Reference:
      O'Donoghue and Candes, "Adaptive restart for accelerated gradient schemes", Found. Comput. Math. 2015,
      arXiv:1204.3982.
    """
    tx = scale_by_momentum(rule, storage=storage)
    checks.choice("test", test, ("gradient", "function"))
    checks.choice("scope", scope, _SCOPES if test == "gradient" else ("tree",))
    return _gradient_restart(tx, rule.pruned(), scope) if test == "gradient" else _function_restart(tx)


def scheduled_restart(
    tx: optax.GradientTransformation, at: int | Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """Begin `tx` anew at given steps: from there it goes on as if it had just been made.

    Everything in the state of `tx` begins anew, the counters of its schedules too. To restart a schedule of the
    momentum alone, see `schedules.restarted`.

    Args:
      tx: Any transformation.
      at: A period of at least 1, or the increasing steps, of at least 1, before which it restarts.

    Returns:
      A transformation whose state is a `RestartState`. A leaf whose gradient is None at a restart keeps its velocity.

    Raises:
      TypeError: If `tx` is no transformation or `at` holds something else than whole numbers.
      ValueError: If `at` is out of range, empty or not increasing.

    Reference:
      O'Donoghue and Candes, Found. Comput. Math. 2015, arXiv:1204.3982, which compares with fixed restarts.
    """
    run = _checked_transformation("tx", tx)
    age = restarted(lambda step: step, at)

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: RestartState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, RestartState]:
        begin = jnp.logical_and(age(state.last) == 0, state.last > 0)
        leaves = _Leaves(updates)
        fresh = tx.init(leaves.standing() if params is None else params)
        inner = leaves.select([False if _absent(g) else begin for g in leaves.values], begin, fresh, state.inner)
        out, inner = run.update(updates, inner, params, **extra)
        return out, RestartState(inner, _counted(state.restarts, begin), optax.safe_increment(state.last))

    return optax.GradientTransformationExtraArgs(init, update)


def _function_restart(tx: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`adaptive_restart` by the loss, before the gradient is used."""

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), jnp.zeros([], jnp.int32), jnp.array(jnp.inf, jnp.result_type(float)))

    def update(
        updates: optax.Updates, state: RestartState, params: Any = None, *, value: Any = None, **extra: Any
    ) -> tuple[optax.Updates, RestartState]:
        if value is None:
            raise TypeError("value must be the loss, a scalar given to update for the function test, got None")
        if jnp.shape(value) != ():
            raise ValueError(f"value must be a scalar, got shape {jnp.shape(value)}")
        loss = jnp.asarray(value, state.last.dtype)
        uphill = loss > state.last
        leaves = _Leaves(updates)
        each = [False if _absent(g) else uphill for g in leaves.values]
        inner = leaves.select(each, uphill, tx.init(leaves.standing()), state.inner)
        out, inner = tx.update(updates, inner, params, value=value, **extra)
        return out, RestartState(inner, _counted(state.restarts, uphill), loss)

    return optax.GradientTransformationExtraArgs(init, update)


def _gradient_restart(
    tx: optax.GradientTransformationExtraArgs, rule: Filter, scope: str
) -> optax.GradientTransformationExtraArgs:
    """`adaptive_restart` by the gradient, after it was used."""

    def init(params: optax.Params) -> RestartState:
        return RestartState(tx.init(params), _flags(scope, params, 0, jnp.int32), None)

    def update(
        updates: optax.Updates, state: RestartState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, RestartState]:
        leaves = _Leaves(updates)
        out, inner = tx.update(updates, state.inner, params, **extra)
        step = 0 if inner.step is None else state.inner.step
        before = _displacements(rule.at(jnp.maximum(step - 1, 0)), leaves, state.inner)
        after = _displacements(rule.at(step), leaves, inner)
        landed = [None if _absent(u) else u - x for u, x in zip(leaves.of(out), after, strict=True)]
        slopes = [
            None if d is None else _inner_product(g, d + x)
            for g, d, x in zip(leaves.values, landed, before, strict=True)
        ]
        if scope == "tree":
            total = sum((x for x in slopes if x is not None), jnp.float32(0))
            slopes = [None if x is None else total for x in slopes]
        uphill = [False if x is None else x < 0 for x in slopes]
        shared = _any(uphill) if scope == "tree" or len(uphill) == 1 else False
        inner = leaves.select(uphill, shared, tx.init(leaves.standing()), inner)
        pairs = zip(leaves.of(out), landed, uphill, strict=True)
        out = leaves.treedef.unflatten([u if d is None else _where(up, d, u) for u, d, up in pairs])
        fired = shared if scope == "tree" else leaves.spread(uphill, state.restarts)
        return out, RestartState(inner, jax.tree.map(_counted, state.restarts, fired), None)

    return optax.GradientTransformationExtraArgs(init, update)


def _displacements(rule: Filter, leaves: "_Leaves", state: MomentumState) -> list[Any]:
    """The vector l . v from the stored point to x, over the learning rate, for each leaf."""
    if all(is_zero(weight) for weight in rule.lookahead):
        return [0.0] * len(leaves.values)
    rows = zip(*(leaves.of(tree) for tree in velocity(state)), strict=True)
    return [None if _absent(row[0]) else _weighted(rule.lookahead, row) for row in rows]


def _weighted(weights: tuple[Any, ...], arrays: tuple[Any, ...]) -> Any:
    terms = [jnp.asarray(w, jnp.finfo(x.dtype).dtype) * x for w, x in zip(weights, arrays, strict=True)]
    return sum(terms[1:], terms[0])


def _inner_product(a: Any, b: Any) -> jax.Array:
    """The real inner product of two leaves, in float32 or wider."""
    dtype = arithmetic_dtype(a.dtype, b.dtype)
    return jnp.sum(jnp.real(jnp.conj(a.astype(dtype)) * b.astype(dtype)))


def _counted(count: Any, happened: Any) -> Any:
    return jnp.where(happened, optax.safe_increment(count), count)


def cautious(tx: optax.GradientTransformation, scaling: str) -> optax.GradientTransformationExtraArgs:
    r"""Let through only the elements of an update that agree with the gradient, and enlarge the rest to make up.

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

    The authors' Muon masks what is orthogonalised: `chain(cautious(scale_by_momentum(rule), "mean"), orthogonalize())`.

    Args:
      tx: Any transformation.
      scaling: `"count"`, `"mean"` or `"sign_bit"`. They differ in published results, so that there is no default.

    Returns:
      A transformation with the state of `tx`. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If `tx` is no transformation; at `update` if a leaf is complex, whose elements have no sign.
      ValueError: If there is no such scaling.

    Reference:
      Liang et al., "Cautious optimizers: improving training with one line of code", 2024, arXiv:2411.16085, and the
      code of C-Optim, timm and HeavyBall.
    """
    run = _checked_transformation("tx", tx)
    checks.choice("scaling", scaling, tuple(_CAUTIOUS))
    mask, least = _CAUTIOUS[scaling]

    def lessened(path: Any, u: Any, g: Any) -> Any:
        if _absent(u) or _absent(g) or u.size == 0:
            return u
        _check_real(path, u)
        agrees = mask(u, g)
        share = least(jnp.sum(agrees, dtype=jnp.int32).astype(jnp.float32), float(u.size))
        dtype = arithmetic_dtype(u.dtype)
        return jnp.where(agrees, u.astype(dtype) * (u.size / share).astype(dtype), 0).astype(u.dtype)

    def update(updates: optax.Updates, state: Any, params: Any = None, **extra: Any) -> tuple[optax.Updates, Any]:
        out, state = run.update(updates, state, params, **extra)
        return jax.tree_util.tree_map_with_path(lessened, out, updates, is_leaf=_absent), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _same_sign(a: Any, b: Any) -> Any:
    return jnp.sign(a) * jnp.sign(b).astype(a.dtype) > 0


def _same_sign_bit(a: Any, b: Any) -> Any:
    return jnp.signbit(a) == jnp.signbit(b)


# The mask, and what n is divided by, from the sum of the mask and n.
_CAUTIOUS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, float], Any]]] = {
    "count": (_same_sign, lambda total, n: total + 1),
    "mean": (_same_sign, lambda total, n: jnp.maximum(total, 1e-3 * n)),
    "sign_bit": (_same_sign_bit, lambda total, n: jnp.maximum(total, 1)),
}


class CautiousDecayState(NamedTuple):
    """State of `add_cautious_weight_decay`.

    Attributes:
      step: int32 scalar, the number of updates made; None unless the weight decay is scheduled.
    """

    step: Any


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
      TypeError: If `weight_decay` is no coefficient; at `update` if a leaf is complex.
      ValueError: If a number is out of range or there is no such agreement; at `update` without `params`.

    Reference:
      Chen et al., "Cautious weight decay", 2025, arXiv:2510.12402, and the code of dion and HeavyBall.
    """
    checks.within("weight_decay", weight_decay, "[0, inf)")
    checks.choice("agreement", agreement, ("product", "sign_bit"))
    agrees = _same_sign_bit if agreement == "sign_bit" else lambda u, p: jnp.sign(u) * jnp.sign(p).astype(u.dtype) >= 0

    def init(params: optax.Params) -> CautiousDecayState:
        del params
        return CautiousDecayState(jnp.zeros([], jnp.int32) if callable(weight_decay) else None)

    def update(
        updates: optax.Updates, state: CautiousDecayState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, CautiousDecayState]:
        del extra
        if params is None:
            raise ValueError("params must be given to update for a weight decay, got None")
        rate = value_at(weight_decay, state.step)

        def decayed(path: Any, u: Any, p: Any) -> Any:
            if _absent(u):
                return u
            _check_real(path, u)
            dtype = arithmetic_dtype(u.dtype, p.dtype)
            decay = jnp.asarray(rate, dtype) * p.astype(dtype)
            return (u.astype(dtype) + jnp.where(agrees(u, p), decay, 0)).astype(u.dtype)

        out = jax.tree_util.tree_map_with_path(decayed, updates, params, is_leaf=_absent)
        step = None if state.step is None else optax.safe_increment(state.step)
        return out, CautiousDecayState(step)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_to_unit_norm(scope: str = "tree") -> optax.GradientTransformation:
    r"""The direction of an update alone: $u \leftarrow u / \|u\|_2$, and zero where u is zero.

    After a rule it makes normalised momentum. The norm is taken in float32 or wider and can neither overflow nor
    underflow.

    Args:
      scope: `"tree"`: one norm for all parameters. `"leaf"`: one for each leaf.

    Returns:
      A transformation without state. Updates keep their dtypes; None stays None.

    Raises:
      ValueError: If there is no such scope.

    Reference:
      Cutkosky and Mehta, "Momentum improves normalized SGD", ICML 2020, arXiv:2002.03305 (the tree); You et al.,
      "Large batch training of convolutional networks", 2017, arXiv:1708.03888 (by layers).
    """
    checks.choice("scope", scope, _SCOPES)

    def update(updates: optax.Updates, params: Any = None) -> optax.Updates:
        del params
        return _by_norm(lambda x, largest, root: x / largest / root, updates, scope)

    return optax.stateless(update)


def saturate(delta: Scalar, scope: str = "tree") -> optax.GradientTransformation:
    r"""The relativistic velocity of a momentum: $u \leftarrow u / \sqrt{1 + \delta \|u\|^2}$.

    Its norm stays below $1/\sqrt\delta$; it is taken as in `scale_to_unit_norm`.

    Args:
      delta: In [0, inf), a number or a scalar array; 0 changes nothing.
      scope: `"tree"`: one norm for all parameters, as in the reference code. `"leaf"`: one for each leaf.

    Returns:
      A transformation without state. Updates keep their dtypes; None stays None.

    Raises:
      TypeError: If `delta` is a schedule or no coefficient.
      ValueError: If a number is out of range or there is no such scope.

    Reference:
      Franca, Sulam, Robinson and Vidal, "Conformal symplectic and relativistic optimization", NeurIPS 2020,
      arXiv:1903.04100.
    """
    if checks.is_schedule(delta):
        raise TypeError(f"delta must be a number or a scalar array, got the schedule {delta!r}")
    checks.within("delta", delta, "[0, inf)")
    checks.choice("scope", scope, _SCOPES)

    def slowed(x: Any, largest: Any, root: Any) -> Any:
        return x / jnp.hypot(1.0, jnp.sqrt(jnp.asarray(delta, largest.dtype)) * largest * root)

    def update(updates: optax.Updates, params: Any = None) -> optax.Updates:
        del params
        return _by_norm(slowed, updates, scope)

    return optax.stateless(update)


def orthogonalize(steps: int = 5) -> optax.GradientTransformation:
    r"""The nearest semi-orthogonal matrix to each update, by Optax's Newton-Schulz iteration: Muon's direction.

    With $X_0 = u / (\|u\|_F + 10^{-8})$, $X \leftarrow a X + (b A + c A^2) X$, $A = X X^T$, and (a, b, c) = (3.4445,
    -4.7750, 2.0315). Five steps bring singular values of $X_0$ from [0.01, 1] to [0.68, 1.14]; they need not converge.

    Args:
      steps: The number of iterations, a whole number of at least 1.

    Returns:
      A transformation without state, for matrices; the arithmetic is in the update's dtype. None stays None.

    Raises:
      TypeError: If `steps` is no whole number.
      ValueError: If `steps` is out of range; at `update` if a leaf is no matrix: give others to `optax.masked` or
        `optax.partition`.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; `optax.contrib.scale_by_muon`.
    """
    checks.integer("steps", steps, 1)

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), tree)

    # Without memory of its own, Optax's Muon is the map that it applies to its average.
    tx = optax.contrib.scale_by_muon(ns_steps=int(steps), beta=0.0, nesterov=False, weight_dimension_numbers=matrices)

    def update(updates: optax.Updates, params: Any = None) -> optax.Updates:
        del params
        for path, u in jax.tree_util.tree_leaves_with_path(updates):
            if jnp.ndim(u) != 2:
                name = jax.tree_util.keystr(path)
                raise ValueError(f"the update of params{name} must be a matrix, got shape {jnp.shape(u)}")
        return tx.update(updates, tx.init(updates))[0]

    return optax.stateless(update)


def _by_norm(function: Callable[[Any, Any, Any], Any], updates: Any, scope: str) -> Any:
    """`function(leaf, largest, root)` for each leaf, where largest times root is the norm of the tree or the leaf."""
    leaves, treedef = jax.tree.flatten(updates)
    groups = [leaves] if scope == "tree" else [[x] for x in leaves]
    out = []
    for group in groups:
        wide = [x.astype(arithmetic_dtype(x.dtype)) for x in group]
        tops = [jnp.max(jnp.abs(x), initial=0.0) for x in wide]
        top = jnp.max(jnp.stack(tops)) if tops else jnp.float32(0)
        # Squares of numbers of at most 1 do not overflow, and the largest of them is 1.
        largest = jnp.where(top > 0, top, 1)
        squares = sum((jnp.sum(jnp.square(jnp.abs(x / largest))) for x in wide), jnp.zeros([], largest.dtype))
        root = jnp.sqrt(jnp.where(top > 0, squares, 1))
        out += [function(w, largest, root).astype(x.dtype) for w, x in zip(wide, group, strict=True)]
    return jax.tree.unflatten(treedef, out)


class _Leaves:
    """The leaves of a tree of gradients, None and masked ones among them, and what in a state belongs to which."""

    def __init__(self, updates: Any) -> None:
        treedef: Any
        self.values, treedef = jax.tree.flatten(updates, is_leaf=_absent)
        self.treedef = treedef

    def of(self, tree: Any) -> list[Any]:
        """The leaves of a tree of the same structure."""
        found: list[Any] = self.treedef.flatten_up_to(tree)
        return found

    def standing(self) -> Any:
        """The gradients with a scalar for each None: what a state of full structure can be made of."""
        return self.treedef.unflatten([jnp.zeros([]) if g is None else g for g in self.values])

    def spread(self, each: list[Any], like: Any) -> Any:
        """The entries of `each` in the shapes of the tree `like`; what is absent there stays."""
        pairs = zip(each, self.of(like), strict=True)
        return self.treedef.unflatten([x if _absent(x) else jnp.broadcast_to(e, x.shape) for e, x in pairs])

    def select(self, each: list[Any], shared: Any, new: Any, old: Any) -> Any:
        """The state `new` where the condition of a leaf holds, else `old`, with all that belongs to the leaf.

        A subtree of the parameters' structure belongs to the leaves, everything else to `shared`. A condition of True
        or False, known now, looks at no value.
        """

        def pick(path: Any, a: Any, b: Any) -> Any:
            if self._is_ours(a):
                rows = zip(each, self.of(b), self.of(a), strict=True)
                return self.treedef.unflatten([x if _absent(x) else _where(ok, y, x) for ok, y, x in rows])
            if isinstance(shared, bool) and jnp.ndim(a) > 0:
                raise ValueError(
                    f"scope must be 'tree' for a state with arrays that belong to no single leaf, got 'leaf' and "
                    f"state{jax.tree_util.keystr(path)} of shape {jnp.shape(a)}"
                )
            return _where(shared, b, a)

        return jax.tree_util.tree_map_with_path(pick, old, new, is_leaf=self._is_ours)

    def _is_ours(self, node: Any) -> bool:
        structure: Any = jax.tree.structure(node, is_leaf=_absent)
        return bool(structure == self.treedef)


def _absent(x: Any) -> bool:
    """Whether a leaf is left out: None, or masked by Optax."""
    return x is None or isinstance(x, optax.MaskedNode)


def _where(condition: Any, new: Any, old: Any) -> Any:
    """`new` or `old`, of the dtype of `old`."""
    if condition is False:
        return old
    new = new if new.dtype == old.dtype else new.astype(old.dtype)
    return new if condition is True else jnp.where(condition, new, old)


def _all(conditions: list[Any]) -> jax.Array:
    return jnp.all(jnp.array(conditions, jnp.bool_))


def _any(conditions: list[Any]) -> jax.Array:
    return jnp.any(jnp.array(conditions, jnp.bool_))


def _flags(scope: str, params: Any, value: Any, dtype: Any) -> Any:
    """A scalar, or an entry of the leaf's rank for each leaf."""
    if scope == "tree":
        return jnp.full([], value, dtype)
    return jax.tree.map(lambda x: jnp.full((1,) * jnp.ndim(x), value, dtype), params)


def _check_real(path: Any, leaf: Any) -> None:
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"the update of params{jax.tree_util.keystr(path)} must be real, got {leaf.dtype}")


def _checked_transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"{name} must be a transformation with init and update, got {tx!r}")
    return optax.with_extra_args_support(tx)
