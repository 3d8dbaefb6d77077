"""Finished optimizers: each body is one visible `optax.chain`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .. import _checks
from .._export import serializable
from .._tree import absent, unboxed
from ..filters.coefficients import Scalar, value_at
from ..optimizers.gradient_dtype import in_gradient_dtype
from ..rules.sums_and_averages import heavy_ball
from ..state.mismatch import check_kind
from ..storage import Storage
from ..storage.protocol import arithmetic_dtype
from ..transform import scale_by_momentum
from ..wrappers.leaves import Leaves, check_shape, matched, squared_norm


def yellowfin(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    decay: Scalar = 0.999,
    window: int | None = None,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""YellowFin: the heavy ball with a learning rate and a momentum that it finds itself; see `scale_by_yellowfin`.

    Args:
      learning_rate: A factor on the rate that it finds, or a schedule of it, to decay by.
      decay: beta in [0, 1), of the averages.
      window: How many gradients the curvature range looks back at, known now; 20 if None.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Zhang and Mitliagkas, "YellowFin and the art of momentum tuning", MLSys 2019, arXiv:1706.03471.
    """
    _checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_yellowfin(decay, window, storage=storage),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


@serializable
class YellowFinState(NamedTuple):
    """State of `scale_by_yellowfin`. Scalars are of `real`: float32, or float64 if a leaf is so.

    Averages are exponential and zero-debiased: after the first gradient they are its values.

    Attributes:
      inner: The `MomentumState` of the heavy ball, whose velocity is the displacement without its sign.
      learning_rate: real scalar, the rate of the last step, smoothed.
      momentum: real scalar, the momentum of the last step, smoothed.
      count: int32 scalar, the number of gradients that counted: those that were not zero everywhere.
      weight: real scalar, what an average of ones would be without its debiasing: 1 - decay^count.
      window: real, shape (window,), the last squared norms of gradients, the youngest first.
      log_h_min: real scalar, average of the logarithm of the least squared norm in the window.
      log_h_max: real scalar, average of the logarithm of the largest.
      mean: A tree of averaged gradients, in float32 or wider.
      mean_square: real scalar, average of the squared norms.
      mean_norm: real scalar, average of the norms.
      distance: real scalar, average of `mean_norm` / `mean_square`: the distance to the optimum.
    """

    inner: Any
    learning_rate: Any
    momentum: Any
    count: Any
    weight: Any
    window: Any
    log_h_min: Any
    log_h_max: Any
    mean: Any
    mean_square: Any
    mean_norm: Any
    distance: Any


def scale_by_yellowfin(
    decay: Scalar = 0.999, window: int | None = None, *, storage: str | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""YellowFin: the heavy ball, its rate and momentum tuned from the gradients while it runs.

    $$ x_{t+1} = x_t - \alpha_t g_t + \mu_t (x_t - x_{t-1}) $$

    From averages (`decay` beta, zero-debiased, with an overline) of what the gradients show,

    * curvature range: $h_t = \|g_t\|^2$; $\log h_{min}$ and $\log h_{max}$ are averages of the logarithm of the least
      and the largest of the last `window` of them;
    * variance: $C = \overline{\|g\|^2} - \|\overline{g}\|^2$;
    * distance to the optimum: D, the average of $\overline{\|g\|} / \overline{\|g\|^2}$,

    each step solves SingleStep, $\min_\mu \mu D^2 + \alpha^2 C$ with $\alpha = (1 - \sqrt\mu)^2 / h_{min}$ and
    $\sqrt\mu \ge (\sqrt{h_{max}/h_{min}} - 1) / (\sqrt{h_{max}/h_{min}} + 1)$. The least is at the root of a cubic:

    $$ 1 - \sqrt\mu = \tfrac{2}{r} \sinh\!\left(\tfrac13 \sinh^{-1} \tfrac{3r}{2}\right), \qquad
       r = \sqrt{6 C} / (D h_{min}) $$

    The rate is multiplied by $\min(1, t / (10\,\mathrm{window}))$ in the first steps (slow start). What is applied are
    the averages of rate and momentum. The authors' PyTorch code computes them but applies the last values, and begins
    them with values that the user gives; here nothing has to be given.

    The update holds the rate, but not its sign: chain `optax.scale(-1.0)` after it, or take `yellowfin`. The clip of
    the authors' code, at a norm of $\sqrt{h_{max}}$, is left out; `optax.clip_by_global_norm` may stand before it.

    It takes squared gradients for curvatures, as they are for the log-likelihood of a model that fits. A loss
    multiplied by a number is another problem to it, and the first step has the length
    $1 / (10\,\mathrm{window}\,\|g\|)$, which is long where the loss is flat.

    A step whose gradients are all None, zero or too small to square leaves the statistics as they are. A leaf whose
    gradient is None counts nowhere in that step. A gradient that is not finite, or whose squared norm is not, makes the
    state non-finite; put `guarded` around it. Norms are over all that `update` gets: under `shard_map`, over a device's
    part alone.

    Args:
      decay: beta in [0, 1): a number, a scalar array, or a schedule of the number of gradients that counted.
      window: How many squared norms the range looks back at, at least 1, known now; 20 if None, as in the paper.
      storage: How the velocity is kept, see `scale_by_momentum`. The mean gradient, whose norm is compared with that of
        the gradients, stays exact: 4 bytes per parameter.

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
        scalars = {name: jnp.zeros([], real) for name in YellowFinState._fields}
        return YellowFinState(**scalars)._replace(
            inner=inner,
            count=jnp.zeros([], jnp.int32),
            window=jnp.zeros(int(window), real),
            mean=mean,
        )

    def update(
        updates: optax.Updates, state: YellowFinState, params: Any = None, **extra: Any
    ) -> tuple[optax.Updates, YellowFinState]:
        del params, extra
        check_kind(state, YellowFinState)
        state = _measured(updates, state, value_at(decay, state.count))
        scaled = jax.tree.map(lambda g: _times(state.learning_rate, g), updates)
        run = scale_by_momentum(heavy_ball(state.momentum), storage=storage)
        out, inner = run.update(scaled, state.inner)
        out = jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), out, updates)
        return out, state._replace(inner=inner)

    return optax.GradientTransformationExtraArgs(init, update)


def single_step(log_h_min: Any, log_h_max: Any, variance: Any, distance: Any) -> tuple[Any, Any]:
    """Rate and momentum that solve SingleStep.

    Args:
      log_h_min: Logarithm of the least curvature.
      log_h_max: Logarithm of the largest.
      variance: C, not negative.
      distance: D, positive.

    Returns:
      Two scalars.
    """
    # Both terms are 1 - sqrt(mu): of the cubic, and of the range.
    gap = jnp.minimum(_root(variance, jnp.exp(-log_h_min) / distance), 2 / (1 + jnp.exp((log_h_max - log_h_min) / 2)))
    return gap**2 * jnp.exp(-log_h_min), (1 - gap) ** 2


@jax.custom_jvp
def _root(variance: Any, unit: Any) -> Any:
    """The y between 0 and 1 with $y + r^2 y^3 / 3 = 1$, where $r^2$ is 6 times `variance` times `unit` squared."""
    # The smallest r leaves a root of 1, without 0/0.
    r = jnp.maximum(jnp.sqrt(6 * variance) * unit, 1e-12)
    return 2 / r * jnp.sinh(jnp.arcsinh(1.5 * r) / 3)


@_root.defjvp
def _slope_of_the_root(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """By the implicit function theorem: the closed form has a root of 0 and differences of large numbers."""
    (variance, unit), (variance_dot, unit_dot) = primals, tangents
    y = _root(variance, unit)
    square = 6 * variance * unit**2
    square_dot = 6 * unit**2 * variance_dot + 12 * variance * unit * unit_dot
    return y, -(y**3) / 3 / (1 + square * y**2) * square_dot


def _measured(updates: Any, state: YellowFinState, decay: Any) -> YellowFinState:
    """The state with its statistics, rate and momentum after these gradients."""
    leaves = Leaves(updates)
    real = state.weight.dtype
    square = squared_norm(leaves.values, real)
    silent = square == 0
    h = jnp.where(silent, 1, square)
    count = optax.safe_increment(state.count)
    weight = jnp.asarray(decay, real) * state.weight + jnp.asarray(1 - decay, real)
    # Of the new value in an average that is debiased already; 1 at first.
    share = jnp.where(silent, 0, jnp.asarray(1 - decay, real) / weight)

    def average(old: Any, new: Any) -> Any:
        return old + share * (new - old)

    window = jnp.roll(state.window, 1).at[0].set(h)
    seen = jnp.arange(len(window)) < count
    least, largest = jnp.min(window, where=seen, initial=jnp.inf), jnp.max(window, where=seen, initial=0)
    mean = matched("the parameters of init", state.mean, updates)
    for i, (path, g) in enumerate(jax.tree_util.tree_leaves_with_path(unboxed(updates), is_leaf=absent)):
        if not absent(g):
            check_shape(path, "the parameter of init", mean[i], g)
            mean[i] += share.astype(jnp.finfo(mean[i].dtype).dtype) * (g.astype(mean[i].dtype) - mean[i])
    square_of_mean = squared_norm([g if absent(g) else m for g, m in zip(leaves.values, mean, strict=True)], real)
    new = state._replace(
        count=count,
        weight=weight,
        window=window,
        log_h_min=average(state.log_h_min, jnp.log(least)),
        log_h_max=average(state.log_h_max, jnp.log(largest)),
        mean_square=average(state.mean_square, h),
        mean_norm=average(state.mean_norm, jnp.sqrt(h)),
    )
    new = new._replace(distance=average(state.distance, new.mean_norm / jnp.where(silent, 1, new.mean_square)))
    variance = jnp.maximum(new.mean_square - square_of_mean, 0)
    rate, momentum = single_step(new.log_h_min, new.log_h_max, variance, jnp.where(silent, 1, new.distance))
    rate *= jnp.minimum(1, count.astype(real) / (10 * len(window)))
    new = new._replace(learning_rate=average(state.learning_rate, rate), momentum=average(state.momentum, momentum))
    scalars = (x._replace(inner=None, mean=None) for x in (state, new))
    kept: YellowFinState = jax.tree.map(lambda a, b: jnp.where(silent, a, b), *scalars)
    return kept._replace(inner=state.inner, mean=leaves.joined(mean, state.mean))


def _zeros(leaf: Any) -> jax.Array:
    leaf = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    return jnp.zeros_like(leaf, dtype=arithmetic_dtype(leaf.dtype))


def _times(rate: Any, g: Any) -> Any:
    wide = g.astype(arithmetic_dtype(g.dtype))
    return rate.astype(jnp.finfo(wide.dtype).dtype) * wide
