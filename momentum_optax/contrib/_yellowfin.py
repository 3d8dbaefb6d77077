"""YellowFin: the heavy ball with a learning rate and a momentum tuned from the gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import Leaves, absent
from .._typing import Entry, Leaf, Number, PyTree
from ..filters.coefficients import Scalar, value_at
from ..optimizers.arguments import descent
from ..rules.sums_and_averages import heavy_ball
from ..state.mismatch import check_kind
from ..storage._by_leaf import AnyStorage
from ..storage.protocol import arithmetic_dtype
from ..transform import scale_by_momentum
from ..wrappers.leaves import squared_norm
from ._gradients import check_shape, matched, times
from ._single_step import single_step


def yellowfin(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    decay: Scalar = 0.999,
    window: int | None = None,
    storage: AnyStorage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""YellowFin: the heavy ball with learning rate and momentum tuned from the gradients; see `scale_by_yellowfin`.

    Args:
      learning_rate: A factor on the tuned learning rate, or a schedule of one.
      decay: beta in [0, 1), of the averages.
      window: How many gradients the curvature range looks back at, static; 20 if None.
      storage: The storage of the velocity, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Zhang and Mitliagkas, "YellowFin and the art of momentum tuning", MLSys 2019, arXiv:1706.03471.
    """
    return descent(
        learning_rate,
        scale_by_yellowfin(decay, window, storage=storage),
    )


@serializable
class YellowFinState(NamedTuple):
    """State of `scale_by_yellowfin`. Scalars are of `real`: float32, or float64 if a leaf is so.

    Averages are exponential and zero-debiased: after the first gradient they are its values.

    Attributes:
      inner: The `MomentumState` of the heavy ball, whose velocity is the displacement without its sign.
      learning_rate: real scalar, the learning rate of the last step, smoothed.
      momentum: real scalar, the momentum of the last step, smoothed.
      count: int32 scalar, the number of gradients that counted: those that were not zero everywhere.
      weight: real scalar, an average of ones before debiasing: 1 - decay^count.
      window: real, shape (window,), the last squared norms of gradients, the youngest first.
      log_h_min: real scalar, average of the logarithm of the least squared norm in the window.
      log_h_max: real scalar, average of the logarithm of the largest.
      mean: A tree of averaged gradients, in float32 or wider.
      mean_square: real scalar, average of the squared norms.
      mean_norm: real scalar, average of the norms.
      distance: real scalar, average of `mean_norm` / `mean_square`: the distance to the optimum.
    """

    inner: optax.OptState
    learning_rate: jax.Array
    momentum: jax.Array
    count: Entry
    weight: jax.Array
    window: jax.Array
    log_h_min: jax.Array
    log_h_max: jax.Array
    mean: PyTree
    mean_square: jax.Array
    mean_norm: jax.Array
    distance: jax.Array


def scale_by_yellowfin(
    decay: Scalar = 0.999, window: int | None = None, *, storage: AnyStorage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""YellowFin: the heavy ball, with learning rate and momentum tuned from the gradients during the run.

    $$ x_{t+1} = x_t - \alpha_t g_t + \mu_t (x_t - x_{t-1}) $$

    From debiased averages with `decay` beta, written with an overline,

    * curvature range: $h_t = \|g_t\|^2$; $\log h_{min}$ and $\log h_{max}$ are averages of the logarithm of the least
      and the largest of the last `window` of them;
    * variance: $C = \overline{\|g\|^2} - \|\overline{g}\|^2$;
    * distance to the optimum: D, the average of $\overline{\|g\|} / \overline{\|g\|^2}$,

    each step solves SingleStep, $\min_\mu \mu D^2 + \alpha^2 C$ with $\alpha = (1 - \sqrt\mu)^2 / h_{min}$ and
    $\sqrt\mu \ge (\sqrt{h_{max}/h_{min}} - 1) / (\sqrt{h_{max}/h_{min}} + 1)$. The least is at the root of a cubic:

    $$ 1 - \sqrt\mu = \tfrac{2}{r} \sinh\!\left(\tfrac13 \sinh^{-1} \tfrac{3r}{2}\right), \qquad
       r = \sqrt{6 C} / (D h_{min}) $$

    The learning rate is multiplied by $\min(1, t / (10\,\mathrm{window}))$ in the first steps (slow start). The step
    applies the averages of both. The authors' PyTorch code computes them but applies the last values, and starts them
    from values that the user gives; here nothing has to be given.

    The update includes the learning rate, but is not negated: chain `optax.scale(-1.0)` after it, or take `yellowfin`.
    The clip of the authors' code, at a norm of $\sqrt{h_{max}}$, is left out; `optax.clip_by_global_norm` may stand
    before it.

    It uses squared gradients as curvatures, which holds for the log-likelihood of a model that fits. It is not
    invariant to a factor on the loss, and the first step has the length $1 / (10\,\mathrm{window}\,\|g\|)$, which is
    long where the loss is flat.

    A step whose gradients are all None, zero or too small to square leaves the statistics unchanged. A leaf whose
    gradient is None counts nowhere in that step. A gradient that is not finite, or whose squared norm is not, makes the
    state non-finite; put `guarded` around it. Norms are over all that `update` gets: under `shard_map`, over a device's
    part alone.

    Args:
      decay: beta in [0, 1): a number, a scalar array, or a schedule of the number of gradients that counted.
      window: How many squared norms the range looks back at, at least 1, static; 20 if None, as in the paper.
      storage: The storage of the velocity, see `scale_by_momentum`. The mean gradient, whose norm is compared with
        that of the gradients, stays exact: 4 bytes per parameter.

    Returns:
      A transformation whose state is a `YellowFinState`. Updates have the gradients' dtypes.

    Raises:
      TypeError: If an argument has the wrong type; at `init` if a leaf is not of a float or complex dtype.
      ValueError: If a number is out of range or there is no such storage; at `update` if the gradients' tree or shapes
        are not those of `init`.

    Reference:
      Zhang and Mitliagkas, "YellowFin and the art of momentum tuning", MLSys 2019, arXiv:1706.03471.
    """
    _checks.within("decay", decay, "[0, 1)")
    window = 20 if window is None else window
    _checks.integer("window", window, 1)
    # Any decay makes the same state.
    ball = scale_by_momentum(heavy_ball(0.5), storage=storage)

    def init(params: optax.Params) -> YellowFinState:
        inner = ball.init(params)
        mean = jax.tree.map(_zeros, params)
        real = jnp.finfo(arithmetic_dtype(*(x.dtype for x in jax.tree.leaves(mean)))).dtype
        scalars: dict[str, PyTree] = {name: jnp.zeros([], real) for name in YellowFinState._fields}
        return YellowFinState(**scalars)._replace(
            inner=inner,
            count=jnp.zeros([], jnp.int32),
            window=jnp.zeros(int(window), real),
            mean=mean,
        )

    def update(
        updates: optax.Updates, state: YellowFinState, params: optax.Params | None = None, **extra: PyTree
    ) -> tuple[optax.Updates, YellowFinState]:
        del params, extra
        check_kind(state, YellowFinState)
        state = _measured(updates, state, value_at(decay, state.count))
        scaled = jax.tree.map(lambda g: times(state.learning_rate, g), updates)
        run = scale_by_momentum(heavy_ball(state.momentum), storage=storage)
        out, inner = run.update(scaled, state.inner)
        out = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), out, updates)
        return out, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _measured(updates: optax.Updates, state: YellowFinState, decay: Number) -> YellowFinState:
    """The state with its statistics, learning rate and momentum after these gradients."""
    leaves = Leaves(updates)
    real = state.weight.dtype
    square = squared_norm(leaves.values, real)
    silent = square == 0
    weight = jnp.asarray(decay, real) * state.weight + jnp.asarray(1 - decay, real)
    # Of the new value in a debiased average; 1 at first.
    share = jnp.where(silent, 0, jnp.asarray(1 - decay, real) / weight)
    mean = _mean_gradient(updates, state.mean, share)
    square_of_mean = squared_norm([g if absent(g) else m for g, m in zip(leaves.values, mean, strict=True)], real)
    new = _statistics(state._replace(weight=weight), square, silent, share)
    new = _tuned(new, square_of_mean, silent, share)
    scalars = (x._replace(inner=None, mean=None) for x in (state, new))
    kept: YellowFinState = jax.tree.map(lambda a, b: jnp.where(silent, a, b), *scalars)
    return kept._replace(inner=state.inner, mean=leaves.to_tree(mean, state.mean))


def _mean_gradient(updates: optax.Updates, mean: PyTree, share: jax.Array) -> list[jax.Array]:
    """The leaves of the averaged gradients."""
    means = []
    for path, g, m in matched(updates, "the parameters of init", mean):
        if absent(g):
            means.append(m)
        else:
            check_shape(path, "the parameter of init", m, g)
            means.append(_average(m, g.astype(m.dtype), share.astype(jnp.finfo(m.dtype).dtype)))
    return means


def _statistics(state: YellowFinState, square: jax.Array, silent: jax.Array, share: jax.Array) -> YellowFinState:
    """The state with the averages that the squared norm enters."""
    h = jnp.where(silent, 1, square)
    count = optax.safe_increment(state.count)
    window = jnp.roll(state.window, 1).at[0].set(h)
    seen = jnp.arange(len(window)) < count
    least, largest = jnp.min(window, where=seen, initial=jnp.inf), jnp.max(window, where=seen, initial=0)
    new = state._replace(
        count=count,
        window=window,
        log_h_min=_average(state.log_h_min, jnp.log(least), share),
        log_h_max=_average(state.log_h_max, jnp.log(largest), share),
        mean_square=_average(state.mean_square, h, share),
        mean_norm=_average(state.mean_norm, jnp.sqrt(h), share),
    )
    distance = new.mean_norm / jnp.where(silent, 1, new.mean_square)
    return new._replace(distance=_average(state.distance, distance, share))


def _tuned(state: YellowFinState, square_of_mean: jax.Array, silent: jax.Array, share: jax.Array) -> YellowFinState:
    """The state with the learning rate and the momentum that its averages give."""
    variance = jnp.maximum(state.mean_square - square_of_mean, 0)
    rate, momentum = single_step(state.log_h_min, state.log_h_max, variance, jnp.where(silent, 1, state.distance))
    rate *= jnp.minimum(1, state.count.astype(rate.dtype) / (10 * len(state.window)))
    return state._replace(
        learning_rate=_average(state.learning_rate, rate, share), momentum=_average(state.momentum, momentum, share)
    )


def _average(old: jax.Array, new: jax.Array, share: jax.Array) -> jax.Array:
    return old + share * (new - old)


def _zeros(leaf: Leaf) -> jax.Array:
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jnp.zeros_like(leaf, dtype=arithmetic_dtype(leaf.dtype))
