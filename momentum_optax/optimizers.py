"""Finished optimizers: each body is one visible `optax.chain`."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import checks
from .coefficients import Scalar, is_zero
from .filters import Filter
from .mismatch import explained, without_momentum
from .rules import ema, heavy_ball, lion_mix, muon_mix, nesterov, torch_nesterov
from .schedules import nesterov_convex, restarted
from .storage import Storage, resolve
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
    momentum: "Scalar | Filter | None" = 0.9,
    *,
    nesterov: bool = False,
    dampening: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    maximize: bool = False,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Stochastic gradient descent with momentum: `optax.sgd` with PyTorch's options, or with any rule.

    $$ g \leftarrow \pm g + \lambda\theta, \quad v' = \mu v + (1-\tau) g, \quad u = v' \;\text{or}\; g + \mu v',
       \quad \theta' = \theta - \eta u $$

    The first gradient that a leaf receives enters its velocity undampened.

    Every numeric argument takes a number, a scalar array (so `optax.inject_hyperparams` works) or a schedule.
    Updates have the gradients' dtypes, also where an injected hyperparameter is of a wider one.

    Args:
      learning_rate: eta.
      momentum: mu in [0, 1), with PyTorch's meaning; or a rule, such as `mo.nesterov(schedule)`, which then takes no
        `nesterov` and no `dampening`; None or the number 0 for none, without state.
      nesterov: The Nesterov form of PyTorch and Optax (`torch_nesterov`).
      dampening: tau in [0, 1).
      weight_decay: lambda in [0, inf): L2, coupled, that is through the momentum as in PyTorch; `update` then needs
        `params`.
      maximize: Ascend. As in PyTorch the sign is turned before the weight decay is added, which still shrinks.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; if `nesterov` or `dampening` is given without a momentum to act on, or
        both together, as in PyTorch.
      TypeError: If an argument is of the wrong type.

    Reference:
      `torch.optim.SGD`, `optax.sgd`; Sutskever et al., ICML 2013.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.within("weight_decay", weight_decay, "[0, inf)")
    checks.flag("maximize", maximize)
    storage = resolve(storage)
    rule = _sgd_rule(momentum, nesterov, dampening)
    return in_gradient_dtype(
        optax.chain(
            optax.scale(-1.0) if maximize else optax.identity(),
            optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
            without_momentum() if rule is None else scale_by_momentum(rule, storage=storage),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.99,
    *,
    weight_decay: Scalar = 1e-3,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""Lion: the sign of a mix of momentum and gradient, with decoupled weight decay; `optax.lion`.

    $$ u = \mathrm{sign}(\beta_1 v + (1 - \beta_1) g), \quad v' = \beta_2 v + (1 - \beta_2) g, \quad
       \theta' = \theta - \eta (u + \lambda\theta) $$

    Args:
      learning_rate: eta.
      b1: beta_1 in [0, 1), the mix.
      b2: beta_2 in [0, 1), the memory.
      weight_decay: lambda in [0, inf), Optax's default; `update` then needs `params`.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, arXiv:2302.06675.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.within("weight_decay", weight_decay, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(lion_mix(b1, b2), storage=storage),
            optax.scale_by_sign(),
            optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def signum(
    learning_rate: optax.ScalarOrSchedule, decay: Scalar = 0.9, *, storage: str | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""Signum: the sign of the average gradient; `optax.signum`.

    $$ v' = \beta v + (1 - \beta) g, \qquad \theta' = \theta - \eta\,\mathrm{sign}(v') $$

    Args:
      learning_rate: eta.
      decay: beta in [0, 1).
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range.
      TypeError: If an argument is of the wrong type.

    Reference:
      Bernstein et al., "signSGD: compressed optimisation for non-convex problems", ICML 2018, arXiv:1802.04434.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(ema(decay), storage=storage),
            optax.scale_by_sign(),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: "Scalar | Filter" = 0.95,
    *,
    steps: int = 5,
    weight_decay: Scalar = 0.0,
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
      steps: Newton-Schulz iterations, at least 1.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range; at `update` if a leaf is no matrix.
      TypeError: If an argument is of the wrong type.

    Reference:
      Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.within("weight_decay", weight_decay, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            scale_by_momentum(momentum if isinstance(momentum, Filter) else muon_mix(momentum), storage=storage),
            orthogonalize(steps),
            optax.stateless(_widened),
            optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
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
            scale_by_momentum(momentum if isinstance(momentum, Filter) else ema(momentum), storage=storage),
            scale_to_unit_norm(scope),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def srsgd(
    learning_rate: optax.ScalarOrSchedule, restarts: int | Sequence[int], *, storage: str | Storage = "float32"
) -> optax.GradientTransformationExtraArgs:
    r"""Scheduled restart SGD: Nesterov's increasing momentum, from zero again at every restart.

    $$ x' = y - \eta g(y), \qquad y' = x' + \tfrac{k}{k + 3} (x' - x), $$

    k counting the steps since the last restart, from 0. The stored parameters are y.

    Args:
      learning_rate: eta.
      restarts: The number of steps from one restart to the next, or the increasing steps at which to restart.
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
      decay: mu in (-1, 1).
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
    window: int = 20,
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""YellowFin: the heavy ball with a learning rate and a momentum that it finds itself; see `scale_by_yellowfin`.

    Args:
      learning_rate: A factor on the rate that it finds, or a schedule of it, to decay by.
      decay: beta in [0, 1), of the averages.
      window: How many gradients the curvature range looks back at.
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
    weight_decay: Scalar = 0.0,
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
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`.
      scope: Of the clip: `"tree"`, the paper's, or `"leaf"`, the authors' code's.

    Raises:
      ValueError: If a number is out of range or there is no such scope.
      TypeError: If an argument is of the wrong type; at `update` without `previous_gradient`.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.within("weight_decay", weight_decay, "[0, inf)")
    if checks.is_schedule(decay):
        raise TypeError(f"decay must be a number or a scalar array, as optax.scale_by_adam wants it, got {decay!r}")
    return in_gradient_dtype(
        optax.chain(
            mars_correction(decay, gamma, scope),
            optax.scale_by_adam(decay, b2, eps),
            optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def mars_lion(
    learning_rate: optax.ScalarOrSchedule,
    decay: Scalar = 0.95,
    *,
    gamma: Scalar = 0.025,
    weight_decay: Scalar = 0.0,
    scope: str = "tree",
    storage: str | Storage = "float32",
) -> optax.GradientTransformationExtraArgs:
    r"""MARS-Lion: the sign of the averaged, corrected and clipped gradient; see `mars_correction`.

    `update` takes a second gradient of the batch, `previous_gradient=`, that at the parameters before.

    Args:
      learning_rate: eta.
      decay: beta in [0, 1).
      gamma: The weight of the correction, finite.
      weight_decay: lambda in [0, inf), decoupled; `update` then needs `params`.
      scope: Of the clip: `"tree"`, the paper's, or `"leaf"`, the authors' code's.
      storage: How the velocity is kept, see `scale_by_momentum`.

    Raises:
      ValueError: If a number is out of range or there is no such scope.
      TypeError: If an argument is of the wrong type; at `update` without `previous_gradient`.

    Reference:
      Yuan et al., "MARS: unleashing the power of variance reduction for training large models", 2024,
      arXiv:2411.10438.
    """
    checks.within("learning_rate", learning_rate, "[0, inf)")
    checks.within("weight_decay", weight_decay, "[0, inf)")
    return in_gradient_dtype(
        optax.chain(
            mars_correction(decay, gamma, scope),
            scale_by_momentum(ema(decay), storage=storage),
            optax.scale_by_sign(),
            optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def _widened(updates: Any, params: Any = None) -> Any:
    """Each matrix times the square root of its outputs over its inputs, where they are more."""
    del params
    return jax.tree.map(lambda u: max(1.0, u.shape[1] / u.shape[0]) ** 0.5 * u, updates)


def _sgd_rule(momentum: "Scalar | Filter | None", nesterov: bool, dampening: Scalar) -> Filter | None:
    """The rule of PyTorch's options; None for no momentum."""
    checks.flag("nesterov", nesterov)
    checks.within("dampening", dampening, "[0, 1)")
    damped = not is_zero(dampening)
    if isinstance(momentum, Filter):
        if nesterov or damped:
            raise ValueError("nesterov and dampening must be left out when momentum is a rule: it says what they would")
        return momentum
    if momentum is None or is_zero(momentum):
        if nesterov or damped:
            raise ValueError(f"nesterov and dampening need a momentum in (0, 1), got {momentum!r}")
        return None
    checks.within("momentum", momentum, "[0, 1)")
    if nesterov:
        if checks.is_number(dampening) and damped:
            raise ValueError(f"nesterov needs dampening 0, got {dampening!r}")
        # An injected or scheduled dampening, which may be 0 throughout, cannot be refused: it acts.
        return torch_nesterov(momentum, dampening=dampening)
    return heavy_ball(momentum, dampening=dampening, first_step="gradient")


def in_gradient_dtype(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` with updates of the gradients' dtypes: Optax multiplies by wider hyperparameters as they are."""
    run = explained(optax.with_extra_args_support(tx).update, tx.init)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = run(updates, state, params, **extra)
        return jax.tree.map(lambda u, g: u.astype(jnp.result_type(g)), new, updates), state

    return optax.GradientTransformationExtraArgs(tx.init, update)
