r"""Coefficients and learning rates from targets: curvatures, a length of memory, a noise gain, a loss to train.

The functions that take L and mu, the largest and smallest curvature of a loss, are theorems with their numbers put in.
`suggest` measures the curvature first. Nothing here replaces a search where a search can be paid for.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from . import analysis, checks, rules
from .analysis.arguments import reals
from .filters import Filter

# Without a smallest curvature there is no theory to take a decay from; this one is the usual default.
_DEFAULT_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Tuning:
    """A rule with the learning rate to follow it in the chain.

    Attributes:
      rule: The rule.
      learning_rate: The constant rate for it; 1 for rules that have their step size inside.
      decay: The decay of the rule's velocity, or what it tends to.
      rate: Predicted contraction of the error per step for curvatures in [mu, L]; None where mu is not known.
      reasons: Why, one sentence each.
    """

    rule: Filter
    learning_rate: float
    decay: float
    rate: float | None
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        rate = "unknown" if self.rate is None else f"{self.rate:.6g}"
        head = f"learning rate {self.learning_rate:.4g}, decay {self.decay:.6g}, contraction per step {rate}"
        return "\n".join([head, *(f"  - {reason}" for reason in self.reasons)])


@dataclasses.dataclass(frozen=True)
class Curvature:
    """What Lanczos found of a Hessian's spectrum.

    Attributes:
      L: Largest eigenvalue found. The true one is not smaller.
      L_error: An eigenvalue lies within this distance of `L`.
      lowest: Smallest eigenvalue found; negative where the loss is not convex. The true one is not larger.
      lowest_error: An eigenvalue lies within this distance of `lowest`.
      mu: `lowest`, where it is positive, above rounding and known to a tenth; None otherwise.
      exact: Whether the whole spectrum was seen, so that only rounding is left.
      products: Hessian-vector products spent.
    """

    L: float
    L_error: float
    lowest: float
    lowest_error: float
    mu: float | None
    exact: bool
    products: int


def gradient_descent(L: float, mu: float) -> Tuning:
    r"""Plain descent at its best rate for curvatures in [mu, L]: $2/(L+\mu)$, contraction $(\kappa-1)/(\kappa+1)$.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Polyak, "Introduction to optimization", 1987; Nesterov, "Introductory lectures on convex optimization", 2004.
    """
    kappa = _condition(L, mu)
    return Tuning(
        rules.heavy_ball(0.0),
        2 / (L + mu),
        0.0,
        (kappa - 1) / (kappa + 1),
        (
            f"2/(L + mu): curvatures {mu:.4g} and {L:.4g} contract equally",
            "holds for every smooth strongly convex loss",
        ),
    )


def optimal_heavy_ball(L: float, mu: float) -> Tuning:
    r"""Polyak's heavy ball for quadratics with curvatures in [mu, L]: the fastest constant rule of two points.

    $$ \beta = \left(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\right)^2, \qquad
       \eta = \frac{4}{(\sqrt L + \sqrt\mu)^2}, \qquad \rho = \sqrt\beta $$

    For quadratics only: at these numbers it cycles for ever on some smooth strongly convex losses. From rest the error
    is $(1 + Bt)\rho^t$, with B up to 2.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Polyak, 1964. The cycle: Lessard, Recht and Packard, 2016, arXiv:1408.3595, section 4.6.
    """
    root = math.sqrt(_condition(L, mu))
    rate = (root - 1) / (root + 1)
    return Tuning(
        rules.heavy_ball(rate**2),
        4 / (math.sqrt(L) + math.sqrt(mu)) ** 2,
        rate**2,
        rate,
        ("critically damped at both ends of the spectrum", "quadratics only: elsewhere it may cycle"),
    )


def smooth_nesterov(L: float, mu: float) -> Tuning:
    r"""Nesterov's constants for every smooth strongly convex loss.

    $$ \eta = \frac1L, \qquad \beta = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1} $$

    The error contracts by at most $1 - 1/\sqrt\kappa$ per step on quadratics.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Nesterov, "Introductory lectures on convex optimization", 2004, section 2.2.
    """
    root = math.sqrt(_condition(L, mu))
    decay = (root - 1) / (root + 1)
    return Tuning(
        rules.nesterov(decay),
        1 / L,
        decay,
        1 - 1 / root,
        ("1/L: a step that no curvature up to L makes overshoot", "holds for every smooth strongly convex loss"),
    )


def quadratic_nesterov(L: float, mu: float) -> Tuning:
    r"""Nesterov's rule at its best for quadratics with curvatures in [mu, L].

    $$ \eta = \frac{4}{3L + \mu}, \qquad \beta = \frac{\sqrt{3\kappa+1} - 2}{\sqrt{3\kappa+1} + 2}, \qquad
       \rho = 1 - \frac{2}{\sqrt{3\kappa+1}} $$

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L].

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Lessard, Recht and Packard, 2016, arXiv:1408.3595, proposition 1.
    """
    root = math.sqrt(3 * _condition(L, mu) + 1)
    decay = (root - 2) / (root + 2)
    return Tuning(
        rules.nesterov(decay),
        4 / (3 * L + mu),
        decay,
        1 - 2 / root,
        ("the least contraction of Nesterov's rule over the spectrum", "quadratics only"),
    )


def optimal_triple_momentum(L: float, mu: float) -> Tuning:
    r"""The triple momentum method, $\rho = 1 - 1/\sqrt\kappa$ on every smooth strongly convex loss; learning rate 1.

    The point that contracts so is the one of `eval_params`.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Van Scoy, Freeman and Lynch, IEEE Control Systems Letters 2018.
    """
    kappa = _condition(L, mu)
    rule = rules.triple_momentum(L, mu)
    return Tuning(
        rule,
        1.0,
        float(analysis.poles(rule)[0].real),
        1 - 1 / math.sqrt(kappa),
        ("the fastest constant rule known for every smooth strongly convex loss", "its step size is inside"),
    )


def optimal_chebyshev(L: float, mu: float) -> Tuning:
    r"""Chebyshev's semi-iteration: no method does better on quadratics with curvatures in [mu, L]; learning rate 1.

    After T steps the error is at most $2q^T/(1 + q^{2T})$ of the start, $q = (\sqrt\kappa-1)/(\sqrt\kappa+1)$.

    Args:
      L: Largest curvature, in (0, inf).
      mu: Smallest curvature, in (0, L).

    Raises:
      TypeError: If an argument is no number.
      ValueError: If a number is out of range.

    Reference:
      Golub and Varga, Numerische Mathematik 1961; d'Aspremont, Scieur and Taylor, 2021, arXiv:2101.09545.
    """
    root = math.sqrt(_condition(L, mu))
    rate = (root - 1) / (root + 1)
    return Tuning(
        rules.chebyshev(L, mu),
        1.0,
        rate**2,
        rate,
        ("the least worst error after any number of steps", "quadratics only; its step sizes are inside"),
    )


def decay_from_half_life(steps: Any) -> Any:
    r"""The decay whose memory halves in `steps` steps: $2^{-1/s}$.

    Args:
      steps: s, in (0, inf); any shape.

    Returns:
      float64 of the shape of `steps`, in (0, 1).

    Raises:
      TypeError: If `steps` is no number.
      ValueError: If it is out of range.
    """
    return (0.5 ** (1 / reals("steps", steps, "(0, inf)")))[()]


def decay_from_mean_lag(steps: Any) -> Any:
    r"""The decay of a heavy ball or average whose gradients are `steps` steps old in the mean: $s/(1+s)$.

    Args:
      steps: s, in (0, inf); any shape.

    Returns:
      float64 of the shape of `steps`, in (0, 1).

    Raises:
      TypeError: If `steps` is no number.
      ValueError: If it is out of range.
    """
    steps = reals("steps", steps, "(0, inf)")
    return (steps / (1 + steps))[()]


def decay_from_noise_gain(gain: Any) -> Any:
    r"""The decay of an average that passes this share of the variance of gradient noise: $(1-g)/(1+g)$.

    A heavy ball at the same effective learning rate passes the same.

    Args:
      gain: g, in (0, 1); any shape.

    Returns:
      float64 of the shape of `gain`, in (0, 1).

    Raises:
      TypeError: If `gain` is no number.
      ValueError: If it is out of range.
    """
    gain = reals("gain", gain, "(0, 1)")
    return ((1 - gain) / (1 + gain))[()]


def match_learning_rate(learning_rate: Any, old: Filter, new: Filter) -> Any:
    r"""The rate for `new` that goes as far along a lasting gradient as `learning_rate` does for `old`.

    $\eta_\mathrm{new} = \eta\,H_\mathrm{old}(1)/H_\mathrm{new}(1)$: a tenth of the rate from heavy ball 0.9 to 0.99.

    Args:
      learning_rate: The rate that serves `old`, in [0, inf); any shape.
      old: A rule; its coefficients must be constant.
      new: Another.

    Returns:
      float64 of the shape of `learning_rate`.

    Raises:
      TypeError: If an argument has the wrong type.
      ValueError: If a rate is out of range, a coefficient follows the step, or the gain of a rule is 0 or infinite.
    """
    rate = analysis.effective_learning_rate(old, learning_rate)
    gains = {"old": analysis.dc_gain(old), "new": analysis.dc_gain(new)}
    for name, gain in gains.items():
        if gain == 0 or math.isinf(gain):
            raise ValueError(f"{name} must have a finite gain other than 0 at zero frequency, got {gain}")
    if gains["old"] * gains["new"] < 0:
        raise ValueError(f"old and new must have gains of one sign, got {gains['old']} and {gains['new']}")
    return rate / gains["new"]


def estimate_curvature(
    loss: Callable[[Any, Any], Any], params: Any, batch: Any = None, *, iterations: int = 40, seed: int = 0
) -> Curvature:
    r"""The ends of the spectrum of the loss's Hessian at `params`, by Lanczos with Hessian-vector products.

    Each product costs about two gradients. The largest eigenvalue is found in a few dozen; the smallest positive one
    only if it stands apart or the spectrum is exhausted, and `mu` is None when it was not. Lanczos keeps `iterations`
    vectors of the size of the parameters in float64, and makes each orthogonal to all before it.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays; used in float32 at least.
      batch: Whatever `loss` takes; its arrays may not be traced.
      iterations: Products at most, at least 2.
      seed: Of the random vector to start from.

    Returns:
      A `Curvature`.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, or a leaf of `params` is not real floating point.
      ValueError: If `params` has no elements, `loss` no scalar, or a derivative is not finite.

    Reference:
      Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994. Golub and Van Loan, "Matrix
      computations", 2013, chapter 10.
    """
    checks.integer("iterations", iterations, 2)
    checks.integer("seed", seed, 0)
    start, product = _hessian(loss, params, batch)
    size, precision = start.size, float(jnp.finfo(start.dtype).eps)
    count = min(int(iterations), size)
    q = np.random.default_rng(int(seed)).standard_normal(size)
    basis = np.empty((count, size))
    diagonal, beside = np.empty(count), np.empty(count)
    # A package for this would be one more that every user installs; it is these ten lines.
    for k in range(count):
        basis[k] = q / np.linalg.norm(q)
        q = np.asarray(product(start, jnp.asarray(basis[k], start.dtype)), np.float64)
        if not np.all(np.isfinite(q)):
            raise ValueError("loss must have finite derivatives at params, got a product with the Hessian that is not")
        diagonal[k] = q @ basis[k]
        for _ in range(2):  # once leaves what rounding put there
            q = q - basis[: k + 1].T @ (basis[: k + 1] @ q)
        beside[k] = np.linalg.norm(q)
        scale = max(abs(diagonal[: k + 1]).max(), beside[:k].max(initial=0.0))
        if beside[k] <= 100 * precision * scale:
            count = k + 1
            break
    exact = bool(count == size or beside[count - 1] <= 100 * precision * scale)
    tridiagonal = np.diag(diagonal[:count]) + np.diag(beside[: count - 1], 1) + np.diag(beside[: count - 1], -1)
    values, vectors = np.linalg.eigh(tridiagonal)
    errors = np.zeros(count) if exact else beside[count - 1] * abs(vectors[-1])
    L, lowest = float(values[-1]), float(values[0])
    known = lowest > 100 * precision * max(abs(values)) and errors[0] <= 0.1 * lowest
    return Curvature(L, float(errors[-1]), lowest, float(errors[0]), lowest if known else None, exact, count)


def suggest(
    loss: Callable[[Any, Any], Any], params: Any, batch: Any = None, *, iterations: int = 40, seed: int = 0
) -> Tuning:
    r"""A learning rate and a decay to start from, for Nesterov's rule, with the reasons.

    The rate is 1/L, with L the largest curvature at `params`. The decay is the one of `smooth_nesterov` where the
    smallest curvature can be known, and 0.9 where it cannot: in a network it is negative or zero, and no estimate of it
    says anything about training. It looks at one place and one batch: gradient noise may want a smaller rate, and
    where curvature grows along the way so does a warm-up or a smaller rate.

    Args:
      loss: `loss(params, batch)`, a real scalar, twice differentiable.
      params: A tree of real floating-point arrays, where training starts.
      batch: Whatever `loss` takes, as large as can be.
      iterations: Hessian-vector products at most, at least 2.
      seed: Of the estimate.

    Returns:
      A `Tuning`; its `rate` is None where the smallest curvature is not known.

    Raises:
      TypeError: If `loss` is not callable or gives no real number, or a leaf of `params` is not real floating point.
      ValueError: If the loss does not curve upwards at `params`, or for the reasons of `estimate_curvature`.

    Reference:
      See `smooth_nesterov` and `estimate_curvature`.
    """
    found = estimate_curvature(loss, params, batch, iterations=iterations, seed=seed)
    L = found.L + found.L_error
    if not found.L > 0:
        raise ValueError(f"loss must curve upwards somewhere at params, got a largest curvature of {found.L}")
    measured = f"largest curvature at params {found.L:.4g} (+{found.L_error:.1g}), so the rate is 1/{L:.4g}"
    if found.mu is None:
        why = "negative" if found.lowest < 0 else "not settled, or too small for rounding"
        return Tuning(
            rules.nesterov(_DEFAULT_DECAY),
            1 / L,
            _DEFAULT_DECAY,
            None,
            (
                measured,
                f"smallest curvature found {found.lowest:.4g}: {why}, so no decay follows from it",
                f"decay {_DEFAULT_DECAY}, the usual default: a memory of ten gradients",
            ),
        )
    tuned = smooth_nesterov(L, found.mu)
    seen = "the whole spectrum was seen" if found.exact else "settled, but a smaller one may be hidden"
    return dataclasses.replace(
        tuned,
        reasons=(
            measured,
            f"smallest curvature {found.mu:.4g} ({seen}), so the condition number is {L / found.mu:.4g}",
            f"decay {tuned.decay:.4g} = (sqrt(kappa) - 1)/(sqrt(kappa) + 1), for smooth strongly convex losses",
        ),
    )


def _condition(L: float, mu: float) -> float:
    checks.number("L", L, "(0, inf)")
    checks.number("mu", mu, f"(0, {L}]")
    return L / mu


def _hessian(loss: Any, params: Any, batch: Any) -> tuple[jax.Array, Callable[[jax.Array, jax.Array], jax.Array]]:
    """The parameters as one vector, and the compiled product of the Hessian there with another."""
    if not callable(loss):
        raise TypeError(f"loss must be a function of params and batch, got {loss!r}")

    def wide(path: Any, leaf: Any) -> Any:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = "params" + jax.tree_util.keystr(path)
            raise TypeError(f"{name} must be real floating point, got {leaf.dtype}")
        return leaf.astype(jnp.promote_types(jnp.float32, leaf.dtype))

    params = jax.tree_util.tree_map_with_path(wide, params)
    start, unravel = ravel_pytree(params)
    if start.size == 0:
        raise ValueError("params must have at least one element, got none")
    out = jax.eval_shape(loss, params, batch)
    if not hasattr(out, "dtype") or not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"loss must give a real floating-point scalar, got {out}")
    if out.shape != ():
        raise ValueError(f"loss must give a scalar, got shape {out.shape}")

    @jax.jit
    def product(at: jax.Array, direction: jax.Array, batch: Any) -> Any:
        gradient = jax.grad(lambda flat: loss(unravel(flat), batch))
        return jax.jvp(gradient, (at,), (direction,))[1]

    return start, lambda at, direction: product(at, direction, batch)
