"""Finished optimizers: each body is one visible `optax.chain`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import checks
from .coefficients import Scalar, is_zero
from .filters import Filter
from .mismatch import explained, without_momentum
from .rules import ema, heavy_ball, lion_mix, muon_mix, nesterov, torch_nesterov
from .schedules import nesterov_convex, restarted
from .storage import Storage, bfloat16, resolve
from .storage.full import Float32
from .transform import scale_by_momentum
from .wrappers import (
    mars_correction,
    orthogonalize,
    saturate,
    scale_by_adaptive_storm,
    scale_by_yellowfin,
    scale_to_unit_norm,
)


def sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter | None" = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    *,
    dampening: "Scalar | None" = None,
    weight_decay: "Scalar | None" = None,
    mask: Any = None,
    maximize: bool = False,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with momentum: `optax.sgd` with PyTorch's options, or with any rule.

    $$ g \leftarrow \pm g + \lambda\theta, \quad v' = \mu v + (1-\tau) g, \quad u = v' \;\text{or}\; g + \mu v',
       \quad \theta' = \theta - \eta u $$

    The first gradient that a leaf receives enters its velocity undampened.

    The first four arguments have the order, the defaults and the meaning of `optax.sgd`. Every numeric argument takes a
    number, a scalar array or a schedule, and `optax.inject_hyperparams` works without `static_args`: what is left at
    None stays out of the injected hyperparameters. Updates have the gradients' dtypes, also where an injected
    hyperparameter is of a wider one.

    Args:
      learning_rate: eta.
      momentum: mu in [0, 1], with PyTorch's meaning; or a rule, such as `mo.nesterov(schedule)`, which then takes no
        `nesterov` and no `dampening`; None or the number 0 for none, without state.
      nesterov: The Nesterov form of PyTorch and Optax (`torch_nesterov`). As in Optax, nothing without a momentum.
      accumulator_dtype: Optax's way to say `storage`: None or float32 for "float32", bfloat16 for
        `mo.storage.bfloat16("nearest")`. As in Optax, nothing without a momentum.
      dampening: tau in [0, 1); None for 0.
      weight_decay: lambda in [0, inf): L2, coupled, that is through the momentum as in PyTorch; `update` then needs
        `params`. None for none.
      mask: Which parameters decay: a tree of bools, or a function from the parameters to one, as in
        `optax.add_decayed_weights`.
      maximize: Ascend. As in PyTorch the sign is turned before the weight decay is added, which still shrinks.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; if `dampening` or a `storage` is given without a momentum to act on, or
        `mask` without `weight_decay`; if `dampening` meets `nesterov`, as in PyTorch, or `storage` an
        `accumulator_dtype`; at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type.

    Reference:
      `torch.optim.SGD`, `optax.sgd`; Sutskever et al., ICML 2013.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.flag("maximize", maximize)
    rule = _sgd_rule(momentum, nesterov, dampening)
    kept = _storage_of(storage, "accumulator_dtype", accumulator_dtype)
    if rule is None and not isinstance(kept, Float32) and accumulator_dtype is None:
        raise ValueError(f"storage needs a momentum to keep, got {storage!r} and momentum {momentum!r}")
    return in_gradient_dtype(
        optax.chain(
            optax.scale(-1.0) if maximize else optax.identity(),
            _weight_decay(weight_decay, mask),
            without_momentum() if rule is None else scale_by_momentum(rule, storage=kept),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def lion(  # noqa: PLR0917  the order of `optax.lion`
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    mu_dtype: Any = None,
    weight_decay: "Scalar | None" = 1e-3,
    mask: Any = None,
    *,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Lion: the sign of a mix of momentum and gradient, with decoupled weight decay; `optax.lion`.

    $$ u = \mathrm{sign}(\beta_1 v + (1 - \beta_1) g), \quad v' = \beta_2 v + (1 - \beta_2) g, \quad
       \theta' = \theta - \eta (u + \lambda\theta) $$

    Args:
      learning_rate: eta.
      b1: beta_1 in [0, 1), the mix.
      b2: beta_2 in [0, 1), the memory.
      mu_dtype: Optax's way to say `storage`, see `accumulator_dtype` of `sgd`.
      weight_decay: lambda in [0, inf), Optax's default; `update` then needs `params`. None for none.
      mask: Which parameters decay, see `sgd`.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `mask` without `weight_decay`, or `storage` with `mu_dtype`; at
        `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type.

    Reference:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, arXiv:2302.06675.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(lion_mix(b1, b2), storage=_storage_of(storage, "mu_dtype", mu_dtype)),
            optax.scale_by_sign(),
            _weight_decay(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def signum(
    learning_rate: optax.ScalarOrSchedule,
    beta: Scalar = 0.9,
    accumulator_dtype: Any = None,
    *,
    weight_decay: "Scalar | None" = None,
    mask: Any = None,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: the sign of the average gradient, `optax.signum`, with decoupled weight decay if asked for.

    $$ v' = \beta v + (1 - \beta) g, \qquad \theta' = \theta - \eta (\mathrm{sign}(v') + \lambda\theta) $$

    Args:
      learning_rate: eta.
      beta: In [0, 1).
      accumulator_dtype: Optax's way to say `storage`, see `sgd`.
      weight_decay: lambda in [0, inf); `update` then needs `params`. None for none, as in Optax.
      mask: Which parameters decay, see `sgd`.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `mask` without `weight_decay`, or `storage` with
        `accumulator_dtype`; at `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type.

    Reference:
      Bernstein et al., "signSGD: compressed optimisation for non-convex problems", ICML 2018, arXiv:1802.04434.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    # The rule calls its decay so, and Optax beta.
    checks.within("beta", beta, "[0, 1)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(ema(beta), storage=_storage_of(storage, "accumulator_dtype", accumulator_dtype)),
            optax.scale_by_sign(),
            _weight_decay(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.95,
    *,
    steps: int | None = None,
    weight_decay: "Scalar | None" = None,
    mask: Any = None,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Muon, for matrices: the orthogonalised momentum, scaled by their shape.

    $$ \theta' = \theta - \eta \left(\sqrt{\max(1, \tfrac{n}{m})}\;\mathrm{orthogonalize}(u) + \lambda\theta\right) $$

    for u of the rule and $\theta$ of m inputs by n outputs, the layout of Flax and Optax (PyTorch's is transposed).
    The default rule, `muon_mix`, is that of the reference code. `optax.contrib.muon` debiases momentum and gradient by
    their own corrections, which is `momentum=nadam_mix(beta, psi=1e6)`. Other parameters need another optimizer:

        label = lambda params: jax.tree.map(lambda p: "muon" if p.ndim == 2 else "adam", params)
        optax.partition({"muon": mo.muon(0.02), "adam": optax.adam(3e-4)}, label)

    Args:
      learning_rate: eta; the reference code has 0.02.
      momentum: The decay of `muon_mix` in [0, 1), or a rule.
      steps: Newton-Schulz iterations, at least 1, known now; None for the reference code's 5.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for none.
      mask: Which parameters decay, see `sgd`.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; for `mask` without `weight_decay`; at `init` if a leaf is no matrix; at
        `update` without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(_rule(momentum, muon_mix), storage=storage),
            orthogonalize(steps),
            optax.stateless(_widened),
            _weight_decay(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def normalized_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.9,
    *,
    scope: str = "tree",
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Normalised SGD with momentum: steps of length eta along the average gradient.

    $$ v' = \beta v + (1 - \beta) g, \qquad \theta' = \theta - \eta\, v' / \|v'\| $$

    Args:
      learning_rate: eta, the length of a step (of each leaf's, by leaf).
      momentum: beta in [0, 1), or a rule.
      scope: `"tree"`, the paper's, or `"leaf"`, see `scale_to_unit_norm`.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range or there is no such scope.
      TypeError: If an argument is of the wrong type.

    Reference:
      Cutkosky and Mehta, "Momentum improves normalized SGD", ICML 2020, arXiv:2002.03305.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(_rule(momentum, ema), storage=storage),
            scale_to_unit_norm(scope),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def srsgd(
    learning_rate: optax.ScalarOrSchedule,
    restarts: int | Sequence[int] | jax.Array,
    *,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Scheduled restart SGD: Nesterov's increasing momentum, from zero again at every restart.

    $$ x' = y - \eta g(y), \qquad y' = x' + \tfrac{k}{k + 3} (x' - x), $$

    k counting the steps since the last restart, from 0. The stored parameters are y.

    Args:
      learning_rate: eta.
      restarts: The number of steps from one restart to the next, or the increasing steps at which to restart; numbers
        or an integer array.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If an argument is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Wang et al., "Scheduled restart momentum for accelerated stochastic gradient descent", SIAM J. Imaging Sci. 2022,
      arXiv:2002.10583.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(nesterov(restarted(nesterov_convex(), restarts)), storage=storage),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def relativistic(
    learning_rate: optax.ScalarOrSchedule,
    decay: Scalar = 0.9,
    delta: Scalar = 1.0,
    *,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""The relativistic heavy ball: no step is longer than $1/\sqrt\delta$, whatever the gradient.

    $$ v' = \mu v - \eta g, \qquad \theta' = \theta + v' / \sqrt{1 + \delta \|v'\|^2} $$

    The learning rate is inside the velocity, so that the speed limit is one of the step itself; delta = 0 is the heavy
    ball. This is the reference code's simple form, not its leapfrog.

    Args:
      learning_rate: eta.
      decay: mu in (-1, 1].
      delta: In [0, inf), a number or a scalar array.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Franca, Sulam, Robinson and Vidal, "Conformal symplectic and relativistic optimization", NeurIPS 2020,
      arXiv:1903.04100.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            optax.scale_by_learning_rate(learning_rate),
            scale_by_momentum(heavy_ball(decay), storage=storage),
            saturate(delta),
        )
    )


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
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_yellowfin(decay, window, storage=storage),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def storm(
    c: Any, k: Any = 0.1, w: Any = 0.1, *, storage: str | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""STORM with its adaptive rate: $\theta' = \theta - \eta_t d_t$; see `scale_by_adaptive_storm`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before.

    Args:
      c: In [0, inf), to be tuned.
      k: In (0, inf).
      w: In (0, inf).
      storage: How d is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type; at `update` without `previous_gradient`.

    Reference:
      Cutkosky and Orabona, "Momentum-based variance reduction in non-convex SGD", NeurIPS 2019, arXiv:1905.10018.
    """
    return in_gradient_dtype(optax.chain(scale_by_adaptive_storm(c, k, w, storage=storage), optax.scale(-1.0)))


def mars_adamw(
    learning_rate: optax.ScalarOrSchedule,
    decay: Any = 0.95,
    b2: Any = 0.99,
    *,
    gamma: Scalar = 0.025,
    eps: Any = 1e-8,
    weight_decay: "Scalar | None" = None,
    mask: Any = None,
    scope: str = "tree",
) -> optax.GradientTransformationExtraArgs:
    r"""MARS-AdamW: AdamW of the corrected and clipped gradient; see `mars_correction`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before. In one byte:
    `mo.compress(mo.mars_adamw(rate), {"mu": "int8", "nu": "uint8"})`.

    Args:
      learning_rate: eta; the authors' code has 3e-3.
      decay: beta_1 in [0, 1), a number or a scalar array.
      b2: beta_2 of `optax.scale_by_adam`.
      gamma: The weight of the correction, finite.
      eps: See `optax.scale_by_adam`.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for none.
      mask: Which parameters decay, see `sgd`.
      scope: Of the clip: `"tree"`, the paper's, or `"leaf"`, the authors' code's.

    Raises:
      ValueError: If a number is out of range or there is no such scope; for `mask` without `weight_decay`; at `update`
        without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `update` without `previous_gradient`.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    for name, value in (("decay", decay), ("b2", b2), ("eps", eps)):
        if not (checks.is_number(value) or checks.is_scalar_array(value)):
            raise TypeError(
                f"{name} must be a number or a scalar array, as optax.scale_by_adam wants it, got {checks.shown(value)}"
            )
    return in_gradient_dtype(
        optax.chain(
            mars_correction(decay, gamma, scope),
            _of_steady_types(optax.scale_by_adam(decay, b2, eps)),
            _weight_decay(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def mars_lion(
    learning_rate: optax.ScalarOrSchedule,
    decay: Scalar = 0.95,
    *,
    gamma: Scalar = 0.025,
    weight_decay: "Scalar | None" = None,
    mask: Any = None,
    scope: str = "tree",
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""MARS-Lion: the sign of the averaged, corrected and clipped gradient; see `mars_correction`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before.

    Args:
      learning_rate: eta.
      decay: beta in [0, 1).
      gamma: The weight of the correction, finite.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`. None for none.
      mask: Which parameters decay, see `sgd`.
      scope: Of the clip: `"tree"`, the paper's, or `"leaf"`, the authors' code's.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range or there is no such scope; for `mask` without `weight_decay`; at `update`
        without `params` if there is a weight decay.
      TypeError: If an argument is of the wrong type; at `update` without `previous_gradient`.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            mars_correction(decay, gamma, scope),
            scale_by_momentum(ema(decay), storage=storage),
            optax.scale_by_sign(),
            _weight_decay(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _of_steady_types(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with a state that keeps its dtypes: injected decays of a wider one would widen Optax's moments."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = tx.update(updates, state, params)
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(tx.init, update)


def _widened(updates: Any, params: Any = None) -> Any:
    """Each matrix times the square root of its outputs over its inputs, where they are more."""
    del params
    return jax.tree.map(lambda u: max(1.0, u.shape[1] / u.shape[0]) ** 0.5 * u, updates)


def _rule(momentum: "Scalar | Filter", make: Callable[[Any], Filter]) -> Filter:
    """The rule, or what `make` makes of a decay."""
    if isinstance(momentum, Filter):
        return momentum
    checks.within("momentum", momentum, "[0, 1)")
    return make(momentum)


def _sgd_rule(momentum: "Scalar | Filter | None", nesterov: bool, dampening: "Scalar | None") -> Filter | None:
    """The rule of PyTorch's options; None for no momentum."""
    checks.flag("nesterov", nesterov)
    damped = dampening is not None and not is_zero(dampening)
    dampening = 0.0 if dampening is None else dampening
    checks.within("dampening", dampening, "[0, 1)")
    if isinstance(momentum, Filter):
        if nesterov or damped:
            raise ValueError("nesterov and dampening must be left out when momentum is a rule: it says what they would")
        return momentum
    if momentum is None or is_zero(momentum):
        if damped:
            raise ValueError(f"dampening needs a momentum in (0, 1], got {checks.shown(momentum)}")
        return None
    checks.within("momentum", momentum, "[0, 1]")
    if nesterov:
        if checks.is_number(dampening) and damped:
            raise ValueError(f"nesterov needs dampening 0, got {checks.shown(dampening)}")
        # An injected or scheduled dampening, which may be 0 throughout, cannot be refused: it acts.
        return torch_nesterov(momentum, dampening=dampening)
    return heavy_ball(momentum, dampening=dampening, first_step="gradient")


def _storage_of(storage: str | Storage, name: str, dtype: Any) -> Storage:
    """The storage that `storage` or Optax's argument `name`, a dtype, asks for."""
    asked = resolve(storage)
    if dtype is None:
        return asked
    if hasattr(dtype, "shape") and not isinstance(dtype, type | np.dtype):
        # A dtype that can be called, such as jnp.bfloat16, is a schedule to Optax.
        raise TypeError(f"{name} must be a dtype, got {dtype!r}{checks.static(name, dtype)}")
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


def _weight_decay(weight_decay: "Scalar | None", mask: Any) -> optax.GradientTransformation:
    """`add_decayed_weights` of checked arguments; nothing for None."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError("mask needs a weight_decay to act on, got weight_decay None")
        return optax.identity()
    checks.within("weight_decay", weight_decay, "[0, inf)")
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


def in_gradient_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with updates of the gradients' dtypes: Optax multiplies by wider hyperparameters as they are.

    For that it needs JAX's usual promotion of dtypes, also where the user's own code may do without.
    """
    run = explained(optax.with_extra_args_support(tx).update, tx.init)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            new, state = run(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
